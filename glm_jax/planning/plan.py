"""A job on some hardware: does it fit, and how fast can it be at best.

The job's own programs are compiled for devices that are not here; see `topology`.
"""

import dataclasses
import math
import time
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.errors import UserError
from glm_jax.model.params import GLMParams
from glm_jax.model.streamed_layers import DEVICE_MEMORY, device_bytes
from glm_jax.planning import topology
from glm_jax.planning.collectives import Exchange, exchanges, sent
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

JOBS = ("decode", "prefill", "evaluate", "train")
PRECISIONS = ("float16", "bfloat16", "int8", "int4")


class PlanError(UserError):
    """A job that cannot be planned; the message says why."""


class CompilerError(UserError):
    """The compiler that all plans of a platform need is not installed."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
      job: one of `JOBS`.
      precision: of the weights; quantised ones are computed with in float16 or bfloat16. Of
        training that of computing, and of the weights beside adapters.
      mesh: sizes of data, fsdp and tensor.
      batch: requests that decode together, or rows.
      length: tokens of each, the model's positions by default.
      cache: dtype of keys and values, that of computing by default.
      recipe: of training.
      accumulation: micro-batches of `batch` rows to a train step.
      weight_memory_limit: GiB of weights a device, in decode and prefill; blocks beyond it
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
        return math.prod(self.mesh)

    @property
    def has_adapter(self) -> bool:
        return self.recipe is not None and self.recipe.adapter is not None

    @property
    def offloads(self) -> bool:
        """Whether moments wait on hosts."""
        return self.recipe is not None and self.recipe.offload_moments


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a device holds and does.

    Attributes:
      weights, cache, optimizer, other, temporaries: bytes a device; `other` is what else goes
        in and out.
      streamed: bytes a device that wait in its host's memory: of weights, in training of
        moments.
      room: bytes that a device has.
      exchanges: those of a step.
      work: a step's, of a device.
      lowering, compiling: seconds that the compiler took here, of `decode` and `prefill` the
        lowering of both.
    """

    weights: int
    cache: int
    optimizer: int
    other: int
    temporaries: int
    streamed: int
    room: int
    exchanges: tuple[Exchange, ...]
    work: Work
    roofline: Roofline
    lowering: float = 0.0
    compiling: float = 0.0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.optimizer + self.other + self.temporaries

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def make_plan(question: Question, hardware: ConfigDict) -> Plan:
    """Compiles a job's program and measures it.

    Raises:
      CompilerError: the platform's compiler is not installed.
      PlanError: it refuses the program, or the question makes no sense.
    """
    hosts = -(-question.devices // topology.devices_a_host(hardware))
    try:
        devices = topology.devices(hardware, question.devices, hosts)
    except RuntimeError as error:
        raise CompilerError(
            f"{hardware.device_kind}: its compiler is not here ({_first_line(error)}): "
            "make .venv-aot/.aot VENV=.venv-aot, or pip install 'glm_jax[aot]'"
        ) from error
    except ValueError as error:
        raise PlanError(f"{hardware.device_kind}: {_first_line(error)}") from error
    mesh = make_mesh(question.mesh, devices)
    quantization = question.precision if question.precision.startswith("int") else None
    dtype = question.precision if quantization is None else _compute_dtype(hardware)
    model = question.model.replace(compute_dtype=dtype, cache_dtype=question.cache)
    limited = question.weight_memory_limit is not None
    if limited and question.job not in ("decode", "prefill"):
        raise PlanError(f"weight_memory_limit is for decode and prefill, not {question.job}")
    if (limited or question.offloads) and "host_bandwidth" not in hardware:
        raise PlanError(f"{hardware.device_kind}: its file says no host_bandwidth")
    if quantization is not None and question.job == "train" and not question.has_adapter:
        raise PlanError("integers are not trained: give adapter.rank, or a float precision")
    if question.job != "train":  # which keeps what is trained as its config says
        model = model.replace(param_dtype=dtype)
    began = time.monotonic()
    lowered = _lower(question, model, mesh, quantization)
    reached = time.monotonic()
    try:
        compiled = lowered.compile()
    except RuntimeError as error:  # XlaRuntimeError: no memory, mostly
        raise PlanError(f"{hardware.device_kind}: {_first_line(error)}") from error
    ended = time.monotonic()
    plan = _measure(question, model, mesh, quantization, compiled, hardware)
    return dataclasses.replace(plan, lowering=reached - began, compiling=ended - reached)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _compute_dtype(hardware: ConfigDict) -> str:
    """bfloat16 where there is any: TPUs, and GPUs from compute capability 8.0 on."""
    if hardware.platform == "tpu" or hardware.compute_capability >= 8.0:
        return "bfloat16"
    return "float16"


def _lower(question: Question, model: GLMConfig, mesh: Mesh, quantization: str | None) -> Any:
    if question.job in ("decode", "prefill"):
        lowered = lower_engine(
            model,
            mesh,
            quantization,
            slots=question.batch,
            prefill_width=question.length,
            max_length=question.length,
            weight_memory_limit=question.weight_memory_limit,
        )
        return lowered["step" if question.job == "decode" else "prefill"]
    if question.job == "evaluate":
        rows, length = question.batch, question.length
        return lower_scoring(model, mesh, quantization, rows=rows, length=length)
    assert question.recipe is not None
    return lower_train_step(
        model,
        question.recipe,
        mesh,
        accumulation=question.accumulation,
        micro_batch=question.batch,
        sequence_length=question.length,
        frozen=_frozen(question, model, mesh, quantization),
    )


def _frozen(
    question: Question, model: GLMConfig, mesh: Mesh, quantization: str | None
) -> GLMParams | None:
    """The model beside adapters, its floats in what is computed with."""
    if not question.has_adapter:
        return None
    held = model.replace(param_dtype=model.activation_dtype)
    return abstract_params(held, mesh, quantization)


def _measure(
    question: Question,
    model: GLMConfig,
    mesh: Mesh,
    quantization: str | None,
    compiled: Any,
    hardware: ConfigDict,
) -> Plan:
    taken: Memory = memory(compiled)
    found = exchanges(compiled.as_text(), model.num_layers)
    cache = optimizer = streamed = 0
    if question.job == "train":
        assert question.recipe is not None
        state = described_state(model, question.recipe, mesh)
        frozen = _frozen(question, model, mesh, quantization)
        weights = device_bytes((frozen, state.params))
        optimizer = device_bytes(state.opt_state)
        streamed = _host_bytes(state.opt_state)
    else:
        limit = question.weight_memory_limit
        params = abstract_params(model, mesh, quantization, limit)
        weights = device_bytes(params)
        streamed = _host_bytes(params)
    weights_read = weights if question.job == "train" else weights + streamed
    if question.job in ("decode", "prefill"):
        cache = device_bytes(abstract_cache(model, mesh, question.batch, question.length)[0])
    arguments = taken.arguments + taken.outputs - taken.reused
    ways = sent(found, question.devices, topology.devices_a_host(hardware))
    if ways.network and "network_bandwidth" not in hardware:
        raise PlanError(f"{hardware.device_kind}: its file says no network_bandwidth")
    work = Work(
        flops=_flops(question, model) / question.devices,
        memory_bytes=_memory_bytes(question, weights_read, cache, optimizer),
        link_bytes=ways.link,
        network_bytes=ways.network,
        host_bytes=streamed * (2 if question.job == "train" else 1),  # and back
    )
    return Plan(
        weights=weights,
        cache=cache,
        optimizer=optimizer,
        other=max(0, arguments - weights - cache - optimizer),
        temporaries=taken.temporaries,
        streamed=streamed,
        room=hardware.memory_bytes,
        exchanges=tuple(found),
        work=work,
        roofline=roofline(work, hardware),
    )


def _host_bytes(tree: Any) -> int:
    """Bytes of a device's part of what waits in its host's memory."""
    everywhere = topology.in_memory(tree, DEVICE_MEMORY)
    return device_bytes(everywhere) - device_bytes(tree)


def _flops(question: Question, model: GLMConfig) -> float:
    """Of a step's matrix products, on all devices; backward passes are twice the forward one,
    and blocks that are computed again count again."""
    hidden, inner = model.hidden_size, model.inner_hidden_size
    # A prefill has a row for each group of devices that has slots of its own.
    rows = math.prod(question.mesh[:2]) if question.job == "prefill" else question.batch
    tokens = rows if question.job == "decode" else rows * question.length
    blocks = 2.0 * tokens * (4 * hidden**2 + 3 * hidden * inner) * model.num_layers
    blocks += 4.0 * tokens * question.length * hidden * model.num_layers
    scores = 2.0 * tokens * hidden * model.vocab_size
    if question.job == "prefill":
        return blocks
    if question.job != "train":
        return blocks + scores
    assert question.recipe is not None
    again = 0 if question.recipe.remat == "none" else 1
    passes = 2 if question.has_adapter else 3  # frozen weights have no gradients
    return question.accumulation * (blocks * (passes + again) + passes * scores)


def _memory_bytes(question: Question, weights: int, cache: int, optimizer: int) -> float:
    """What must be read and written at least: weights once a pass, all of the cache, and the
    optimiser's state twice."""
    if question.job != "train":
        return float(weights + cache)
    return 3.0 * question.accumulation * weights + 2.0 * (weights + optimizer)
