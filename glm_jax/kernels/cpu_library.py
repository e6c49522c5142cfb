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

    Returns:
      Whether it could; says so once, by a warning, where the library was not built.
    """
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        warnings.warn(
            f"the CPU kernel {library.name} is not built ({error}): computing will be slow "
            "here; install the package where a C++ compiler is",
            stacklevel=3,
        )
        return False
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(loaded[symbol]), platform="cpu")
    return True
