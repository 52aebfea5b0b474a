"""The sampler's kernels on logits of Llama-3's vocabulary: the tokens of the CPU's reference, and how long they take.

The plain version beside it is the reference on the same device, in torch's operations. The floor is one reading of the
logits.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch

from loadtest.gpu.bench import Bench
from loadtest.gpu.limits import DeviceLimits
from loadtest.gpu.timing import Stopwatch
from models.kernels.available import has_kernels
from models.staging import Staging
from serve.request import SamplingParams
from serve.text.sampling.sampler import Sampler, TokenSampler, make_sampler
from serve.text.sequence import Row, Sequence

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-k 50, top-p 0.9, min-p 0.05": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "penalties, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.5, "repetition_penalty": 1.1},
}
ROWS = (1, 64, 256)
_HISTORY = 64
"""Tokens of each request before the draw."""
BOUND = 0.02
"""Rows that may draw otherwise: the two logarithms of the noise are each device's own, so a near tie may tip."""


def measure(bench: Bench, limits: DeviceLimits) -> None:
    """A row for each setting and number of rows."""
    vocab_size, all_rows = (300, (3,)) if bench.is_rehearsal else (128_256, ROWS)
    if not has_kernels(bench.device):
        return
    settings = list(SETTINGS.items())[-1 if bench.is_rehearsal else 0 :]
    for name, setting in settings:
        for num_rows in all_rows:
            about = {"sampling": name, "rows": num_rows}
            if not bench.has_time(f"sampler: {name}, {num_rows} rows", 0 if bench.is_rehearsal else 3):
                continue
            try:
                found = _measure(bench, limits, vocab_size, num_rows, setting)
            except Exception as error:  # of this setting; what has broken the device breaks the others too, and shows
                bench.row("sampler", **about, error=None, failure=f"{type(error).__name__}: {error}"[:300])
            else:
                bench.row("sampler", **about, **found)


def _measure(
    bench: Bench, limits: DeviceLimits, vocab_size: int, num_rows: int, setting: dict[str, Any]
) -> dict[str, float]:
    """Columns of a row."""
    logits_RV = torch.randn(num_rows, vocab_size, device=bench.device) * 3
    rows = [_row(i, vocab_size, setting) for i in range(num_rows)]
    expected_R = _draw(Sampler(vocab_size, (), torch.device("cpu")), logits_RV.cpu(), rows)()
    ours = _draw(make_sampler(vocab_size, (), bench.device), logits_RV, rows)
    plain = _draw(Sampler(vocab_size, (), bench.device), logits_RV, rows)
    differs = float((ours().cpu() != expected_R).float().mean())
    stopwatch = Stopwatch(bench.device)
    timing, beside = stopwatch(ours), stopwatch(plain)
    return {
        "error": differs,
        "bound": BOUND if num_rows >= 1 / BOUND else 1e-9,
        "microseconds": 1e6 * timing.median_s,
        "spread": timing.spread,
        "ceiling": limits.floor_s(logits_RV.nbytes, 0.0) / timing.median_s,
        "times_faster": beside.median_s / timing.median_s,
    }


def _draw(sampler: TokenSampler, logits_RV: torch.Tensor, rows: list[Row]) -> Any:
    """A function that samples by a plan which has been sent, as a step does after its forward."""
    device = logits_RV.device
    staging = Staging(device)
    plan = sampler.plan(rows, staging)
    staging.send()
    inputs_R = torch.tensor([row.token_ids[-1] for row in rows], device=device)

    def draw() -> torch.Tensor:
        return sampler.sample(logits_RV, plan, inputs_R).token_ids_R

    return draw


def _row(number: int, vocab_size: int, setting: dict[str, Any]) -> Row:
    """A decode whose request has some tokens behind it."""
    ids = [(37 * number + 11 * i) % vocab_size for i in range(_HISTORY)]
    sampling = SamplingParams(max_tokens=1000, seed=number, ignore_eos=True, **setting)
    job = Sequence(id=f"sampled-{number}", token_ids=ids, num_prompt=_HISTORY // 2, sampling=sampling)
    return Row(job, 0, ids[-1:], _HISTORY - 1, array("i", [0]), samples=True, sample_position=_HISTORY)
