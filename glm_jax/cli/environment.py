"""Describe the machine for a bug report: versions, devices, memory, libraries."""

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

import glm_jax
from glm_jax.errors import UserError
from glm_jax.sharding import make_mesh, parse_mesh

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "libtpu",
    "tokamax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "grain",
    "numpy",
    "ml_dtypes",
    "sentencepiece",
    "safetensors",
    "fastapi",
    "uvicorn",
    "lm_eval",
)
# Only these environment variables are shown: others may be secret.
_VARIABLES = ("JAX_", "XLA_", "GLM_JAX_", "CUDA_VISIBLE_DEVICES", "LIBTPU_", "SLURM_NTASKS")


def version() -> str:
    """Return the version of this package; "not installed" in a bare checkout."""
    return package_version("glm_jax") or "not installed"


def package_version(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def report(mesh: str | None) -> Iterator[str]:
    """Yield lines that describe this machine, which may be broken: an error is a line, too.

    Args:
      mesh: sizes of data,fsdp,tensor to try; all devices along tensor by default.
    """
    yield f"glm_jax: {version()}, {Path(glm_jax.__file__).parent}"
    yield f"python: {platform.python_version()}, {platform.platform()}"
    for name in _PACKAGES:
        yield f"{name}: {package_version(name) or 'not installed'}"
    yield from _devices(mesh)
    yield f"memory: {_host_memory()}, {os.cpu_count()} processors"
    yield from _libraries()
    yield f"compiled programs: {jax.config.values['jax_compilation_cache_dir']}"
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            yield f"{name}={value}"


def _devices(mesh: str | None) -> Iterator[str]:
    try:
        devices = jax.devices()
    except Exception as error:  # whatever a driver that does not fit raises
        yield f"devices: none, {type(error).__name__}: {' '.join(str(error).split())}"
        return
    first = devices[0]
    yield f"devices: {len(devices)} x {first.device_kind} ({first.platform})"
    yield f"backend: {' '.join(first.client.platform_version.split())}"
    statistics = first.memory_stats() or {}
    if "bytes_limit" in statistics:
        used, limit = (statistics[name] / 2**30 for name in ("bytes_in_use", "bytes_limit"))
        yield f"device memory: {used:.1f} of {limit:.1f} GiB used on the first"
    try:
        made = make_mesh((1, 1, -1)) if mesh is None else parse_mesh(mesh)
    except UserError as error:
        yield f"mesh: {error}"
        return
    sizes = ", ".join(f"{axis} {size}" for axis, size in made.shape.items())
    yield f"mesh: {sizes}"


def _host_memory() -> str:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return f"{page * free / 2**30:.1f} of {page * pages / 2**30:.1f} GiB free"


def _libraries() -> Iterator[str]:
    """Yield the kernels' shared libraries, and whether they load."""
    folder = Path(glm_jax.__file__).parent / "kernels"
    libraries = sorted(folder.glob("*/*.so"))
    for path in libraries:
        try:
            ctypes.CDLL(str(path))
            state = "loads"
        except OSError as error:
            state = f"does not load: {error}"
        yield f"kernels' library: {path.relative_to(folder)} {state}"
    if not libraries:
        yield "kernels' library: none built (no C++ compiler at installation?): slow on CPUs"
