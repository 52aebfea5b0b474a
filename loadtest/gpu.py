"""Checks and measures a GPU: `python -m loadtest.gpu [--only text|images] [--model MODEL] [-o FILE]`.

One script for any machine with torch, transformers, safetensors, numpy and pillow; images need diffusers too and are
left out, with a sentence, where it is absent. Text: correctness against the CPU, then decode and prefill tokens/s
beside the measured bandwidth and matrix rate of the card, then transformers' continuous batching on the same shapes;
without `--model` that of a random 1.2 B Llama. Images: see `gpu_images.py`. Prints `RESULT {json}` lines; exit status 1
when something is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loadtest import gpu_correctness, gpu_images
from loadtest.device_limits import DeviceLimits, measure_limits
from loadtest.engine import offline
from loadtest.image_peers import NO_DIFFUSERS, diffusers_version
from loadtest.report import Report
from loadtest.workload import Generate, Prompt
from models.source import resolve
from serve.options import ModelOptions
from serve.text.build import build_engine

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""The geometry of Llama-3.2-1B."""
NUM_DECODED = 64
PREFILL_LENGTHS = (128, 512, 2048, 8192)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("text", "images"), help="leave the other out")
    parser.add_argument("--model", help="folder or hub id; default: a random 1.2 B Llama")
    parser.add_argument("-b", "--batch-sizes", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=512, help="prompt tokens of the decode measurements")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers and diffusers' own pipeline out")
    parser.add_argument("-o", "--out", help="append the lines to this file too")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} finds none, so there is nothing to check or to measure here")
        return 2
    report, is_right = Report(args.out), True
    with tempfile.TemporaryDirectory() as scratch:
        limits = measure_limits(torch.device("cuda"))
        report(
            kind="limits", device=limits.name, read_gb_s=limits.read_bytes_s / 1e9, tflop_s=limits.matmul_flop_s / 1e12
        )
        if args.only != "images":
            is_right &= check(Path(scratch), report)
            measure_text(args, Path(scratch), limits, report)
        if args.only != "text" and diffusers_version() is None:
            print(NO_DIFFUSERS)
        elif args.only != "text":
            is_right &= gpu_images.check_images(Path(scratch), report)
            gpu_images.measure_images(Path(scratch), limits, report, has_peer=not args.no_peer)
    print("everything is right" if is_right else "SOMETHING IS WRONG, see the lines with kind=correctness")
    return 0 if is_right else 1


def measure_text(args: argparse.Namespace, scratch: Path, limits: DeviceLimits, report: Report) -> None:
    """Speed rows of the engine, then of transformers."""
    folder = resolve(args.model) if args.model else _write_config(scratch / "llama-1b")
    work = Work(folder, limits, [int(size) for size in args.batch_sizes.split(",")], args.context)
    options = ModelOptions(
        model=str(folder),
        device="cuda",
        load_format="auto" if args.model else "dummy",
        enable_prefix_caching=False,
        max_num_seqs=max(256, *work.batch_sizes),
    )
    engine, card = build_engine(options)
    work.measure("tandem", offline(engine), report, f"{card.dtype} kv {card.kv_cache_tokens} tokens")
    del engine
    _free()
    if not args.no_peer:
        measure_transformers(work, report, is_random=not args.model)
        _free()


def check(scratch: Path, report: Report) -> bool:
    """Correctness rows; False when tokens differ where they must not."""
    is_right = gpu_correctness.noise_bits_agree()
    report(kind="correctness", what="noise bits equal the CPU's", ok=is_right)
    for family in gpu_correctness.FAMILIES:
        folder = gpu_correctness.write_checkpoint(scratch / family, family)
        expected = gpu_correctness.generate(folder, "cpu", gpu_correctness.PROMPTS)
        for name, setting in gpu_correctness.SETTINGS.items():
            tokens = gpu_correctness.generate(folder, "cuda", gpu_correctness.PROMPTS, **setting)
            changed = gpu_correctness.share_changed(tokens, expected)
            report(kind="correctness", what=f"float32 tokens of the CPU, {name}", model=family, changed=changed)
            is_right &= changed == 0.0
        for dtype in ("float32", "bfloat16"):
            changed = gpu_correctness.share_changed_by_batching(folder, "cuda", dtype)
            report(kind="stability", what=f"{dtype} requests changed by batching", model=family, changed=changed)
    return is_right


class Work:
    """What is measured, the same for us and for a peer, and how it relates to the card's limits."""

    def __init__(self, folder: Path, limits: DeviceLimits, batch_sizes: list[int], context: int):
        self.folder = folder
        self.batch_sizes = batch_sizes
        self._limits = limits
        self._context = context
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._vocab_size = config["vocab_size"]
        self._max_positions = config["max_position_embeddings"]
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config.get("num_key_value_heads") or heads
        per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
        self._matrix_parameters = layers * per_layer
        self._head_parameters = hidden * self._vocab_size
        self._kv_bytes = 2 * layers * kv_heads * head_dim * 2

    def measure(self, peer: str, generate: Generate, report: Report, config: str) -> None:
        generate(self._prompts(2, 32, 8))  # warm
        for length in PREFILL_LENGTHS:
            if length >= self._max_positions:
                continue
            wall_s = min(self._time(generate, 1, length, 1) for _ in range(3))
            flop = 2 * (self._matrix_parameters * length + self._head_parameters)
            report(
                kind="prefill",
                peer=peer,
                config=config,
                tokens=length,
                ttft_ms=1e3 * wall_s,
                tok_s=length / wall_s,
                share_of_matmul_rate=flop / wall_s / self._limits.matmul_flop_s,
            )
        for size in self.batch_sizes:
            prefill_s = min(self._time(generate, size, self._context, 1) for _ in range(2))
            whole_s = min(self._time(generate, size, self._context, 1 + NUM_DECODED) for _ in range(2))
            step_s = (whole_s - prefill_s) / NUM_DECODED
            read_bytes = 2 * (self._matrix_parameters + self._head_parameters)
            read_bytes += size * (self._context + NUM_DECODED // 2) * self._kv_bytes
            report(
                kind="decode",
                peer=peer,
                config=config,
                batch=size,
                context=self._context,
                step_ms=1e3 * step_s,
                tok_s=size / step_s,
                share_of_bandwidth=read_bytes / step_s / self._limits.read_bytes_s,
            )

    def _time(self, generate: Generate, size: int, num_prompt: int, num_output: int) -> float:
        prompts = self._prompts(size, num_prompt, num_output)
        torch.cuda.synchronize()
        started = time.perf_counter()
        generate(prompts)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def _prompts(self, size: int, num_prompt: int, num_output: int) -> list[Prompt]:
        ids = range(3, self._vocab_size)
        return [Prompt(random.choices(ids, k=num_prompt), num_output) for _ in range(size)]


def measure_transformers(work: Work, report: Report, *, is_random: bool, device: str = "cuda") -> None:
    """The same rows from transformers' continuous batching; one sentence when this version cannot run it."""
    try:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        config = AutoConfig.from_pretrained(work.folder)
        kwargs: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        with torch.device(device):
            if is_random:
                model = AutoModelForCausalLM.from_config(config, **kwargs)
            else:
                model = AutoModelForCausalLM.from_pretrained(work.folder, **kwargs)
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1 + NUM_DECODED)
        manager = model.eval().init_continuous_batching(
            generation_config=greedy, continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False)
        )
        manager.start()
    except Exception as error:
        print(f"transformers' continuous batching was not measured: {type(error).__name__}: {error}", file=sys.stderr)
        return

    def generate(prompts: list[Prompt]) -> list[list[int]]:
        order = [manager.add_request(p.token_ids, max_new_tokens=p.num_output, eos_token_id=-1) for p in prompts]
        done: dict[str, list[int]] = {}
        while len(done) < len(order):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                done[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("its generation thread stopped")
        return [done[request_id] for request_id in order]

    try:
        work.measure(f"transformers-{transformers.__version__}-cb", generate, report, "bfloat16 sdpa")
    except Exception as error:
        print(f"transformers' continuous batching failed: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        manager.stop(block=True, timeout=30)


def _write_config(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_1B), encoding="utf-8")
    return folder


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
