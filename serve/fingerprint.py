"""What decides which tokens and pixels a replica computes, as a short text.

Replicas of a model whose texts are equal may go on where another stopped; of a request that was begun on other weights
or another config they would make a mixture. The text holds the options that can change an output, the version of this
package, and the model's files: small ones whole, of large ones their length and a sample, so that hundreds of gigabytes
cost a few thousand reads. A sample is taken from the middle of every tensor of a safetensors file, for training changes
nearly every value of what it changes. Devices and libraries are not part of it: replicas on unlike ones differ in the
last bits, not in the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serve.options import ModelOptions

NEUTRAL = frozenset(
    {
        "served_model_name", "threads", "num_replicas", "autoscaling_config", "num_cpus", "num_gpus",
        "accelerator_type", "max_surge_percent", "max_num_batched_tokens", "max_num_waiting", "max_num_seqs",
        "max_num_images", "step_timeout_s", "canary_period_s", "block_size", "enable_prefix_caching",
        "gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager", "chat_template", "tool_call_parser",
        "reasoning_parser", "slo_ttft_s", "slo_tpot_s", "slo_image_s",
    }
)  # fmt: skip
"""Options that place, bound or measure: outputs do not depend on how they are batched. What is not listed counts."""

WHOLE_BYTES = 1 << 20
"""Files up to this size are read whole: configs, tokenizers, small weights."""
SAMPLE_BYTES = 4096
NUM_SAMPLES = 256
"""Of a large file whose tensors cannot be told apart."""
MAX_HEADER_BYTES = 100 << 20
"""Of a safetensors file, by its format."""


def fingerprint(options: ModelOptions, folder: Path) -> str:
    """32 hexadecimal digits. Reads files; raises OSError."""
    kept = {key: value for key, value in dataclasses.asdict(options).items() if key not in NEUTRAL | {"model"}}
    digest = sha256(json.dumps([_package(), kept], sort_keys=True, default=str).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith((".", "__")) for part in name.split("/")):
            continue  # caches
        digest.update(f"\0{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            for part in _parts(file.fileno(), path.stat().st_size, is_safetensors=path.suffix == ".safetensors"):
                digest.update(part)
    return digest.hexdigest()[:32]


def _parts(file: int, size: int, *, is_safetensors: bool) -> Iterator[bytes]:
    if size <= WHOLE_BYTES:
        yield os.pread(file, size, 0)
        return
    for start, end in _ranges(file, size, is_safetensors):
        yield os.pread(file, SAMPLE_BYTES, (start + end) // 2)


def _ranges(file: int, size: int, is_safetensors: bool) -> list[tuple[int, int]]:
    """Where the tensors are; for other files, and where the header is none, equal parts."""
    header_size = int.from_bytes(os.pread(file, 8, 0), "little")
    if is_safetensors and header_size <= min(size, MAX_HEADER_BYTES):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # who loads it will say so
            header = json.loads(os.pread(file, header_size, 8))
            offsets = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
            return [(8 + header_size + start, 8 + header_size + end) for start, end in offsets]
    step = size // NUM_SAMPLES
    return [(start, start + step) for start in range(0, step * NUM_SAMPLES, step)]


def _package() -> str:
    try:
        return version("tandem-serve")
    except PackageNotFoundError:  # a bare checkout
        return ""
