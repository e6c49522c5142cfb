"""Whether the kernels that are checked before their use are right on this GPU."""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax

from glm_jax.kernels import self_check, target
from glm_jax.kernels.attention import mosaic_check as attention_check
from glm_jax.kernels.quantized_matmul import mosaic_check
from glm_jax.kernels.quantized_matmul.mosaic_check import Kind
from launch.suites.gpu_parts import Result

ATTENTION = "attention in bfloat16"
RUNNING = "it has not ended"
_SECONDS = 75.0  # of a check: less than a run would wait
_INT4 = Kind(4, 4096, 4096, "float16", False)  # as the 130B's whole rows are checked


def checks() -> Iterator[Result]:
    """All at once, so that a kernel that never ends costs the time of one: first that each runs,
    then what is wrong with it. The following parts, and other commands, do not check again what
    passed."""
    tried = _checks(jax.devices()[0])
    for name in tried:
        yield {"check": name, "fault": RUNNING}
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = {pool.submit(check): name for name, check in tried.items()}
        for done in concurrent.futures.as_completed(running):
            taken = round(time.monotonic() - began, 1)
            yield {"check": running[done], "fault": done.result(), "seconds": taken}


def _checks(device: jax.Device) -> dict[str, Callable[[], str | None]]:
    tried: dict[str, Callable[[], str | None]] = {}
    if mosaic_check.is_for(device):
        for kind in (_INT4, dataclasses.replace(_INT4, bits=8)):
            name = f"products in {kind.bits} bits"
            tried[name] = _check(mosaic_check.__name__, mosaic_check.described([kind]))
        if target.has_wgmma(device):
            tried[ATTENTION] = _check(attention_check.__name__, "bfloat16,128")
    return tried


def _check(module: str, argument: str) -> Callable[[], str | None]:
    return functools.partial(self_check.check_apart, module, argument, seconds=_SECONDS)
