"""Kernels in C++ that XLA calls on CPU (`jax.ffi`), built by setup.py where a compiler is."""

import ctypes
import functools
import warnings
from pathlib import Path

import jax

WIDEST = 512  # bits of the widest vectors that kernels may use; tests ask for less


@functools.cache
def register(library: Path, symbol: str, target: str) -> bool:
    """Makes a library's handler known to XLA under the name `target`.

    A jaxlib takes libraries that were built for its own version of XLA's foreign function
    interface or an earlier one, which their names say: the newest that it takes is loaded.

    Args:
      library: path without the version and ending.

    Returns:
      Whether it could; warns once where no library was built that this jaxlib takes.
    """
    built = sorted(library.parent.glob(f"{library.name}_ffi*.so"), key=_interface, reverse=True)
    refusals = ["not built"] if not built else []
    for path in built:
        try:
            handler = jax.ffi.pycapsule(ctypes.CDLL(str(path))[symbol])
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
            return True
        except (OSError, jax.errors.JaxRuntimeError) as error:
            refusals.append(f"{path.name}: {error}")
    warnings.warn(
        f"no CPU kernel {library.name} ({'; '.join(refusals)}): computing will be slow here; "
        "install the package again, where a C++ compiler is",
        stacklevel=3,
    )
    return False


def _interface(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.stem.rpartition("_ffi")[2].split("_")))
