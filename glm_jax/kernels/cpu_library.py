"""Kernels in C++ that XLA calls on CPU (`jax.ffi`), built by setup.py where a compiler is."""

import ctypes
import dataclasses
import functools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels.dispatch import unmet
from glm_jax.sharding import surrounding_mesh

NOT_BUILT = "its library is not built: install the package where a C++ compiler is"
MAX_VECTOR_BITS = 512  # of vectors that kernels may use; tests ask for less
_LANES = 16
# Below, as in decode steps, XLA fuses rows with what is beside them at no less speed.
_FEW_NUMBERS = 2**15


@dataclasses.dataclass(frozen=True)
class _CPUKernel:
    """A backend in C++.

    Attributes:
      max_vector_bits: of vectors to use (512, 256 or less), for tests.
    """

    max_vector_bits: int = MAX_VECTOR_BITS
    name: str = "cpu"
    platform: str = "cpu"


class AttentionKernel(_CPUKernel):
    """What the kernels of both attention ops have in common as backends."""

    def unmet(
        self, softmax_dtype: str, head_dim: int, *requirements: tuple[bool, str]
    ) -> str | None:
        """Return what the kernel takes, by the first requirement that is not met.

        Args:
          requirements: the op's own; see `dispatch.unmet`.
        """
        return unmet(
            (softmax_dtype == "float32", "a softmax in float32"),
            (head_dim % _LANES == 0, f"heads of a multiple of {_LANES} numbers"),
            *requirements,
            (surrounding_mesh() is None, "one device, no mesh"),
        )


class RowKernel(_CPUKernel):
    """What kernels for many rows of float32 have in common as backends."""

    def unmet_rows(self, x: Any, *parameters: Any) -> str | None:
        """Return what the kernel takes, by the first requirement that is not met.

        Args:
          x: float [..., width].
          parameters: the op's other arrays.
        """
        arrays = (x, *parameters)
        return unmet(
            (all(array.dtype == jnp.float32 for array in arrays), "float32"),
            (x.shape[-1] % _LANES == 0, f"rows of a multiple of {_LANES} numbers"),
            (math.prod(x.shape) >= _FEW_NUMBERS, f"{_FEW_NUMBERS} numbers or more"),
            (surrounding_mesh() is None, "one device, no mesh"),
        )


@functools.cache
def register(library: Path, *targets: str) -> bool:
    """Make a library's handlers known to XLA.

    A jaxlib takes libraries that were built for its own version of XLA's foreign function
    interface or an earlier one, which their names say: the newest that it takes is loaded.

    Args:
      library: path without the version and ending.
      targets: XLA's names for the handlers, such as "glm_jax_geglu_forward" for the library's
        GlmJaxGegluForward.

    Returns:
      Whether it could; warns once where no library was built that this jaxlib takes.
    """
    built = list(library.parent.glob(f"{library.name}_ffi*.so"))
    # Not by trying: some versions of jaxlib refuse a library later, with all of the backend.
    loadable = [path for path in built if _interface(path) <= _own_interface()]
    reason = f"{', '.join(path.name for path in built)} is for another jaxlib"
    try:
        if loadable:
            loaded = ctypes.CDLL(str(max(loadable, key=_interface)))
            for target in targets:
                handler = loaded[target.title().replace("_", "")]
                jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
            return True
    except OSError as error:
        reason = str(error)
    warnings.warn(
        f"no CPU kernel {library.name} ({reason if built else 'not built'}): computing will be "
        "slow here; install the package again, where a C++ compiler is",
        stacklevel=3,
    )
    return False


def _interface(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.stem.rpartition("_ffi")[2].split("_")))


@functools.cache
def _own_interface() -> tuple[int, ...]:
    """Return the version of the interface that this jaxlib has."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    numbers = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)
    return tuple(map(int, numbers))
