"""The arithmetic behind shares of ceilings, against figures worked out by hand."""

from __future__ import annotations

import pytest

from loadtest.dummy_dit import DIT_XL_2, DIT_XL_2_512
from loadtest.gpu.attention import Case, _decode
from loadtest.gpu.driver import StepEnd, decodes_in
from loadtest.gpu.flux import DEV
from loadtest.gpu.limits import DeviceLimits
from loadtest.gpu.occupancy import Span, busiest, occupancy
from loadtest.gpu.shapes import LLAMA_8B, TINY, TextShape
from loadtest.gpu.trace import Answer, Ask, mixed_trace, percentile, summary

LLAMA = TextShape(LLAMA_8B)
H200 = DeviceLimits("NVIDIA H200", 4.8e12, 989e12)


def test_the_8b_shape_has_the_parameters_of_the_model():
    assert LLAMA.geometry.num_parameters == 8_030_261_248


def test_a_decode_reads_all_weights_but_the_embedding_and_128_kib_a_position():
    assert LLAMA.step_weight_bytes == 2 * (8_030_261_248 - 128_256 * 4096) == 15_009_849_344
    assert LLAMA.decode_bytes(1) - LLAMA.decode_bytes(0) == 128 * 1024


@pytest.mark.parametrize(("batch", "tok_s"), [(1, 317), (8, 2389), (32, 7961), (64, 13023), (128, 19093), (256, 24895)])
def test_the_roofline_of_decodes_on_an_h200(batch, tok_s):
    """By hand: (15.0 GB + batch * 1024 * 128 KiB) / 4.8 TB/s; the compute of 256 rows is still less."""
    positions = 1024 * batch
    floor_s = H200.floor_s(LLAMA.decode_bytes(positions), LLAMA.decode_flop(batch, positions))
    assert batch / floor_s == pytest.approx(tok_s, rel=0.01)


def test_the_operations_of_a_prefill():
    """By hand for 8192 tokens: 2 * 6.979e9 * 8192 = 114.3e12 in matrices, 4 * 8192^2 / 2 * 4096 * 32 = 17.6e12 in
    attention, 1.05e9 for the logits of one row."""
    assert LLAMA.prefill_flop(8192) == pytest.approx(114.35e12 + 17.59e12, rel=1e-3)
    assert LLAMA.prefill_flop(8192) / 0.6 / 989e12 == pytest.approx(0.222, rel=0.01)
    assert LLAMA.prefill_flop(1) == pytest.approx(LLAMA.decode_flop(1, 1))


def test_a_tied_head_is_read_though_the_embedding_is_not():
    tied = TextShape({**TINY, "tie_word_embeddings": True}, on_cuda=False)
    assert tied.step_weight_bytes == TextShape(TINY, on_cuda=False).step_weight_bytes


def test_the_operations_of_diffusion_transformers():
    """DiT-XL/2: 237 and 1049 GFLOP a row; FLUX.1-dev at 1024 x 1024: 59.5 T in matrices and 14.9 T in attention."""
    assert DIT_XL_2.row_flop == pytest.approx(237e9, rel=0.002)
    assert DIT_XL_2_512.row_flop == pytest.approx(1049e9, rel=0.002)
    assert DIT_XL_2_512.num_tokens == 1024
    assert DEV.image_tokens + DEV.text_tokens == 4608
    assert DEV.row_flop == pytest.approx(59.5e12 + 14.9e12, rel=0.002)


def test_the_flux_shape_is_that_of_the_known_config():
    config = DEV.config
    assert config["axes_dims_rope"] == [32, 48, 48]
    assert sum(config["axes_dims_rope"]) == 128 and sum((2, 7, 7)) == 16


def test_attention_counts_keys_once_and_what_a_causal_mask_leaves():
    import torch

    from models.attention.base import KVCacheSpec

    spec = KVCacheSpec(1, 8, 128, 16, torch.bfloat16, torch.device("cpu"))
    num_bytes, flop = _decode(64, 1024).cost(spec, 32)
    assert num_bytes == 64 * 1024 * 2 * 8 * 128 * 2 + 2 * 64 * 32 * 128 * 2
    assert flop == 4 * 64 * 1024 * 32 * 128
    _, flop = Case("chunk", "", ((10, 3),)).cost(spec, 32)
    assert flop == 4 * (11 + 12 + 13) * 32 * 128


def ends(*steps: tuple[int, int]) -> list[StepEnd]:
    return [StepEnd(10.0 + 0.5 * i, jobs, tokens) for i, (jobs, tokens) in enumerate(steps)]


def test_decodes_are_the_steps_of_one_token_for_everybody():
    found = decodes_in(ends((2, 64), (2, 33), *[(2, 2)] * 10, (1, 1)), 2, settling=3)
    assert (found.batch, found.num_steps, found.step_s) == (2, 3, 0.5)
    assert found.tok_s == 4.0
    # 97 positions by prefills; steps 5, 6 and 7 of ten (from 0) read those of five, six, seven decodes before, and new.
    assert found.positions == 97 + 2 * 6


def test_too_few_decodes_are_no_measurement():
    with pytest.raises(ValueError, match="too few"):
        decodes_in(ends((2, 64), *[(2, 2)] * 6), 2)


def test_idle_is_what_no_kernel_covers_in_gaps_above_ten_microseconds():
    us = 1e-6
    spans = [
        Span("kernel", 0, 100 * us),
        Span("kernel", 50 * us, 90 * us),  # beside the first
        Span("Memcpy HtoD (Pinned -> Device)", 102 * us, 110 * us),
        Span("kernel", 140 * us, 200 * us),
    ]
    found = occupancy(spans, 2)
    assert found.span_s == pytest.approx(100 * us) and found.busy_s == pytest.approx(84 * us)
    assert found.idle_between == pytest.approx(30 / 200) and found.not_busy == pytest.approx(32 / 200)
    assert (found.kernels, found.copies_in, found.copies_out) == (1.5, 0.5, 0.0)


def test_the_longest_parts_of_a_step_come_first():
    spans = [Span("a", 0.0, 1.0), Span("b", 1.0, 4.0), Span("a", 4.0, 5.0), Span("c", 5.0, 6.0)]
    assert busiest(spans, 2, most=2) == [("b", 0.5, 1.5, 0.5), ("a", 1.0, 1.0, pytest.approx(1 / 3))]


def test_a_trace_is_the_same_every_time_and_comes_at_its_rate():
    first, second = (mixed_trace(1000, num_requests=400, rate=20.0) for _ in range(2))
    assert first == second
    assert first[-1].due_s == pytest.approx(20, rel=0.2)
    assert all(32 <= len(ask.token_ids) <= 4096 and 16 <= ask.num_output <= 512 for ask in first)
    assert {ask.due_s for ask in mixed_trace(1000, num_requests=5, rate=None)} == {0.0}


def test_waiting_times_count_from_when_a_request_was_due():
    asks = [Ask(0.0, [1, 2], 2), Ask(1.0, [3], 3)]
    answers = [Answer(2, [0.5, 0.75]), Answer(3, [0.25, 0.5, 2.0])]
    row = summary(asks, answers)
    assert row["seconds"] == 3.0 and row["output_tokens"] == 5 and row["prompt_tokens"] == 3
    assert row["ttft_p50_ms"] == 500 and row["itl_p99_ms"] == 1500
    assert percentile([], 50) == 0.0
