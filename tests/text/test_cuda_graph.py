"""Decode graphs without a GPU: buffers, padding and plans; the "capture" computes the forward anew each time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional as F

from models.attention.base import KVCacheSpec, TokenLayout
from models.registry import load_text_model
from models.text.base import StepContext
from serve.text.cuda_graph import SIZES, DecodeGraphs

torch.set_num_threads(1)
CPU = torch.device("cpu")
BLOCK, NUM_BLOCKS, MAX_BLOCKS = 4, 40, 6


@dataclass(frozen=True)
class Plan:
    slots_T: torch.Tensor
    tables_TW: torch.Tensor
    lengths_T: list[torch.Tensor]


class FlatAttention:
    """Decodes only, in a fixed number of operations whatever the lengths, as a capturable backend computes them."""

    def __init__(self, spec: KVCacheSpec):
        self._spec = spec

    def allocate(self, num_blocks: int) -> list[torch.Tensor]:
        shape = (2, num_blocks * BLOCK, self._spec.num_kv_heads, self._spec.head_dim)
        return [torch.zeros(shape) for _ in range(self._spec.num_layers)]

    def plan(self, layout: TokenLayout) -> Plan:
        assert set(layout.num_new) == {1}
        width = max(-(-(start + 1) // BLOCK) for start in layout.num_computed)
        tables = [(list(table) + [0] * width)[:width] for table in layout.block_tables]
        slots = [table[start // BLOCK] * BLOCK + start % BLOCK for table, start in zip(tables, layout.num_computed)]
        return Plan(torch.tensor(slots), torch.tensor(tables), [torch.tensor(layout.num_computed) + 1])

    def attend(self, q_TNH, new_T2KH, kv, plan, *, scale, window=None, softcap=None):
        kv[0][plan.slots_T], kv[1][plan.slots_T] = new_T2KH.unbind(1)
        slots_TL = (plan.tables_TW[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)
        mask_T11L = (torch.arange(slots_TL.shape[1]) < plan.lengths_T[0][:, None])[:, None, None]
        keys, values = (part[slots_TL].transpose(1, 2) for part in kv)
        out = F.scaled_dot_product_attention(
            q_TNH[:, :, None], keys, values, attn_mask=mask_T11L, scale=scale, enable_gqa=True
        )
        return out[:, :, 0]


class Captures:
    """Stands in for CUDA: remembers how often it captured, and replays into the tensor of the capture."""

    def __init__(self):
        self.num = 0

    def __call__(self, forward):
        self.num += 1
        hidden = forward().clone()
        return (lambda: hidden.copy_(forward())), hidden


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return load_text_model(folder, device=CPU)


@pytest.fixture
def parts(model):
    spec = model.spec
    cache = KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, CPU)
    attention, captures = FlatAttention(cache), Captures()
    kv_cache = attention.allocate(NUM_BLOCKS + 1)
    for layer in kv_cache:
        layer.normal_(generator=torch.Generator().manual_seed(3))
    graphs = DecodeGraphs(
        model,
        attention,
        kv_cache,
        own_block=NUM_BLOCKS,
        max_blocks=MAX_BLOCKS,
        block_size=BLOCK,
        max_rows=10,
        device=CPU,
        capture=captures,
    )
    return graphs, attention, kv_cache, captures


def step(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, TokenLayout]:
    """Decodes at random lengths on blocks of their own."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 4 * BLOCK, (num_rows,), generator=generator).tolist()
    order = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    tables = [order[4 * i : 4 * i + 4] for i in range(num_rows)]
    ids = torch.randint(0, 250, (num_rows,), generator=generator)
    return ids, torch.tensor(starts), TokenLayout([1] * num_rows, starts, tables)


@torch.inference_mode()
def test_replayed_steps_equal_plain_ones_for_every_number_of_rows(parts, model):
    graphs, attention, kv_cache, _ = parts
    graphs.warm_up()
    for seed, num_rows in enumerate((10, 1, 7, 3, 10, 2, 9, 8, 1)):
        ids, positions, layout = step(num_rows, seed)
        before = [layer.clone() for layer in kv_cache]
        expected = model.forward(ids, positions, StepContext(attention, attention.plan(layout), kv_cache))
        after = [layer[:, : NUM_BLOCKS * BLOCK].clone() for layer in kv_cache]
        for layer, old in zip(kv_cache, before):
            layer.copy_(old)
        torch.testing.assert_close(graphs.forward(ids, positions, layout), expected, atol=1e-5, rtol=1e-5)
        for layer, wanted in zip(kv_cache, after):
            torch.testing.assert_close(layer[:, : NUM_BLOCKS * BLOCK], wanted, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_few_sizes_are_captured_before_ready_and_each_other_once(parts):
    graphs, _, _, captures = parts
    graphs.warm_up()
    assert captures.num == 3
    for seed, num_rows in enumerate((1, 2, 2, 3, 4, 8, 10, 12)):
        graphs.forward(*step(min(num_rows, 10), seed))
    assert captures.num == 5  # 2 and 4 came later


@torch.inference_mode()
def test_the_rest_is_captured_one_by_one_and_no_size_twice(parts):
    graphs, _, _, captures = parts
    graphs.warm_up()
    graphs.forward(*step(2, 0))
    assert captures.num == 4  # of 1, 2, 4, 8 and 12
    assert not graphs.capture_next()
    assert captures.num == 5
    assert not graphs.capture_next()
    for seed, num_rows in enumerate((1, 2, 3, 8, 10)):
        graphs.forward(*step(num_rows, seed))
    assert captures.num == 5


def test_batches_beyond_the_limit_are_not_covered(parts):
    graphs = parts[0]
    assert graphs.covers(1) and graphs.covers(12)
    assert not graphs.covers(13)
    assert len(SIZES) == 20 and list(SIZES) == sorted(SIZES)
