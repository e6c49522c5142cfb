"""What the compile checks share."""

import dataclasses
import importlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from aot.dumping import DUMP
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from glm_jax.planning import topology
from glm_jax.planning.collectives import by_kind, parse_collectives
from glm_jax.quantization import QuantizedArray

PTXAS = Path(sysconfig.get_paths()["purelib"]) / "nvidia/cuda_nvcc/bin/ptxas"


def hardware(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.hardware.{name}").get_config()


def compile_for(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles `function` for one device of a kind; arguments are (shape, dtype) pairs, or
    trees of `jax.ShapeDtypeStruct`."""
    shutil.rmtree(DUMP, ignore_errors=True)
    devices = topology.devices(hardware(name))
    mesh = Mesh(devices, ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    with topology.compiling_for(mesh):
        return jax.jit(function).lower(*jax.tree.map(place, arguments)).compile()


def abstract_weight(inputs, outputs, group_size, bits, dtype="float16"):
    """A weight [inputs, outputs] that does not exist."""
    return QuantizedArray(
        values=jax.ShapeDtypeStruct((inputs * bits // 8, outputs), jnp.int8),
        scales=jax.ShapeDtypeStruct((inputs // group_size, outputs), dtype),
        bits=bits,
        contraction_axis=-2,
    )


@dataclasses.dataclass(frozen=True)
class Assembly:
    """What the last compilation's GPU kernels of a name came to."""

    matrix_instructions: int
    asynchronous_copies: int
    spilled_bytes: int
    registers: int


def assembly(kernel: str, capability: float) -> Assembly:
    """Counts instructions in the PTX that was dumped, and asks the assembler about spills."""
    files = [f for f in DUMP.glob("*.ptx") if kernel in f.read_text()]
    assert files, f"no PTX holds {kernel}"
    found = []
    for file in files:
        text = file.read_text()
        architecture = f"sm_{round(10 * capability)}" + ("a" if capability == 9.0 else "")
        command = [PTXAS, "-v", f"-arch={architecture}", file, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        # Of the kernel alone: XLA's own, such as the sum over splits, stand beside it.
        part = told[told.index(f"Compiling entry function '{kernel}") :]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", part)[:2]]
        used = re.search(r"Used (\d+) registers", part)
        assert used is not None
        found.append(
            Assembly(
                matrix_instructions=len(re.findall(r"wgmma\.mma|mma\.sync", text)),
                asynchronous_copies=text.count("cp.async.c"),
                spilled_bytes=max(spills),
                registers=int(used[1]),
            )
        )
    assert len(found) == 1
    return found[0]


def collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    """How many of each kind stand in a program's text, and bytes of their results on a device."""
    return by_kind(parse_collectives(compiled.as_text().splitlines()))
