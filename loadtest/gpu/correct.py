"""Is what the engines compute on CUDA right? Tokens beside those of the CPU engine on small random models, pictures
likewise (`pictures.py`), and how stable both are.

In float32 both devices round differently but rarely change a token of such a model; in bfloat16 the same request may
give other tokens in another batch, because default kernels round by shape. The share that changes is measured, not
promised.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loadtest.gpu import pictures
from loadtest.gpu.bench import Bench, WrongResult
from loadtest.image_peers import NO_DIFFUSERS, diffusers_version
from models.registry import NATIVE
from models.text.decoder import Decoder
from models.weights import fill_dummy
from serve.options import ModelOptions
from serve.request import SamplingParams
from serve.text.build import build_engine
from serve.text.sampling.gumbel import GumbelNoise, row_key
from serve.text.sequence import Sequence

VOCAB = 512
BLOCK = 16
_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "head_dim": 64, "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "tie_word_embeddings": True},
}
FAMILIES = tuple(_SHAPES)
_SHARED = list(range(100, 180))
PROMPTS = [
    [7, 30, 2, 99, 41, 41, 8, 5],
    [*_SHARED, 5, 6, 7],
    [200],
    [*_SHARED, 9, 8],
    [(37 * i) % VOCAB for i in range(300)],
    [*_SHARED, 5, 6, 7],
    [11, 12] * 9,
    [(11 * i + 3) % VOCAB for i in range(129)],
]
SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "small chunks": {"max_num_seqs": 8, "max_num_batched_tokens": 48},
    "little memory": {"max_num_seqs": 8, "max_num_batched_tokens": 128, "num_blocks": 32},
}


def run(bench: Bench) -> None:
    """The part. Raises WrongResult when something differs that must not."""
    wrong = [] if noise_bits_agree(bench.device) else ["the noise of sampling"]
    bench.row("correct", what="bits of the noise", model="", differs=float(bool(wrong)))
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES[: 1 if bench.is_rehearsal else None]:
            wrong += _check_text(bench, Path(scratch) / family, family)
        if diffusers_version() is None:
            bench.note(NO_DIFFUSERS)
        elif bench.has_time("pictures", 0 if bench.is_rehearsal else 15):
            wrong += pictures.check(bench, Path(scratch))
    if wrong:
        raise WrongResult(f"not as on the CPU: {', '.join(wrong)}")


def _check_text(bench: Bench, folder: Path, family: str) -> list[str]:
    """What is wrong with this family."""
    write_checkpoint(folder, family)
    device, wrong = bench.device.type, []
    expected = generate(folder, "cpu", PROMPTS)
    for name, setting in list(SETTINGS.items())[-1 if bench.is_rehearsal else 0 :]:
        if not bench.has_time(f"{family}, {name}", 0 if bench.is_rehearsal else 6):
            continue
        differs = share_changed(generate(folder, device, PROMPTS, **setting), expected)
        bench.row("correct", what=f"float32 tokens, {name}", model=family, differs=differs)
        if differs:
            wrong.append(f"tokens of {family}, {name}")
    for dtype in ("float32",) if bench.is_rehearsal else ("float32", "bfloat16"):
        if bench.has_time(f"{family}, stability in {dtype}", 0 if bench.is_rehearsal else 6):
            number = 4 if bench.is_rehearsal else 32
            differs = share_changed_by_batching(folder, device, dtype, num_requests=number)
            bench.row("stable", what=f"{dtype} tokens, alone and in a batch", model=family, differs=differs)
    return wrong


def write_checkpoint(folder: Path, family: str) -> Path:
    """A four-layer random model with weights large enough that its logits differ clearly."""
    config = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "torch_dtype": "float32",
        "eos_token_id": 0,
        **_SHAPES[family],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = Decoder(
        NATIVE[config["architectures"][0]](config),
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_positions=config["max_position_embeddings"],
    )
    fill_dummy(model.parameters())
    save_file(
        {
            name: tensor.clone() if name.endswith("norm.weight") else tensor * 4
            for name, tensor in model.parameters().items()
        },
        folder / "model.safetensors",
    )
    return folder


def generate(
    folder: Path, device: str, prompts: list[list[int]], *, dtype: str = "float32", num_blocks: int = 400, **values: Any
) -> list[list[int]]:
    """Tokens of all prompts, submitted together: even ones greedy, odd ones sampled, 32 each."""
    settings = {"max_num_seqs": 64, **values}
    block_bytes = 2 * 4 * BLOCK * 2 * json.loads((folder / "config.json").read_text())["head_dim"]
    options = ModelOptions(
        model=str(folder),
        device=device,  # type: ignore[arg-type]
        threads=1,  # enough for these models, and quick on a busy machine
        dtype=dtype,  # type: ignore[arg-type]
        block_size=BLOCK,
        kv_cache_memory_bytes=num_blocks * block_bytes * (4 if dtype == "float32" else 2),
        **settings,
    )
    engine, _ = build_engine(options, progress=False)
    streams = [engine.submit(sequence(i, prompt)) for i, prompt in enumerate(prompts)]
    while engine.step():
        pass
    return [[token for update in stream.take() for token in update.token_ids] for stream in streams]


def sequence(number: int, prompt: list[int]) -> Sequence:
    """A request of `generate`."""
    sampling = SamplingParams(max_tokens=32, temperature=float(number % 2), top_p=0.95, seed=number, ignore_eos=True)
    return Sequence(id=f"request-{number}", token_ids=list(prompt), num_prompt=len(prompt), sampling=sampling)


def noise_bits_agree(device: torch.device) -> bool:
    """The noise of sampling is the same integers there as on the CPU."""
    keys = [row_key(seed, 3 * seed) for seed in range(64)]
    ours, theirs = (GumbelNoise(50_000, kind).bits(keys).cpu() for kind in (torch.device("cpu"), device))
    return torch.equal(ours, theirs)


def share_changed(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of requests with at least one other token."""
    return sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def share_changed_by_batching(folder: Path, device: str, dtype: str, *, num_requests: int = 32) -> float:
    """Requests whose tokens in one batch are not those they have alone."""
    prompts = [PROMPTS[i % len(PROMPTS)][: 5 + 7 * i] for i in range(num_requests)]
    together = generate(folder, device, prompts, dtype=dtype, num_blocks=2000)
    alone = generate(folder, device, prompts, dtype=dtype, num_blocks=2000, max_num_seqs=1)
    return share_changed(together, alone)
