"""Which backends of an op a test runs here."""

import jax
import pytest

from glm_jax.kernels import target
from glm_jax.kernels.attention import cpu
from glm_jax.kernels.geglu import cpu as geglu_cpu
from glm_jax.kernels.layer_norm import cpu as layer_norm_cpu
from glm_jax.kernels.paged_attention import cpu as paged_cpu

NO_CPU_KERNEL = "the CPU kernel is not built: no C++ compiler at installation"


def why_not_here(backend):
    """Return why a backend cannot run on this machine, or None."""
    platform = target.platform()
    if backend.platform not in (None, platform):
        return f"{backend.name} runs on {backend.platform}, and this is {platform}"
    if backend.name == "mosaic" and jax.__version_info__ < (0, 11):
        return "Mosaic GPU is simulated from JAX 0.11 on"
    is_built = all(op.is_available() for op in (cpu, geglu_cpu, layer_norm_cpu, paged_cpu))
    return NO_CPU_KERNEL if backend.platform == "cpu" and not is_built else None


def pairs(backends, cases):
    """Parametrise a test by backend and by each case that it takes.

    Args:
      backends: by name; of one that cannot run here a skipped test says why.
      cases: functions that return a backend's arguments, by name.
    """
    params = []
    for name, backend in backends.items():
        if reason := why_not_here(backend):
            params.append(pytest.param(backend, None, marks=pytest.mark.skip(reason), id=name))
            continue
        taken = [case for case, make in cases.items() if backend.supports(make()) is None]
        params += [pytest.param(backend, cases[case], id=f"{name}-{case}") for case in taken]
    return pytest.mark.parametrize(("backend", "case"), params)
