"""Plans: does a job fit on some hardware, and how fast can it be at best.

The job's own programs are compiled for devices that are not here (`topology`); the compiler says
what memory they need and which collectives they run, and the roofline turns that into time.
"""

import dataclasses
import math
import time
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.errors import UserError
from glm_jax.model.flops import block_flops, logit_flops, training_flops
from glm_jax.model.params import GLMParams
from glm_jax.model.streamed_layers import DEVICE_MEMORY, device_bytes
from glm_jax.planning import topology
from glm_jax.planning.collectives import Collective, find_collectives, traffic
from glm_jax.planning.engine_programs import (
    abstract_cache,
    abstract_params,
    lower_engine,
    lower_scoring,
)
from glm_jax.planning.roofline import Roofline, Work, roofline
from glm_jax.planning.training_programs import Memory, described_state, lower_train_step, memory
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.state import takes_layers_apart

JOBS = ("decode", "prefill", "evaluate", "train")
PRECISIONS = ("float16", "bfloat16", "int8", "int4")


class PlanError(UserError):
    """A job that cannot be planned; the message says why."""


class CompilerError(UserError):
    """The compiler that all plans of a platform need is not installed."""


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """A job to plan.

    Attributes:
      job: one of `JOBS`.
      precision: one of `PRECISIONS`, or a quantisation scheme; see `Scheme.parse`. Of the
        weights; with quantised ones the job computes in float16 or bfloat16. In training the
        compute dtype, or the precision of the weights beside adapters.
      mesh: sizes of data, fsdp and tensor.
      batch: requests that decode together, or rows.
      length: tokens of each.
      cache: dtype of keys and values, None for the compute dtype.
      recipe: of training, None for other jobs.
      accumulation: micro-batches of `batch` rows in a train step.
      weight_memory_limit: GiB of weights on a device, in decode and prefill; blocks beyond it
        are streamed from hosts' memory.
    """

    model: GLMConfig
    job: str
    precision: str
    mesh: tuple[int, int, int]
    batch: int
    length: int
    cache: str | None = None
    recipe: Recipe | None = None
    accumulation: int = 1
    weight_memory_limit: float | None = None

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.mesh)

    @property
    def has_adapter(self) -> bool:
        """True where adapters are trained beside a frozen model."""
        return self.recipe is not None and self.recipe.adapter is not None

    @property
    def offloads(self) -> bool:
        """True where moments, or what the backward pass needs, are in hosts' memory."""
        recipe = self.recipe
        return recipe is not None and (recipe.offload_moments or recipe.remat == "offload")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, work and least time of one device.

    Attributes:
      weights, cache, optimizer, other, temporaries: bytes on a device; `other` is of all other
        arguments and outputs.
      streamed: bytes in the host's memory for a device: of weights, or in training of moments and
        of what the backward pass needs.
      room: bytes of a device's memory.
      collectives: of a step.
      work: of a device in a step.
      lowering, compiling: seconds that these took here; `decode` and `prefill` are lowered
        together.
    """

    weights: int
    cache: int
    optimizer: int
    other: int
    temporaries: int
    streamed: int
    room: int
    collectives: tuple[Collective, ...]
    work: Work
    roofline: Roofline
    lowering: float = 0.0
    compiling: float = 0.0

    @property
    def total(self) -> int:
        """Bytes of a device's memory that the job needs."""
        return self.weights + self.cache + self.optimizer + self.other + self.temporaries

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def check_hardware(name: str, hardware: ConfigDict) -> None:
    """Raise PlanError for a number of a hardware file that is not above 0 and finite."""
    for field, value in hardware.items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise PlanError(
                f"configs/hardware/{name}.py: {field}={value}: expected a number above 0"
            )


def make_plan(request: PlanRequest, hardware: ConfigDict) -> Plan:
    """Compile a job's program and measure it.

    Args:
      hardware: of a file of `configs/hardware`.

    Raises:
      CompilerError: the platform's compiler is not installed.
      PlanError: the compiler refuses the program, or the request is contradictory.
    """
    hosts = -(-request.devices // topology.devices_per_host(hardware))
    try:
        devices = topology.devices(hardware, request.devices, hosts)
    except RuntimeError as error:
        raise CompilerError(
            f"{hardware.device_kind}: its compiler is not here ({_first_line(error)}): "
            "make .venv-aot/.aot VENV=.venv-aot, or pip install 'glm_jax[aot]'"
        ) from error
    except ValueError as error:
        raise PlanError(f"{hardware.device_kind}: {_first_line(error)}") from error
    mesh = make_mesh(request.mesh, devices)
    quantization = request.precision if request.precision.startswith("int") else None
    dtype = request.precision if quantization is None else _compute_dtype(hardware)
    model = request.model.replace(compute_dtype=dtype, cache_dtype=request.cache)
    limited = request.weight_memory_limit is not None
    if limited and request.job not in ("decode", "prefill"):
        raise PlanError(f"weight_memory_limit is for decode and prefill, not {request.job}")
    if (limited or request.offloads) and "host_bandwidth" not in hardware:
        raise PlanError(f"{hardware.device_kind}: its file says no host_bandwidth")
    if quantization is not None and request.job == "train" and not request.has_adapter:
        raise PlanError("integers are not trained: give adapter.rank, or a float precision")
    if request.job != "train":  # there param_dtype is the experiment's
        model = model.replace(param_dtype=dtype)
    began = time.monotonic()
    lowered = _lower(request, model, mesh, quantization)
    reached = time.monotonic()
    try:
        compiled = lowered.compile()
    except RuntimeError as error:  # XlaRuntimeError: no memory, mostly
        raise PlanError(f"{hardware.device_kind}: {_first_line(error)}") from error
    ended = time.monotonic()
    plan = _measure(request, model, mesh, quantization, compiled, hardware)
    return dataclasses.replace(plan, lowering=reached - began, compiling=ended - reached)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _compute_dtype(hardware: ConfigDict) -> str:
    """Return bfloat16 for TPUs and for GPUs of compute capability 8.0 or more, else float16."""
    if hardware.platform == "tpu" or hardware.compute_capability >= 8.0:
        return "bfloat16"
    return "float16"


def _lower(request: PlanRequest, model: GLMConfig, mesh: Mesh, quantization: str | None) -> Any:
    if request.job in ("decode", "prefill"):
        lowered = lower_engine(
            model,
            mesh,
            quantization,
            slots=request.batch,
            prefill_width=request.length,
            max_length=request.length,
            weight_memory_limit=request.weight_memory_limit,
        )
        return lowered["step" if request.job == "decode" else "prefill"]
    if request.job == "evaluate":
        rows, length = request.batch, request.length
        return lower_scoring(model, mesh, quantization, rows=rows, length=length)
    assert request.recipe is not None
    return lower_train_step(
        model,
        request.recipe,
        mesh,
        accumulation=request.accumulation,
        micro_batch=request.batch,
        sequence_length=request.length,
        frozen=_frozen(request, model, mesh, quantization),
    )


def _frozen(
    request: PlanRequest, model: GLMConfig, mesh: Mesh, quantization: str | None
) -> GLMParams | None:
    """Describe the model beside adapters, its floats in the compute dtype."""
    if not request.has_adapter:
        return None
    cast = model.replace(param_dtype=model.activation_dtype)
    is_stacked = not takes_layers_apart(model, mesh)
    return abstract_params(cast, mesh, quantization, is_stacked=is_stacked)


def _measure(
    request: PlanRequest,
    model: GLMConfig,
    mesh: Mesh,
    quantization: str | None,
    compiled: Any,
    hardware: ConfigDict,
) -> Plan:
    needed: Memory = memory(compiled)
    collectives = find_collectives(compiled.as_text(), model.num_layers)
    cache = optimizer = streamed = 0
    if request.job == "train":
        assert request.recipe is not None
        state = described_state(model, request.recipe, mesh)
        frozen = _frozen(request, model, mesh, quantization)
        weights = device_bytes((frozen, state.params))
        optimizer = device_bytes(state.opt_state)
        streamed = _host_bytes(state.opt_state) + needed.on_host
    else:
        limit = request.weight_memory_limit
        params = abstract_params(model, mesh, quantization, limit)
        weights = device_bytes(params)
        streamed = _host_bytes(params)
    weights_read = weights if request.job == "train" else weights + streamed
    if request.job in ("decode", "prefill"):
        cache = device_bytes(abstract_cache(model, mesh, request.batch, request.length)[0])
    arguments = needed.arguments + needed.outputs - needed.reused
    sent = traffic(collectives, request.devices, topology.devices_per_host(hardware))
    if sent.network and "network_bandwidth" not in hardware:
        raise PlanError(f"{hardware.device_kind}: its file says no network_bandwidth")
    work = Work(
        flops=_flops(request, model) / request.devices,
        memory_bytes=_memory_bytes(request, weights_read, cache, optimizer),
        link_bytes=float(sent.link),
        network_bytes=float(sent.network),
        host_bytes=float(_copied_bytes(request, streamed, needed.on_host)),
    )
    return Plan(
        weights=weights,
        cache=cache,
        optimizer=optimizer,
        other=max(0, arguments - weights - cache - optimizer),
        temporaries=needed.temporaries,
        streamed=streamed,
        room=hardware.memory_bytes,
        collectives=tuple(collectives),
        work=work,
        roofline=roofline(work, hardware),
    )


def _host_bytes(tree: Any) -> int:
    """Return the bytes in the host's memory for one device."""
    on_device = topology.in_memory(tree, DEVICE_MEMORY)
    return device_bytes(on_device) - device_bytes(tree)


def _copied_bytes(request: PlanRequest, streamed: int, activations: int) -> int:
    """Return the bytes that a device and its host exchange: in training both ways, activations
    once for each micro-batch."""
    if request.job != "train":
        return streamed
    return 2 * (streamed + (request.accumulation - 1) * activations)


def _flops(request: PlanRequest, model: GLMConfig) -> float:
    """Count the operations of a step's matrix products on all devices, recomputed ones twice."""
    # A prefill has a row for each group of devices that has slots of its own.
    rows = math.prod(request.mesh[:2]) if request.job == "prefill" else request.batch
    tokens = rows if request.job == "decode" else rows * request.length
    if request.job == "prefill":
        return block_flops(model, tokens, request.length)
    if request.job != "train":
        return block_flops(model, tokens, request.length) + logit_flops(model, tokens)
    assert request.recipe is not None
    return request.accumulation * training_flops(
        model, tokens, request.length, request.has_adapter, request.recipe.remat
    )


def _memory_bytes(request: PlanRequest, weights: int, cache: int, optimizer: int) -> float:
    """Return the bytes read and written at least: weights once for each pass, the whole cache,
    and the optimiser's state twice."""
    if request.job != "train":
        return float(weights + cache)
    return 3.0 * request.accumulation * weights + 2.0 * (weights + optimizer)
