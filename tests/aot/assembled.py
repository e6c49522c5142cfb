"""What the assembler makes of a Mosaic kernel's PTX."""

import re
import subprocess
from pathlib import Path
from typing import Any

from aot.compiling import PTXAS, compile_for, loops

_PTX_VERSION = "8.6"
_made: dict[tuple[str, str, str], str] = {}  # a process compiles a kernel once


def ptx_of(capfd: Any, gpu: str, function: Any, *arguments: Any) -> str:
    """PTX of the Mosaic kernel in a function that is compiled for a GPU.

    Args:
      capfd: pytest's; MOSAIC_GPU_DUMP_PTX has it written to the standard output.
    """
    key = gpu, str(function), str(arguments)
    if key in _made:
        return _made[key]
    capfd.readouterr()
    compile_for(gpu, function, *arguments)
    written = capfd.readouterr().out
    ptx = written[written.index(".version") : written.rindex("}") + 1]
    # XLA may have found a newer ptxas, which knows a newer version; nothing of it is used.
    _made[key] = re.sub(r"^\.version [\d.]+", f".version {_PTX_VERSION}", ptx)
    return _made[key]


def assemble(ptx: str, architecture: str, folder: Path) -> tuple[str, Path]:
    """What the assembler says, and its binary."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [PTXAS, "-v", f"-arch={architecture}", source, "-o", binary]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return log, binary


def smallest_loop(binary: Path, instruction: str) -> list[str] | None:
    """The instructions of the smallest loop that has one of a kind; None where nothing
    disassembles."""
    found = loops(binary)
    if found is None:
        return None
    return min((loop for loop in found if count(loop, instruction)), key=len)


def count(loop: list[str], instruction: str) -> int:
    return sum(instruction in line for line in loop)
