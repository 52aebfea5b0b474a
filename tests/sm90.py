"""Compile a Triton kernel for Hopper (sm_90) where there is no such device, and read what the assembler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one program (thread block)."""

    registers: int
    """Per thread."""
    spills: int
    """Bytes per thread, stored and loaded."""
    shared: int
    """Bytes, of shared memory."""


def compile_for_sm90(
    kernel: Any, arguments: dict[str, Any], *, num_warps: int = 4, num_stages: int = 3, enable_fp_fusion: bool = True
) -> Usage:
    """`arguments`: for each of the kernel's, in order, a type ("*bf16", "i32", "fp32") or a constexpr's value.

    Pointers and 32-bit integers are taken to be multiples of 16, as the launcher finds most of them to be.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_type = {name: isinstance(value, str) for name, value in arguments.items()}
    signature = {name: value if is_type[name] else "constexpr" for name, value in arguments.items()}
    assert list(signature) == list(kernel.arg_names), f"the arguments of {kernel.__name__} are {kernel.arg_names}"
    source = ASTSource(
        kernel,
        signature,
        constexprs={name: value for name, value in arguments.items() if not is_type[name]},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind == "i32" or kind.startswith("*")
        },
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return _assemble(compiled.asm["ptx"], int(compiled.metadata.shared))


def _assemble(ptx: str, shared: int) -> Usage:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return Usage(
        int(registers[1]), sum(int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)), shared
    )
