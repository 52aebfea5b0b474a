"""Attention of one layer of Llama-3.1-8B's shape, backend by backend: how far from float64, how long, and how much of
that the card's bandwidth and matrix rate explain.

Every sequence has keys and values of its own, in blocks dealt out at random, written by the backend itself. What is
compared is float64 over what the cache holds (quantised numbers as they stand for), for a few rows of some sequences.

Legend: T tokens, N query heads, K key/value heads, G = N / K, H head dimension, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loadtest.gpu.bench import Bench, Outcome
from loadtest.gpu.limits import DeviceLimits
from loadtest.gpu.timing import Stopwatch
from models.attention.base import AttentionBackend, KVCacheSpec, TokenLayout
from models.attention.build import NAMES, make_attention
from models.attention.measured import Row
from models.attention.quantized_kv import pack, unpack
from models.staging import Staging

HEADS = (32, 8, 128)
"""Query heads, key heads and head dimension of Llama-3.1-8B."""
BOUND = 3e-2
"""Of an error: weights and sums are rounded several times on the way."""
_FILLED_AT_ONCE = 16_384
"""Positions."""
_ROWS_COMPARED = 24
"""Of each sequence that is looked at: its first and its last ones."""


@dataclass(frozen=True, slots=True)
class Case:
    """`sequences`: positions before the step, and new ones."""

    phase: str
    shape: str
    sequences: tuple[tuple[int, int], ...]
    kv_dtype: str = "auto"

    @property
    def num_tokens(self) -> int:
        return sum(new for _, new in self.sequences)

    @property
    def num_new(self) -> int:
        """The most of a sequence."""
        return max(new for _, new in self.sequences)

    @property
    def context(self) -> int:
        """Of the longest sequence, after the step."""
        return max(start + new for start, new in self.sequences)

    @property
    def positions(self) -> int:
        return sum(start + new for start, new in self.sequences)

    def cost(self, spec: KVCacheSpec, num_heads: int) -> tuple[float, float]:
        """Bytes and operations: keys and values read once, queries and outputs, and the products that a causal mask
        leaves."""
        kv_bytes = spec.block_bytes / spec.num_layers / spec.block_size
        rows = 2 * self.num_tokens * num_heads * spec.head_dim * spec.dtype.itemsize
        pairs = sum(new * start + new * (new + 1) / 2 for start, new in self.sequences)
        return self.positions * kv_bytes + rows, 4.0 * pairs * num_heads * spec.head_dim


def _decode(batch: int, context: int, kv_dtype: str = "auto") -> Case:
    return Case("decode", f"{batch} x {context}", ((context - 1, 1),) * batch, kv_dtype)


CASES = (
    _decode(1, 1024),
    _decode(8, 1024),
    _decode(64, 1024),
    _decode(256, 1024),
    _decode(1, 8192),
    _decode(32, 8192),
    _decode(1, 65_536),
    Case("verify", "8 x 1024, 5 drafts", ((1024, 6),) * 8),
    Case("verify", "64 x 1024, 5 drafts", ((1024, 6),) * 64),
    Case("prefill", "1 x 1024", ((0, 1024),)),
    Case("prefill", "8 x 1024", ((0, 1024),) * 8),
    Case("prefill", "1 x 8192", ((0, 8192),)),
    Case("chunk", "2048 behind 6144", ((6144, 2048),)),
    Case("mixed", "2048 new, 64 decodes at 1024", ((0, 2048), *((1023, 1),) * 64)),
    _decode(64, 1024, "fp8_e4m3"),
    _decode(256, 1024, "fp8_e4m3"),
    _decode(32, 8192, "fp8_e4m3"),
    _decode(256, 1024, "int8"),
)
TINY_CASES = (
    Case("mixed", "6 new, 3 drafts, a decode", ((5, 6), (14, 4), (11, 1))),
    _decode(2, 12, "fp8_e4m3"),
)


def measure(bench: Bench, limits: DeviceLimits) -> None:
    """A row for each case and backend that can compute it."""
    heads, kv_heads, head_dim = (4, 2, 16) if bench.is_rehearsal else HEADS
    dtype = torch.float32 if bench.is_rehearsal else torch.bfloat16
    told: set[str] = set()
    for case in TINY_CASES if bench.is_rehearsal else CASES:
        name = f"attention: {case.phase} {case.shape} {case.kv_dtype}"
        if not bench.has_time(name, 0 if bench.is_rehearsal else 3):
            continue
        spec = KVCacheSpec(1, kv_heads, head_dim, 16, dtype, bench.device, case.kv_dtype)
        inputs = Inputs(case, spec, heads)
        for backend in (name for name in NAMES if name not in ("auto", "cpu")):
            if backend == "sdpa" and (len(case.sequences) > 64 or case.context > 8192):
                continue  # it takes sequences one by one, with masks as large as their scores: no contender
            about: dict[str, object] = {
                "phase": case.phase,
                "shape": case.shape,
                "kv": case.kv_dtype,
                "backend": backend,
            }
            about |= {"sequences": len(case.sequences), "num_new": case.num_new, "context": case.context}
            try:
                attention = make_attention(backend, spec, heads)
            except ValueError as error:
                if str(error) not in told:
                    bench.note(str(error))
                    told.add(str(error))
                continue
            try:
                found = _measure(bench, limits, case, inputs, attention)
            except Exception as error:  # of this case; what has broken the device breaks the others too, and shows
                bench.row("attention", **about, error=None, failure=f"{type(error).__name__}: {error}"[:300])
            else:
                bench.row("attention", **about, **found)
        del inputs


def choices(outcome: Outcome) -> list[Row]:
    """What `models/attention/measured.py` chooses backends from: times of all that are meant to be fast."""
    heads, kv_heads, head_dim = HEADS
    return [
        Row(
            device=outcome.about["device"],
            dtype="bfloat16",
            kv_dtype=row["kv"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            phase=row["phase"],
            sequences=row["sequences"],
            num_new=row["num_new"],
            context=row["context"],
            backend=row["backend"],
            microseconds=row["microseconds"],
            date=outcome.about["date"].split()[0],
            commit=outcome.about["commit"],
        )
        for row in outcome.of_kind("attention")
        if row["backend"] != "sdpa" and row["error"] is not None and row["error"] < BOUND
    ]


def _measure(
    bench: Bench, limits: DeviceLimits, case: Case, inputs: Inputs, attention: AttentionBackend
) -> dict[str, float]:
    """Columns of a row."""
    step = inputs.prepare(attention)
    out_TNH = step.attend()
    timing = Stopwatch(bench.device)(step.attend)
    num_bytes, flop = case.cost(inputs.spec, inputs.num_heads)
    return {
        "error": inputs.error(out_TNH),
        "microseconds": 1e6 * timing.median_s,
        "spread": timing.spread,
        "ceiling": limits.floor_s(num_bytes, flop) / timing.median_s,
    }


def measure_rotation(bench: Bench, limits: DeviceLimits) -> None:
    """The kernel that rotates queries in place and keys on their way to the cache: its own time, and the error of an
    attention behind it."""
    heads, kv_heads, head_dim = (4, 2, 16) if bench.is_rehearsal else HEADS
    dtype = torch.float32 if bench.is_rehearsal else torch.bfloat16
    for case in TINY_CASES[:1] if bench.is_rehearsal else (CASES[2], CASES[11]):
        about = {"kernel": "rotate_and_store", "shape": f"{case.phase} {case.shape}"}
        if not bench.has_time(" ".join(about.values()), 0 if bench.is_rehearsal else 3):
            continue
        inputs = Inputs(case, KVCacheSpec(1, kv_heads, head_dim, 16, dtype, bench.device), heads)
        try:
            found = _measure_rotation(bench, limits, inputs)
        except Exception as error:
            bench.row("kernel", **about, error=None, failure=f"{type(error).__name__}: {error}"[:300])
        else:
            bench.row("kernel", **about, **found)


def _measure_rotation(bench: Bench, limits: DeviceLimits, inputs: Inputs) -> dict[str, float]:
    """Columns of a row."""
    step = inputs.prepare(make_attention("triton", inputs.spec, inputs.num_heads))
    qkv_TMH, cis_T1C = inputs.turn(step)
    rotate = partial(step.attention.rotate_and_store, cis_T1C=cis_T1C, norm=None, kv=step.cache, plan=step.plan)
    turned_TMH = qkv_TMH.clone()
    rotate(turned_TMH)
    q_TNH = turned_TMH[:, : inputs.num_heads]
    out_TNH = step.attention.attend_stored(q_TNH, step.cache, step.plan, scale=inputs.spec.head_dim**-0.5)
    error = inputs.error(out_TNH)
    timing = Stopwatch(bench.device)(lambda: rotate(turned_TMH))
    return {
        "error": error,
        "bound": BOUND,
        "microseconds": 1e6 * timing.median_s,
        "spread": timing.spread,
        "ceiling": limits.floor_s(2 * qkv_TMH.nbytes + cis_T1C.nbytes, 0.0) / timing.median_s,
    }


@dataclass(frozen=True, slots=True)
class Step:
    """A step ready to be computed, over a cache that holds all positions before it."""

    attention: Any
    cache: Any
    plan: Any
    q_TNH: torch.Tensor
    new_T2KH: torch.Tensor

    def attend(self) -> torch.Tensor:
        scale = self.q_TNH.shape[-1] ** -0.5
        out_TNH: torch.Tensor = self.attention.attend(self.q_TNH, self.new_T2KH, self.cache, self.plan, scale=scale)
        return out_TNH


class Inputs:
    """Random queries, keys and values of a case, and where they lie in a cache."""

    def __init__(self, case: Case, spec: KVCacheSpec, num_heads: int):
        self.spec = spec
        self.num_heads = num_heads
        self._sequences = case.sequences
        generator = torch.Generator(spec.device).manual_seed(0)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, device=spec.device, dtype=spec.dtype)

        self._q_TNH = random(case.num_tokens, num_heads, spec.head_dim)
        self._kv_P2KH = random(case.positions, 2, spec.num_kv_heads, spec.head_dim)
        self._ends = [sum(start + new for start, new in case.sequences[: i + 1]) for i in range(len(case.sequences))]
        counts = [-(-(start + new) // spec.block_size) for start, new in case.sequences]
        self.num_blocks = sum(counts)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self._tables = [order[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]

    def prepare(self, attention: AttentionBackend) -> Step:
        (cache,) = attention.allocate(self.num_blocks)
        self._fill(attention, cache)
        layout = TokenLayout([new for _, new in self._sequences], [start for start, _ in self._sequences], self._tables)
        staging = Staging(self.spec.device)
        plan = attention.plan(layout, staging)
        staging.send()
        return Step(attention, cache, plan, self._q_TNH, self._kv_P2KH[self._new_places()])

    def turn(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """The projection [T, N + 2 K, H] of `step` and random rotations; from now on what is exact is rotated so."""
        qkv_TMH = torch.cat((step.q_TNH, *step.new_T2KH.unbind(1)), 1)
        angles_T1C = torch.rand(len(qkv_TMH), 1, self.spec.head_dim // 2, device=self.spec.device) * 6.28
        cis_T1C = torch.polar(torch.ones_like(angles_T1C), angles_T1C)

        def turned(x_TNH: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(x_TNH.double().unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * cis_T1C.to(torch.complex128)).flatten(-2)

        self._q_TNH = turned(self._q_TNH)
        places = self._new_places()
        self._kv_P2KH = self._kv_P2KH.double()
        self._kv_P2KH[places, 0] = turned(self._kv_P2KH[places, 0])
        return qkv_TMH, cis_T1C

    def _new_places(self) -> torch.Tensor:
        """Of the step's own positions among all."""
        ranges = [torch.arange(end - new, end) for end, (_, new) in zip(self._ends, self._sequences)]
        return torch.cat(ranges).to(self.spec.device)

    def _fill(self, attention: AttentionBackend, cache: Any) -> None:
        """By steps of a few sequences' chunks, whose outputs nobody reads."""
        for index, (start, new) in enumerate(self._sequences):
            first = self._ends[index] - start - new
            for at in range(0, start, _FILLED_AT_ONCE):
                size = min(_FILLED_AT_ONCE, start - at)
                staging = Staging(self.spec.device)
                plan = attention.plan(TokenLayout([size], [at], [self._tables[index]]), staging)
                staging.send()
                q_TNH = torch.zeros(
                    size, self.num_heads, self.spec.head_dim, dtype=self.spec.dtype, device=self.spec.device
                )
                attention.attend(q_TNH, self._kv_P2KH[first + at : first + at + size], cache, plan, scale=1.0)

    def error(self, out_TNH: torch.Tensor) -> float:
        """‖out - exact‖ / ‖exact‖ over some rows of the first, a middle and the last sequence."""
        ours, exact = [], []
        row = 0
        looked_at = {0, len(self._sequences) // 2, len(self._sequences) - 1}
        for index, (start, new) in enumerate(self._sequences):
            if index in looked_at:
                rows = sorted({*range(min(new, _ROWS_COMPARED // 2)), *range(max(0, new - _ROWS_COMPARED // 2), new)})
                places = torch.tensor(rows, device=out_TNH.device)
                ours.append(out_TNH[row + places].double())
                exact.append(self._exact(index, start, row + places, start + places))
            row += new
        difference, whole = torch.cat(ours) - torch.cat(exact), torch.cat(exact)
        return float(difference.norm() / whole.norm())

    def _exact(self, index: int, start: int, rows_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        """In float64, over the numbers that the cache's format holds."""
        spec = self.spec
        length = start + self._sequences[index][1]
        kv_P2KH = self._kv_P2KH[self._ends[index] - length : self._ends[index]]
        if spec.is_quantized:
            kv_P2KH = unpack(pack(kv_P2KH, spec.kv_dtype), spec.kv_dtype, torch.float64)
        k_PKH, v_PKH = kv_P2KH.double().unbind(1)
        q_RKGH = self._q_TNH[rows_R].double().unflatten(1, (spec.num_kv_heads, -1))
        scores_RKGP = torch.einsum("rkgh,pkh->rkgp", q_RKGH, k_PKH) * spec.head_dim**-0.5
        hidden_RP = torch.arange(length, device=rows_R.device)[None] > positions_R[:, None]
        weights_RKGP = scores_RKGP.masked_fill(hidden_RP[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("rkgp,pkh->rkgh", weights_RKGP, v_PKH).flatten(1, 2)
