"""On a CUDA device: the same tokens as on CPU, memory as promised, steps that overlap."""

from __future__ import annotations

import pytest
import torch

from loadtest.gpu import correct
from serve.errors import ConfigError
from serve.options import ModelOptions
from serve.text.build import build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: tokens on CUDA, asynchronous steps and cache sizing by memory remain unchecked",
    ),
]


@pytest.fixture(scope="module", params=correct.FAMILIES)
def folder(request, tmp_path_factory):
    return correct.write_checkpoint(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def expected(folder):
    return correct.generate(folder, "cpu", correct.PROMPTS)


@pytest.mark.parametrize("setting", correct.SETTINGS)
def test_float32_tokens_are_those_of_the_cpu(folder, expected, setting):
    values = correct.SETTINGS[setting]
    assert correct.generate(folder, "cuda", correct.PROMPTS, **values) == expected


def test_graphs_change_no_token(folder, expected):
    assert correct.generate(folder, "cuda", correct.PROMPTS, enforce_eager=True) == expected


def test_noise_has_the_same_bits_as_on_cpu():
    assert correct.noise_bits_agree(torch.device("cuda"))


def test_the_cache_stays_within_its_share_of_the_memory(folder):
    free, total = torch.cuda.mem_get_info()
    used_before = total - free
    engine, card = build_engine(
        ModelOptions(model=str(folder), device="cuda", gpu_memory_utilization=0.5), progress=False
    )
    free, _ = torch.cuda.mem_get_info()
    assert total - free <= max(0.5 * total, used_before) + (256 << 20)
    assert card.kv_cache_tokens > 10_000 and card.dtype == "bfloat16"
    engine.close()


def test_a_share_that_is_used_up_is_a_config_error(folder):
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        build_engine(ModelOptions(model=str(folder), device="cuda", gpu_memory_utilization=0.01), progress=False)
