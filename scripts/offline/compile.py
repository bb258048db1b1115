"""Compile a kernel for a GPU that is not here, as a launch there would.

Uses `triton.compile` with an explicit target; no driver is loaded. Resources and machine code are
read with the cuobjdump and nvdisasm that Triton's wheel brings, and from the AMD assembly itself.
"""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Triton 3.10 changes the default: set it, so that figures stay comparable.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Nobody debugs these; the code is the same without, and compiles faster.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """registers: per thread. spilled: bytes of memory per thread. shared: bytes. assembly: SASS or
    AMD assembly."""

    registers: int
    spilled: int
    shared: int
    assembly: str


def compile_for(
    arch: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    options: dict[str, int],
    disassemble: bool = True,
) -> Compiled:
    """Compile for "sm89" or "gfx1100". types: Triton type of each run-time argument; pointers and
    the arguments in `divisible` are multiples of 16, as the launcher would find them. options:
    num_warps, num_stages, maxnreg. Without `disassemble`, NVIDIA's assembly stays empty."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in divisible or signature[n].startswith("*")
    }
    fixed = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    done = triton.compile(source, target=_target(arch), options=options)
    if arch.startswith("gfx"):
        return _amd(done)
    return _nvidia(done, disassemble)


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)


def _amd(done: Any) -> Compiled:
    text = done.asm["amdgcn"]

    def field(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)))

    # Scalar registers that spill go to lanes of vector registers first, which takes no memory.
    spilled = field("private_segment_fixed_size")
    return Compiled(field("vgpr_count"), spilled, done.metadata.shared, text)


def _nvidia(done: Any, disassemble: bool) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-ndf", file.name) if disassemble else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(registers, stack + local, done.metadata.shared, sass)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout
