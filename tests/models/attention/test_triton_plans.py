"""What a CUDA graph needs of the Triton backend's plans: equal steps read the same places, whatever their lengths."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from async_device import AsyncQueue

from models.attention.base import KVCacheSpec, TokenLayout
from models.staging import Staging
from serve.text.step_inputs import StepInputs

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its plans stay unchecked"
)
CPU = torch.device("cpu")
SPEC = KVCacheSpec(1, 8, 128, 16, torch.bfloat16, CPU)


def inputs(starts: list[int], num_new: int, staging: Staging, *, behind: list[int] | None = None) -> StepInputs:
    from models.attention.triton_paged import TritonAttention

    layout = TokenLayout(
        [num_new] * len(starts),
        starts,
        [list(range((start + num_new) // 16 + 1)) for start in starts],
        None if behind is None else torch.tensor(behind, dtype=torch.int32),
    )
    tokens = list(range(len(starts) * num_new))
    put = StepInputs.put(tokens, tokens, layout, TritonAttention(SPEC, 32, num_processors=132), staging)
    staging.send()
    return put


@pytest.mark.parametrize("num_new", [1, 4])
@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_a_step_reads_where_the_captured_one_of_its_size_does(num_rows: int, num_new: int) -> None:
    staging = Staging(CPU, queue=AsyncQueue())
    captured = inputs([0] * num_rows, num_new, staging)
    for length in (5, 1000, 20_000):
        assert inputs([length + row for row in range(num_rows)], num_new, staging).lie_where(captured)


def test_a_step_whose_starts_only_the_device_knows_reads_there_too() -> None:
    staging = Staging(CPU, queue=AsyncQueue())
    captured = inputs([0] * 8, 4, staging)
    step = inputs([100] * 8, 4, staging, behind=[0, 1, 2, 3, 3, 2, 1, 0])
    assert step.lie_where(captured)
    assert captured.plan.behind_S.tolist() == [0, 1, 2, 3, 3, 2, 1, 0], "the captured graph sees the new numbers"
