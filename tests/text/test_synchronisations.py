"""Nothing in a step waits for the device: it runs to its end on a device whose numbers nobody can see.

Tensors of torch's `meta` device have shapes and no content. Whatever would make the host wait for a CUDA device (an
`item` or `tolist`, `nonzero`, a mask as an index, a copy to the host outside the queue, a branch on a value) raises.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from flat_attention import BLOCK, FlatAttention
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention.base import AttentionBackend, KVCacheSpec
from models.attention.build import make_attention
from models.registry import load_text_model
from serve.engine.engine import Engine
from serve.request import SamplingParams
from serve.text.cuda_graph import DecodeGraphs
from serve.text.kv_cache import KVCache
from serve.text.runner import TokenRunner
from serve.text.scheduler import TokenScheduler
from serve.text.sequence import Sequence

META = torch.device("meta")
NUM_BLOCKS = 60


class BlindQueue:
    """A `DeviceQueue` for a device without content: what comes back from it is zeros."""

    num_uploads = num_downloads = num_waits = 0

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def upload(self, source: torch.Tensor, target: torch.Tensor) -> None:
        assert source.shape == target.shape and source.device.type == "cpu"
        self.num_uploads += 1

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device == META
        self.num_downloads += 1
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def mark(self) -> BlindQueue:
        return self

    def synchronize(self) -> None:
        self.num_waits += 1


class Launches(TorchDispatchMode):
    """Counts operations that are a kernel: those that give no view of what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not any(one.alias_info and not one.alias_info.is_write for one in function._schema.returns):
            self.names[function.overloadpacket.__name__] += 1
        return result


def cache_of(model) -> KVCacheSpec:
    spec = model.spec
    return KVCacheSpec(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, spec.dtype, META)


def build(model, depth: int, attention: AttentionBackend | None = None) -> tuple[Engine, TokenRunner, BlindQueue]:
    spec, queue, cache = model.spec, BlindQueue(), cache_of(model)
    attention = attention or make_attention("sdpa", cache, spec.num_heads)
    runner = TokenRunner(model, attention, cache, num_blocks=NUM_BLOCKS, queue=queue)
    scheduler = TokenScheduler(
        KVCache(NUM_BLOCKS, BLOCK), max_num_seqs=8, max_num_batched_tokens=24, max_model_len=128, eos_token_ids=(),
        vocab_size=spec.vocab_size,
    )  # fmt: skip
    return Engine(scheduler, runner, depth=depth), runner, queue


def submit(engine: Engine, num_output: int, num_jobs: int = 5, **params) -> None:
    for i in range(num_jobs):
        sampling = SamplingParams(**{"max_tokens": num_output, "ignore_eos": True, "temperature": 0.0} | params)
        prompt = [3 + i] * (2 + 6 * i)
        engine.submit(Sequence(id=f"{i}", token_ids=prompt, num_prompt=len(prompt), sampling=sampling))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return load_text_model(folder, device=META)


@pytest.mark.parametrize("depth", [0, 1])
def test_steps_wait_for_nothing_but_their_tokens(model, depth):
    engine, _, queue = build(model, depth)
    submit(engine, 6)
    num_steps = 0
    while engine.step():
        num_steps += 1
    assert num_steps > 6
    assert queue.num_uploads <= queue.num_waits <= num_steps + queue.num_uploads


def test_a_plain_decode_step_is_one_copy_there_and_the_tokens_back(model):
    engine, runner, queue = build(model, 1)
    submit(engine, 30)
    for _ in range(8):
        engine.step()
    before = queue.num_uploads, queue.num_downloads, queue.num_waits
    for _ in range(4):
        engine.step()
    counts = (queue.num_uploads, queue.num_downloads, queue.num_waits)
    uploads, downloads, waits = (now - then for now, then in zip(counts, before, strict=True))
    assert uploads == 4 and runner.staging.num_spilled == 0
    assert downloads == 8, "the tokens, and the largest logit of each"
    assert waits == 8, "for the tokens, and for the copy of three steps before, long done"


def test_around_a_replayed_graph_a_step_launches_few_kernels(model):
    """The tokens of the step before into their places, logits, the greedy choice; the copies go through the queue."""
    attention = FlatAttention(cache_of(model))
    engine, runner, _ = build(model, 1, attention)
    runner._graphs = DecodeGraphs(
        model, attention, runner.kv_cache, staging=runner.staging, own_table=runner._own_table, max_rows=8,
        capture=lambda forward: (lambda: None, forward()),
    )  # fmt: skip
    submit(engine, 30)
    for _ in range(8):
        engine.step()
    with Launches() as launches:
        engine.step()
    del launches.names["zeros"]  # of what is downloaded, on the host
    assert launches.names == dict.fromkeys(["index", "index_put_", "linear", "argmax", "gather"], 1)


@pytest.mark.parametrize(
    "look",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.cpu(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.numpy(),
    ],
)
def test_looking_at_a_number_is_found(look):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        look(torch.zeros(3, device=META))
