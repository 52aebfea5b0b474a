"""Decode graphs without a GPU: buffers, padding and plans; the "capture" computes the forward anew each time."""

from __future__ import annotations

from array import array

import pytest
import torch
from async_device import AsyncQueue
from flat_attention import BLOCK, Captures, FlatAttention
from tiny import tiny_model

from models.attention.base import KVCacheSpec, TokenLayout
from models.registry import load_text_model
from models.staging import Staging
from models.text.base import StepContext
from serve.text.cuda_graph import SIZES, DecodeGraphs
from serve.text.step_inputs import StepInputs

torch.set_num_threads(1)
CPU = torch.device("cpu")
NUM_BLOCKS = 40
CAPACITY = 8192
OWN_TABLE = array("i", [NUM_BLOCKS])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return load_text_model(folder, device=CPU)


@pytest.fixture
def parts(model):
    return build(model)


def build(model, max_width: int = 1) -> tuple:
    spec = model.spec
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    attention, captures = FlatAttention(cache), Captures()
    kv_cache = attention.allocate(NUM_BLOCKS + 1)
    for layer in kv_cache:
        layer.normal_(generator=torch.Generator().manual_seed(3))
    staging = Staging(CPU, CAPACITY, AsyncQueue())
    graphs = DecodeGraphs(
        model,
        attention,
        kv_cache,
        staging=staging,
        own_table=OWN_TABLE,
        max_rows=10,
        max_width=max_width,
        capture=captures,
    )
    return graphs, attention, kv_cache, captures, staging


def rows(num_rows: int, width: int = 1) -> TokenLayout:
    return TokenLayout([width] * num_rows, [0] * num_rows, [[0]] * num_rows)


def compute(parts, ids: list[int], positions: list[int], layout: TokenLayout) -> torch.Tensor:
    graphs, _, _, _, staging = parts
    inputs = graphs.put(ids, positions, layout)
    staging.send()
    return graphs.forward(inputs, layout)[: len(ids)]


def step(num_rows: int, seed: int, width: int = 1) -> tuple[list[int], list[int], TokenLayout]:
    """Sequences of random lengths on blocks of their own, with `width` new tokens each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 4 * BLOCK - width + 1, (num_rows,), generator=generator).tolist()
    order = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    tables = [order[4 * i : 4 * i + 4] for i in range(num_rows)]
    ids = torch.randint(0, 250, (num_rows * width,), generator=generator).tolist()
    positions = [start + i for start in starts for i in range(width)]
    return ids, positions, TokenLayout([width] * num_rows, starts, tables)


@pytest.mark.parametrize("width", [1, 2, 3])
@torch.inference_mode()
def test_replayed_steps_equal_plain_ones_for_every_number_of_rows(model, width):
    parts = graphs, attention, kv_cache, _, staging = build(model, max_width=width)
    graphs.warm_up()
    while graphs.capture_next():
        pass
    plain = Staging(CPU)
    for seed, num_rows in enumerate((10, 1, 7, 3, 10, 2, 9, 8, 1)):
        ids, positions, layout = step(num_rows, seed, width)
        before = [layer.clone() for layer in kv_cache]
        inputs = StepInputs.put(ids, positions, layout, attention, plain)
        context = StepContext(attention, inputs.plan, kv_cache)
        expected = model.forward(inputs.token_ids_T, inputs.positions_T, context)
        after = [layer[:, : NUM_BLOCKS * BLOCK].clone() for layer in kv_cache]
        for layer, old in zip(kv_cache, before):
            layer.copy_(old)
        num_copies = staging.num_copies
        torch.testing.assert_close(compute(parts, ids, positions, layout), expected, atol=1e-5, rtol=1e-5)
        assert staging.num_copies == num_copies + 1
        for layer, wanted in zip(kv_cache, after):
            torch.testing.assert_close(layer[:, : NUM_BLOCKS * BLOCK], wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_few_sizes_are_captured_before_ready_and_each_other_once(parts):
    graphs, _, _, captures, _ = parts
    graphs.warm_up()
    assert captures.num == 3
    for seed, num_rows in enumerate((1, 2, 2, 3, 4, 8, 10, 12)):
        compute(parts, *step(min(num_rows, 10), seed))
    assert captures.num == 5  # 2 and 4 came later


@torch.inference_mode()
def test_the_rest_is_captured_one_by_one_and_no_size_twice(parts):
    graphs, _, _, captures, _ = parts
    graphs.warm_up()
    compute(parts, *step(2, 0))
    assert captures.num == 4  # of 1, 2, 4, 8 and 12
    assert not graphs.capture_next()
    assert captures.num == 5
    assert not graphs.capture_next()
    for seed, num_rows in enumerate((1, 2, 3, 8, 10)):
        compute(parts, *step(num_rows, seed))
    assert captures.num == 5


def test_batches_beyond_the_limit_are_not_covered(parts):
    graphs = parts[0]
    assert graphs.covers(rows(1)) and graphs.covers(rows(12))
    assert not graphs.covers(rows(13)) and not graphs.covers(rows(1, 2))
    assert not graphs.covers(TokenLayout([1, 2], [0, 0], [[0], [1]]))
    assert len(SIZES) == 20 and list(SIZES) == sorted(SIZES)


def test_steps_that_verify_drafts_have_graphs_for_each_number_of_drafts(model):
    graphs, _, _, captures, _ = build(model, max_width=3)
    assert all(graphs.covers(rows(num, width)) for num in (1, 10) for width in (1, 2, 3))
    assert not graphs.covers(rows(2, 4)) and not graphs.covers(TokenLayout([3, 2], [0, 0], [[0], [1]]))
    graphs.warm_up()
    assert captures.num == 5, "the largest of all, and 1 and 8 rows with all drafts and with none"
    while graphs.capture_next():
        pass
    assert captures.num == len(graphs.shapes) == 15
