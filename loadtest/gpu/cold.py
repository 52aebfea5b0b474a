"""From the start of a process to the first token of the 8 B shape, in fresh processes, with the time of each stage.

Three kinds of starts: with no compiled kernel anywhere, with those of an earlier start on disk, and the same with
weights read from safetensors files that are in the page cache, as after a restart on the same machine. The first two
make their weights on the device.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from loadtest.gpu.bench import Bench
from loadtest.gpu.shapes import TextShape
from loadtest.gpu.text import free
from models.registry import NATIVE
from models.text.decoder import Decoder
from models.weights import fill_dummy

_ROOT = Path(__file__).resolve().parents[2]
_FILE_BYTES = 4 << 30


def run(bench: Bench) -> None:
    shape = TextShape.of(is_rehearsal=bench.is_rehearsal)
    with tempfile.TemporaryDirectory() as scratch:
        folder = shape.write(Path(scratch) / "model")
        kernels = Path(scratch) / "kernels"
        starts = ("no compiled kernels", *["kernels compiled before"] * (0 if bench.is_rehearsal else 2))
        for start in starts:
            if bench.has_time(start, 0 if bench.is_rehearsal else 15):
                _start(bench, folder, kernels, start, "dummy")
        needed = shape.geometry.num_parameters * shape.geometry.bytes_per_weight
        if shutil.disk_usage(scratch).free < 1.5 * needed:
            bench.note("a start from files: the disk has no room for them")
        elif bench.has_time("a start from files", 0 if bench.is_rehearsal else 40):
            write_weights(folder, shape, bench.device)
            free()
            _start(bench, folder, kernels, "weights from cached files", "auto")


def write_weights(folder: Path, shape: TextShape, device: torch.device) -> None:
    """Random ones beside the config in `folder`, in files of some gigabytes and an index."""
    architecture = NATIVE[shape.config["architectures"][0]](shape.config)
    model = Decoder(architecture, dtype=architecture.spec.dtype, device=device, num_positions=16)
    fill_dummy(model.parameters())
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1}.safetensors"
        save_file({key: tensor.clone() for key, tensor in part.items()}, folder / name)
        weight_map.update(dict.fromkeys(part, name))
        part.clear()

    for key, tensor in model.parameters().items():
        if sum(held.nbytes for held in part.values()) > _FILE_BYTES:
            flush()
        part[key] = tensor
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _start(bench: Bench, folder: Path, kernels: Path, start: str, load_format: str) -> None:
    """One process, one row."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(kernels),
    }
    command = [sys.executable, "-m", "loadtest.gpu.first_token", str(folder), load_format, bench.device.type]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=max(5.0, bench.left_s), check=True
        )
    except subprocess.TimeoutExpired:
        bench.note(f"{start}: no token when its seconds were over")
        return
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{start}: the process failed: {error.stderr[-400:]}") from error
    stages = json.loads(done.stdout.splitlines()[-1])
    bench.row("cold", start=start, first_token_s=sum(stages.values()), **{f"{n}_s": s for n, s in stages.items()})
