"""The sampler's kernels draw the CPU sampler's tokens, by Triton's interpreter, and compile for Hopper.

Not seen by the interpreter: the compiler. It keeps float operations apart (`enable_fp_fusion=False`), and the kernels
use no library's functions, so that a GPU has the interpreter's bits.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sm90 import compile_for_sm90

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("sampler_cases.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the CUDA kernels stay unchecked"
)


def cases() -> list[str]:
    """The names in the script's `CASES`, which cannot be imported here: it needs Triton to interpret."""
    body = ast.parse(SCRIPT.read_text()).body
    found = next(
        node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES"
    )
    return [name.id for name in ast.walk(found) if isinstance(name, ast.Name)]


@pytest.fixture(scope="module")
def said() -> str:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("case", cases())
def test_by_the_interpreter(case: str, said: str) -> None:
    assert f"{case}: holds" in said, said.partition(case)[2][:3000]


KERNELS = {  # name: (warps, most registers of a thread)
    "note": (4, 64),
    "count": (4, 64),
    "shape": (8, 128),
    "choose": (16, 128),
    "draw": (8, 128),
    "finish": (1, 64),
}
LONGS = ("behind_ptr", "best_ptr", "drawn_ptr", "mass_ptr", "proposals_ptr", "spare_ptr", "token_ids_ptr", "inputs_ptr")
FLOATS = (
    "logits_ptr", "scores_ptr", "maxima_ptr", "raw_ptr", "log_mass_ptr", "drafts_ptr", "draft_mass_ptr", "kept_ptr",
    "raw_best_ptr",
)  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_hopper_at_the_vocabulary_of_llama_3(name: str) -> None:
    from serve.text.sampling import kernels, launcher
    from serve.text.sampling.threshold import choose

    kernel = choose if name == "choose" else getattr(kernels, name)
    num_blocks = -(-128_256 // launcher.BLOCK)
    num_groups = num_blocks * launcher.BLOCK // launcher.GROUP
    constants: dict[str, Any] = {
        "vocab": 128_256, "block": launcher.BLOCK, "group": launcher.GROUP, "num_blocks": num_blocks,
        "blocks": 32, "num_groups": num_groups, "groups": 4096, "listed": launcher.LISTED,
        "lanes": launcher.LANES, "has_proposals": False, "keeps_scores": False,
    }  # fmt: skip
    pointers = dict.fromkeys(LONGS, "*i64") | dict.fromkeys(FLOATS, "*fp32") | {"masks_ptr": "*u8"}
    numbers = {argument: "*i32" if argument.endswith("_ptr") else "i32" for argument in kernel.arg_names}
    arguments = {argument: (numbers | pointers | constants)[argument] for argument in kernel.arg_names}
    num_warps, most_registers = KERNELS[name]
    usage = compile_for_sm90(kernel, arguments, num_warps=num_warps, enable_fp_fusion=False)
    assert usage.spills == 0 and usage.registers <= most_registers, usage
