"""The engine on quantised matrices: the same tokens in any batch, and what is refused before it starts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from quantized_folders import quantized_folder
from tiny import tiny_folder

from serve.errors import ConfigError
from serve.options import ModelOptions, check_kind
from serve.request import SamplingParams
from serve.text.build import build_engine
from serve.text.sequence import Sequence

torch.set_num_threads(1)
SHAPE = {"hidden_size": 128, "intermediate_size": 256}
PROMPTS = [[7, 30, 2, 99, 41, 41, 8, 5], [1, 2, 3], [*range(40, 80), 5, 6], [200], [*range(100, 131)], [11, 12] * 9]
BLOCK_BYTES = 2 * 2 * 16 * 2 * 32 * 4
names = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "qwen3", **SHAPE)


def answers(model: Path, prompts: list[list[int]], **values) -> list[list[int]]:
    """Sampled, 16 tokens each, all submitted at once."""
    options = ModelOptions(
        model=str(model), threads=1, kv_cache_memory_bytes=60 * BLOCK_BYTES, **{"max_num_seqs": 8, **values}
    )
    engine, _ = build_engine(options, progress=False)
    streams = []
    for prompt in prompts:
        sampling = SamplingParams(max_tokens=16, temperature=0.8, seed=sum(prompt), ignore_eos=True)
        job = Sequence(id=f"s{next(names)}", token_ids=list(prompt), num_prompt=len(prompt), sampling=sampling)
        streams.append(engine.submit(job))
    while engine.step():
        pass
    return [[token for update in stream.take() for token in update.token_ids] for stream in streams]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_tokens_do_not_depend_on_the_batch(folder: Path, quantization: str) -> None:
    """Alone, together, and in chunks that no prompt fits."""
    together = answers(folder, PROMPTS, quantization=quantization)
    alone = answers(folder, PROMPTS, quantization=quantization, max_num_seqs=1)
    chunked = answers(folder, PROMPTS, quantization=quantization, max_num_seqs=8, max_num_batched_tokens=8)
    assert all(len(tokens) == 16 for tokens in together)
    assert together == alone == chunked
    assert together != answers(folder, PROMPTS), "int8 and int4 are other models"


def test_a_quantised_checkpoint_needs_no_option(folder: Path, tmp_path: Path) -> None:
    quantized, dequantized = quantized_folder(folder, "packed int4 with zero points", tmp_path)
    assert answers(quantized, PROMPTS[:3]) == answers(dequantized, PROMPTS[:3])
    assert answers(quantized, PROMPTS[:1], quantization="int4") == answers(quantized, PROMPTS[:1])
    with pytest.raises(ConfigError, match="quantization is 'int8', but the checkpoint is quantised already, as int4"):
        answers(quantized, [], quantization="int8")


def test_what_no_kernel_computes_is_refused_with_what_does(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantization is 'fp8', but device is 'cpu'"):
        ModelOptions(model="m", device="cpu", quantization="fp8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="quantization is 'fp8', which a CPU has no kernel for; use 'int8' or 'i"):
            answers(folder, [], quantization="fp8")
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM, whose layers are run by transformers and not quantised"):
        answers(tiny_folder(tmp_path, "gemma2"), [], quantization="int8")
    with pytest.raises(ValueError, match="quantization is an option of text models"):
        check_kind(ModelOptions(model="m", quantization="int8"), "image")
