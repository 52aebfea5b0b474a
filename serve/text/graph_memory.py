"""What the decode graphs of a replica will take, known before the KV cache gets what is left.

Graphs share one pool of activations, which the first one, of the largest shape, makes as large as any needs. What each
further one takes is its nodes, in the driver's memory, and its result. So two are captured over a cache of one block,
the largest and the smallest, and thrown away; free memory of the device before and after, as the driver's share is in
no allocator's statistics. vLLM, too, captures once in vain to know (`profile_cudagraph_memory`); an estimate that is
too low ends a replica when it captures late, under load.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Callable

import torch

from models.attention.base import AttentionBackend, KVCacheSpec
from models.staging import Staging
from models.text.base import CausalLM
from serve.text.cuda_graph import MAX_WIDTH, DecodeGraphs, Shape

RESERVE = 1 / 4
"""Taken on top of what was measured: the driver takes memory in pieces of 2 MiB, and graphs between the two sizes may
have other kernels. Not yet compared with a device."""


def graphs_bytes(shapes: list[Shape], capture: Callable[[Shape], None], free_bytes: Callable[[], int]) -> int:
    """Memory of graphs of all these shapes, smallest first, from capturing two of them."""
    before = free_bytes()
    capture(shapes[-1])
    largest = before - free_bytes()
    each = 0
    if len(shapes) > 1:
        before = free_bytes()
        capture(shapes[0])
        each = max(0, before - free_bytes())
    return int((max(0, largest) + each * (len(shapes) - 1)) * (1 + RESERVE))


@torch.inference_mode()
def measure_graphs(
    model: CausalLM,
    attention: AttentionBackend,
    spec: KVCacheSpec,
    *,
    max_rows: int,
    max_drafts: int,
) -> int:
    """Bytes on a CUDA device. `attention` is of no use afterwards."""
    device = spec.device
    own_table = array("i", [0] * -(-MAX_WIDTH // spec.block_size))
    graphs = DecodeGraphs(
        model,
        attention,
        attention.allocate(1),
        staging=Staging(device),
        own_table=own_table,
        max_rows=max_rows,
        max_width=1 + max_drafts,
    )

    def free_bytes() -> int:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # of eager steps; what graphs hold stays
        return torch.cuda.mem_get_info(device)[0]

    return graphs_bytes(graphs.shapes, graphs.capture, free_bytes)
