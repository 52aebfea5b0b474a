"""From options to a replica: what is chosen, and what a user is told when it cannot be."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
import torch
from tiny import tiny_folder

from models.attention.base import KVCacheSpec
from serve import compute
from serve.compute import choose_device, set_threads, take_memory, use_huge_pages
from serve.errors import ConfigError
from serve.events import Event
from serve.options import ModelOptions
from serve.request import SamplingParams, TextRequest
from serve.text.build import build_engine, build_text
from serve.text.cache_size import choose_cache_size, cpu_cache_bytes, free_memory_bytes
from serve.text.load_progress import LoadProgress

CPU = torch.device("cpu")
SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32, device=CPU)
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models"), "llama")


def options(model="m", **values) -> ModelOptions:
    return ModelOptions(model=str(model), **{"threads": 1, **values})


def build_quietly(model, **values):
    return build_engine(options(model, **values), progress=False)


def test_the_card_tells_what_was_built(folder):
    _, card = build_quietly(folder, served_model_name=("mine", "other"), kv_cache_memory_bytes=MIB)
    assert (card.name, card.aliases, card.kind, card.device, card.dtype) == (
        "mine",
        ("other",),
        "text",
        "cpu",
        "float32",
    )
    assert card.max_model_len == 512 and card.threads == 1
    assert card.kv_cache_tokens == MIB // SPEC.block_bytes * 16
    assert card.num_parameters > 50_000 and card.load_s > 0


def test_the_backend_answers_and_ends(folder):
    async def ask() -> list[Event]:
        backend = build_text(options(folder, kv_cache_memory_bytes=MIB), progress=False)
        sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        request = TextRequest(request_id="r", model="m", prompt_token_ids=(5, 6, 7), sampling=sampling)
        try:
            return [event async for events in await backend.submit(request) for event in events]
        finally:
            await backend.aclose()

    *deltas, finished = asyncio.run(ask())
    assert sum(len(delta.token_ids) for delta in deltas) == 3
    assert finished.usage.completion_tokens == 3


def test_the_dtype_asked_for_is_the_dtype_of_weights_and_cache(folder):
    _, card = build_quietly(folder, dtype="bfloat16", kv_cache_memory_bytes=MIB)
    assert card.dtype == "bfloat16"
    assert card.kv_cache_tokens == 2 * (MIB // SPEC.block_bytes) * 16


def test_random_weights_need_no_weights(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    _, card = build_quietly(tmp_path, load_format="dummy")
    assert card.max_model_len == 512


def test_a_missing_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        build_quietly(tmp_path / "nowhere")


def test_missing_weights_are_a_config_error(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="dummy"):
        build_quietly(tmp_path)


def test_weights_of_another_shape_are_a_config_error(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        build_quietly(tmp_path)


def test_weights_that_compute_nan_are_refused_at_the_start(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="not finite"):
        build_quietly(tmp_path)


def test_an_image_model_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no text model, its kind is 'image'"):
        build_quietly(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_and_auto_takes_the_cpu():
    with pytest.raises(ConfigError, match="CUDA"):
        choose_device(options(device="cuda"))
    assert choose_device(options()) == CPU


def test_replicas_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(compute.os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(compute.torch, "set_num_threads", lambda n: None)
    assert set_threads(options(threads=None), 1) == 8
    assert set_threads(options(threads=None), 3) == 2
    assert set_threads(options(threads=None), 100) == 1
    assert set_threads(options(threads=5), 2) == 5


def test_huge_pages_keep_what_lies_on_them():
    held = torch.arange(10 << 20)
    use_huge_pages()
    assert torch.equal(held, torch.arange(10 << 20))


def test_memory_is_taken_in_parts_and_keeps_what_is_there():
    tensors = [torch.arange(20 << 20), torch.arange(100)]
    assert set(take_memory(tensors)) <= {True}
    assert torch.equal(tensors[0], torch.arange(20 << 20)) and torch.equal(tensors[1], torch.arange(100))


def test_a_length_the_model_was_not_made_for_is_refused():
    with pytest.raises(ConfigError, match="made for 512 positions"):
        choose_cache_size(options(max_model_len=513), SPEC, max_positions=512, memory_bytes=MIB)


def test_a_length_the_cache_cannot_hold_is_refused_with_both_sizes_and_the_remedy():
    size = 10 * SPEC.block_bytes
    with pytest.raises(ConfigError, match=r"hold 160 positions.*max_model_len 512.*kv_cache_memory_bytes"):
        choose_cache_size(
            options(max_model_len=512, kv_cache_memory_bytes=size), SPEC, max_positions=512, memory_bytes=size
        )
    with pytest.raises(ConfigError, match="lower max_model_len"):
        choose_cache_size(options(), SPEC, max_positions=512, memory_bytes=SPEC.block_bytes - 1)


def test_without_a_length_it_is_what_the_cache_holds_and_the_model_was_made_for():
    small = choose_cache_size(options(), SPEC, max_positions=512, memory_bytes=10 * SPEC.block_bytes)
    large = choose_cache_size(options(), SPEC, max_positions=512, memory_bytes=MIB)
    assert (small.num_blocks, small.max_model_len) == (10, 160)
    assert large.max_model_len == 512


def test_the_cpu_cache_holds_some_full_sequences_within_a_share_of_the_free_memory():
    def size(free: int, replicas: int = 1, **values) -> int:
        return cpu_cache_bytes(options(**values), SPEC, max_positions=512, free_bytes=free, num_replicas_here=replicas)

    full = 32 * SPEC.block_bytes
    assert size(1 << 40) == 32 * full  # an eighth of 256 sequences
    assert size(1 << 40, max_num_seqs=4) == full
    assert size(8 * full) == 2 * full
    assert size(8 * full, replicas=2) == full
    assert size(1, kv_cache_memory_bytes=77) == 77


def test_free_memory_is_read_from_the_system():
    assert 1 << 20 < free_memory_bytes() < 1 << 50


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_few_lines_elsewhere():
    now = [0.0]
    terminal, log = Terminal(), io.StringIO()
    bar, lines = LoadProgress("m", terminal, lambda: now[0]), LoadProgress("m", log, lambda: now[0])
    for done in range(101):
        now[0] += 0.12
        bar(done * MIB, 100 * MIB)
        lines(done * MIB, 100 * MIB)
    bar.close()
    lines.close()
    assert terminal.getvalue().count("\r") > 50 and terminal.getvalue().endswith("\x1b[K\n")
    assert "100% 100/100 MiB" in terminal.getvalue()
    assert 1 <= log.getvalue().count("\n") <= 3 and "\r" not in log.getvalue()
