"""Which backend is fastest for a device and a model's shape, as it was measured: the table `measured.json` beside this.

A row is one time of one backend: median microseconds of a layer's `attend`, with the case, the day and the commit.
Among the backends that can compute a model here, that one is chosen whose times have the least geometric mean over the
cases that all of them were measured at; every case counts alike. Without rows for the device nothing is chosen, and
`build.py` falls back to what it documents.

`python -m models.attention.measured --commit HASH` measures this machine's CPU; `python -m loadtest.gpu kernels`
measures a GPU with cases of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

import torch

from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.staging import Staging

TABLE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, slots=True)
class Row:
    device: str
    """As `device_name` gives it; * and ? stand for anything."""
    dtype: str
    kv_dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    phase: str
    """decode, verify, prefill, chunk or mixed."""
    sequences: int
    num_new: int
    context: int
    """Positions of a sequence after the step."""
    backend: str
    microseconds: float
    date: str
    commit: str

    @property
    def case(self) -> tuple[str, int, int, int, int]:
        return self.phase, self.sequences, self.num_new, self.context, self.num_heads


def read() -> list[Row]:
    return [Row(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))] if TABLE.exists() else []


def write(rows: Sequence[Row]) -> None:
    """Add `rows`, in place of older ones of the same backends at the same cases."""
    every = (*read(), *rows)
    added = {(row.device, row.dtype, row.kv_dtype, row.head_dim, row.case, row.backend): row for row in every}
    lines = ",\n".join(json.dumps(asdict(row)) for row in added.values())
    TABLE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def choose(rows: Sequence[Row], spec: KVCacheSpec, num_heads: int, names: Sequence[str]) -> str | None:
    """The fastest of `names` for the device and shape of `spec`; None where there are no times to compare.

    Where the ratio of heads was measured only other ratios are left out.
    """
    kind = (str(spec.dtype).removeprefix("torch."), spec.kv_dtype, spec.head_dim)
    fitting = [row for row in rows if row.backend in names and (row.dtype, row.kv_dtype, row.head_dim) == kind]
    if fitting:
        device = device_name(spec.device)
        fitting = [row for row in fitting if fnmatch(device, row.device)]
    groups = num_heads // spec.num_kv_heads
    fitting = [row for row in fitting if row.num_heads // row.num_kv_heads == groups] or fitting
    times: dict[str, dict[object, float]] = {}
    for row in fitting:
        times.setdefault(row.backend, {})[row.case] = row.microseconds
    common = set.intersection(*(set(cases) for cases in times.values())) if times else set()
    if not common or len(times) < 2:
        return None
    return min(times, key=lambda name: sum(math.log(times[name][case]) for case in common))


def device_name(device: torch.device) -> str:
    """Of the card, or of the processor with the number of threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def measure(
    attention: AttentionBackend, spec: KVCacheSpec, num_heads: int, *, sequences: int, num_new: int, context: int
) -> float:
    """Median seconds of a layer over scattered blocks that hold random numbers."""
    needed = -(-context // spec.block_size)
    (kv,) = attention.allocate(sequences * needed)
    order = torch.randperm(sequences * needed, generator=torch.Generator().manual_seed(0)).tolist()
    tables = [order[index * needed : (index + 1) * needed] for index in range(sequences)]
    staging = Staging(spec.device)

    def run(num_new: int, start: int) -> Callable[[], torch.Tensor]:
        plan = attention.plan(TokenLayout([num_new] * sequences, [start] * sequences, tables), staging)
        staging.send()
        heads = num_heads + 2 * spec.num_kv_heads
        fused = torch.randn(sequences * num_new, heads, spec.head_dim).to(spec.device, spec.dtype)
        q_TNH, new_T2KH = fused[:, :num_heads], fused[:, num_heads:].unflatten(1, (2, spec.num_kv_heads))
        return lambda: attention.attend(q_TNH, new_T2KH, kv, plan, scale=spec.head_dim**-0.5)

    if context > num_new:
        run(context - num_new, 0)()
    step = run(num_new, context - num_new)
    times: list[float] = []
    step()
    while len(times) < 5 or (sum(times) < 0.2 and len(times) < 200):
        began = time.perf_counter()
        step()
        if spec.device.type == "cuda":
            torch.cuda.synchronize(spec.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


_CASES = (("decode", 1, 1, 512), ("decode", 16, 1, 512), ("prefill", 1, 512, 512), ("chunk", 1, 128, 1024))
_SHAPES = ((16, 8, 128), (8, 2, 64))
"""Query heads, key heads, head dimension: of Qwen3 0.6B, and of small models."""


def _main() -> None:
    from models.attention.build import NAMES, make_attention, why_not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True)
    commit = parser.parse_args().commit
    device, today = torch.device("cpu"), datetime.now(UTC).date().isoformat()
    rows: list[Row] = []
    for dtype, (heads, kv_heads, head_dim) in itertools.product((torch.float32, torch.bfloat16), _SHAPES):
        spec = KVCacheSpec(1, kv_heads, head_dim, 16, dtype, device)
        names = [name for name in NAMES if name != "auto" and why_not(name, spec) is None]
        for name, (phase, sequences, num_new, context) in itertools.product(names, _CASES):
            attention = make_attention(name, spec, heads)
            seconds = measure(attention, spec, heads, sequences=sequences, num_new=num_new, context=context)
            row = Row(
                device=device_name(device),
                dtype=str(dtype).removeprefix("torch."),
                kv_dtype=spec.kv_dtype,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                phase=phase,
                sequences=sequences,
                num_new=num_new,
                context=context,
                backend=name,
                microseconds=round(1e6 * seconds, 1),
                date=today,
                commit=commit,
            )
            print(row, flush=True)
            rows.append(row)
    write(rows)


if __name__ == "__main__":
    with torch.inference_mode():
        _main()
