"""Products with quantised weights as a model has them here, beside float16's and PyTorch's."""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels.quantized_matmul import mosaic_check
from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul, transposed_matmul
from glm_jax.model.gpu_layout import VARIABLE
from launch.suites.case import find_torch
from launch.suites.gpu_parts import (
    REPEATS,
    Result,
    Shapes,
    bits_of,
    copies_of,
    example_weight,
    interleaved,
    often,
    turns_of,
    words_of,
)
from launch.suites.tuned_products import all_of

Run = Callable[[], object]

_COMPILERS = 8  # programs that are compiled at once
_MAX_TORCH_ROWS = 128
_BACK = "_back"  # of forms that multiply with the transpose, as gradients do


def products(shapes: Shapes) -> Iterator[Result]:
    """Our products with weights in 4 and 8 bits beside XLA's in float16, and PyTorch's in 4; with
    the most rows, those with the transpose too."""
    pool = concurrent.futures.ThreadPoolExecutor(_COMPILERS)
    for rows in shapes.rows:
        forms = ["int4", "float16"] + ["int8"] * (rows in shapes.int8_rows)
        forms += ["int4_back", "float16_back"] * (rows == max(shapes.rows))
        jobs = [_Job(shapes, form, rows, *size) for size in shapes.products for form in forms]
        programs = {job: pool.submit(job.program) for job in jobs}
        # Compilers try programs on the device that the next lines time.
        concurrent.futures.wait(programs.values())
        for inputs, outputs in shapes.products:
            of_form = {form: _Job(shapes, form, rows, inputs, outputs) for form in forms}
            ways = {
                form: functools.partial(_run, job, programs[job]) for form, job in of_form.items()
            }
            if rows <= _MAX_TORCH_ROWS and _has_torch():
                ways["torch_int4"] = functools.partial(_torch_run, shapes, rows, inputs, outputs)
            runs: dict[str, Run] = {}
            counts: dict[str, int] = {}
            found: Result = {}
            for form, way in ways.items():
                try:
                    runs[form], counts[form] = way()
                except Exception as error:  # whatever a compiler or a library raises
                    found[f"{form}_error"] = words_of(error)
            taken = interleaved(runs)
            found |= {f"{form}_us": 1e6 * taken[form] / counts[form] for form in runs}
            yield {"inputs": inputs, "outputs": outputs, "rows": rows, "layout": layout()} | found


def _run(job: "_Job", program: concurrent.futures.Future[Any]) -> tuple[Run, int]:
    """Return what multiplies, having done so once; and how many products a call is."""
    run = functools.partial(program.result(), job.activations(), job.weights())
    jax.block_until_ready(run())
    return often(run), job.copies * job.turns * REPEATS


def layout() -> str:
    """Return the layout that a model's quantised weights have on this device."""
    is_stored = os.environ.get(VARIABLE) or not mosaic_check.is_for(jax.devices()[0])
    return "stored" if is_stored else "mosaic"


@dataclasses.dataclass(frozen=True)
class _Job:
    """Products of some rows with copies of a weight."""

    shapes: Shapes
    form: str
    rows: int
    inputs: int
    outputs: int

    @property
    def stored_as(self) -> str:
        return self.form.removesuffix(_BACK)

    @property
    def size(self) -> int:
        """Bytes of a copy."""
        return self.inputs * self.outputs * bits_of(self.stored_as) // 8

    @property
    def copies(self) -> int:
        return copies_of(self.shapes, self.size)

    @property
    def turns(self) -> int:
        return turns_of(self.rows, self.copies * self.size)

    def activations(self) -> list[jax.Array]:
        """All different: equal ones would be multiplied once."""
        columns = self.outputs if self.form.endswith(_BACK) else self.inputs
        fill = lambda turn: jnp.full((self.rows, columns), 0.1 + 0.01 * turn, jnp.float16)
        return [fill(turn) for turn in range(self.turns)]

    def weights(self) -> list[Any]:
        return _weights(self.stored_as, self.inputs, self.outputs, self.copies)

    def program(self) -> Any:
        """Return a compiled product of all activations with all weights."""
        weight = jax.eval_shape(lambda: _weight(self.stored_as, self.inputs, self.outputs, 0))
        x = jax.eval_shape(self.activations)
        products: dict[str, Any] = {
            "float16": jnp.matmul,
            "float16_back": lambda x, weight: jnp.matmul(x, weight.T),
            "int4_back": transposed_matmul,
        }
        run = all_of(products.get(self.form, quantized_matmul))
        return run.lower(x, [weight] * self.copies).compile()


@functools.cache
def _weights(form: str, inputs: int, outputs: int, count: int) -> list[Any]:
    """Return copies of a weight, all different; kept, since every number of rows needs them."""
    return [_weight(form, inputs, outputs, seed) for seed in range(count)]


def _weight(form: str, inputs: int, outputs: int, seed: int) -> Any:
    weight = example_weight(form, inputs, outputs, seed)
    is_laid_out = form != "float16" and layout() == "mosaic"
    return prepare(weight, layout="mosaic") if is_laid_out else weight


@functools.cache
def _torch_weights(inputs: int, outputs: int, count: int) -> Any:
    torch = find_torch()
    weights = []
    for _ in range(count):
        packed = torch.randint(0, 255, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(inputs // 128, outputs, 2, dtype=torch.bfloat16, device="cuda")
        weights.append((torch.ops.aten._convert_weight_to_int4pack(packed, 8), scales))
    return weights


def _has_torch() -> bool:
    torch = find_torch()
    return torch is not None and torch.cuda.is_available()


def _torch_run(shapes: Shapes, rows: int, inputs: int, outputs: int) -> tuple[Run, int]:
    """`_run` of PyTorch's (tinygemm, groups of 128)."""
    torch = find_torch()
    count = copies_of(shapes, inputs * outputs // 2)
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
    weights = _torch_weights(inputs, outputs, count)

    def run() -> None:
        for packed, scales in weights * REPEATS:
            torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)
        torch.cuda.synchronize()

    run()
    return run, count * REPEATS
