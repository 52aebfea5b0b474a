"""The GPU script where there is no GPU: it says so, and what it would run there runs here."""

from __future__ import annotations

import pytest
import torch

from loadtest import gpu, gpu_correctness
from loadtest.device_limits import DeviceLimits
from loadtest.workload import Prompt

torch.set_num_threads(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_fails(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize("family", gpu_correctness.FAMILIES)
def test_the_correctness_check_accepts_the_cpu_as_its_own_equal(tmp_path, family):
    folder = gpu_correctness.write_checkpoint(tmp_path, family)
    expected = gpu_correctness.generate(folder, "cpu", gpu_correctness.PROMPTS)
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for setting in gpu_correctness.SETTINGS.values():
        tokens = gpu_correctness.generate(folder, "cpu", gpu_correctness.PROMPTS, **setting)
        assert gpu_correctness.share_changed(tokens, expected) == 0.0


def test_rates_are_shares_of_the_limits(tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(gpu.Work, "_time", lambda self, generate, size, num_prompt, num_output: float(num_output))
    folder = gpu._write_config(tmp_path / "model")
    work = gpu.Work(folder, DeviceLimits("none", 1e12, 1e15), [4], 512)
    work.measure("fake", lambda prompts: [[]] * len(prompts), lambda **row: rows.append(row), "")
    prefill, decode = rows[0], rows[-1]
    parameters = 16 * (2048 * 64 * 80 + 3 * 2048 * 8192) + 2048 * 128_256
    assert decode["tok_s"] == pytest.approx(4)
    cache = 4 * (512 + 32) * 2 * 16 * 8 * 64 * 2
    assert decode["share_of_bandwidth"] == pytest.approx((2 * parameters + cache) / 1e12)
    assert prefill["tok_s"] == prefill["tokens"] == 128
    assert 0 < prefill["share_of_matmul_rate"] < 1


def test_prompts_have_the_sizes_asked_for(tmp_path):
    work = gpu.Work(gpu._write_config(tmp_path / "model"), DeviceLimits("none", 1.0, 1.0), [1], 8)
    prompts = work._prompts(3, 17, 5)
    assert [(len(prompt.token_ids), prompt.num_output) for prompt in prompts] == [(17, 5)] * 3
    assert isinstance(prompts[0], Prompt)
