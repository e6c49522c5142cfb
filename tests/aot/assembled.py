"""What the assembler makes of a Mosaic kernel's PTX."""

import dataclasses
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from aot.compiling import PTXAS, compile_for

_PTX_VERSION = "8.6"
_made: dict[tuple[str, str, str], str] = {}  # a process compiles a kernel once


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A kernel's PTX after ptxas.

    Attributes:
      registers: of a thread.
      is_serialized: whether wgmma instructions wait for each other.
      loops: instructions of each loop; None where nothing disassembles the binary
        (pip install nvidia-cuda-nvdisasm).
    """

    registers: int
    spilled_bytes: int
    is_serialized: bool
    loops: list[list[str]] | None

    def main_loop(self, instruction: str) -> list[str] | None:
        """The smallest loop that has an instruction; None where nothing disassembles."""
        if self.loops is None:
            return None
        return min((loop for loop in self.loops if count(loop, instruction)), key=len)

    def outer_loop(self, instruction: str) -> list[str] | None:
        """The smallest of the loops that have most of an instruction."""
        if self.loops is None:
            return None
        return min(self.loops, key=lambda loop: (-count(loop, instruction), len(loop)))


def ptx_of(capfd: Any, gpu: str, function: Any, *arguments: Any) -> str:
    """PTX of the Mosaic kernel in a function that is compiled for a GPU.

    Args:
      capfd: pytest's; MOSAIC_GPU_DUMP_PTX has it written to the standard output.
    """
    key = gpu, str(function), str(arguments)
    if key not in _made:
        capfd.readouterr()
        compile_for(gpu, function, *arguments)
        _made[key] = printed_kernels(capfd)[0]
    return _made[key]


def printed_kernels(capfd: Any) -> list[str]:
    """PTX of the kernels that were compiled since the output was last read."""
    texts = capfd.readouterr().out.split(".version")[1:]
    # XLA may have found a newer ptxas, which knows a newer version; nothing of it is used.
    head = lambda text: re.sub(r"^ [\d.]+", f".version {_PTX_VERSION}", text)
    return [head(text[: text.rindex("}") + 1]) for text in texts]


def assemble(ptx: str, folder: Path, architecture: str = "sm_90a") -> Assembled:
    """Assemble a kernel's PTX, and take its binary apart."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [PTXAS, "-v", f"-arch={architecture}", source, "-o", binary]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    used = re.search(r"Used (\d+) registers", log)
    assert used
    return Assembled(int(used[1]), max(spills), "serialized" in log, _loops(binary))


def _loops(binary: Path) -> list[list[str]] | None:
    """The instructions of each loop of a GPU's binary; None where nothing disassembles it."""
    wheels = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/nvdisasm")
    tool = shutil.which("nvdisasm") or next(wheels, None)
    if tool is None:
        return None
    command = [tool, "-c", binary]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    code: list[str] = []
    found = []
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if label := re.fullmatch(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif line.endswith(";"):
            code.append(line)
            jump = re.search(r"BRA .*\((\.L_x_\d+)\)", line)
            if jump and jump[1] in labels:
                found.append(code[labels[jump[1]] :])
    return found


def count(loop: list[str], instruction: str) -> int:
    return sum(instruction in line for line in loop)
