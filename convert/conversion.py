"""Convert shards to a model folder, layer by layer.

Memory stays at a layer, and a conversion that was interrupted goes on with the missing layers.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import shutil
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from convert.errors import ConvertError, SourceError
from convert.numbers import cast
from convert.quantizing import quantized_kernel
from convert.sat_reader import SatCheckpoint
from glm_jax import files
from glm_jax.checkpoints import parameter_files
from glm_jax.checkpoints.array_reader import aligned_empty
from glm_jax.checkpoints.folder_kinds import CONFIG_FILE
from glm_jax.checkpoints.model_folder import describe_model
from glm_jax.cli.environment import version
from glm_jax.config import GLMConfig
from glm_jax.errors import UserError, is_no_room
from glm_jax.model import params as glm_params
from glm_jax.model.params import KERNEL_AXES, LINEAR_NAMES, LayerParams, LinearParams
from glm_jax.progress import progress_bar
from glm_jax.quantization import Scheme, WeightFormat
from glm_jax.sharding import make_mesh, parameter_sharding
from glm_jax.tokenizer import Tokenizer

# Arrays are stored in this many pieces along the tensor axis. Each device of a mesh that has as
# many devices along it, or a divisor, reads only its own bytes.
PIECES = 16
PROVENANCE_FILE = "provenance.json"
_PLAN_FILE = "conversion.json"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names in malloc.h


@dataclasses.dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
      num_heads: None to take it from the shards.
      dtype: of float arrays; None for the stored one.
      quantization: of float kernels; see `Scheme.parse`.
      allow_non_finite: accept NaN and infinite weights; they are reported in any case.
      allow_differing_copies: use the first shard's copy of a tensor that every shard has whole
        where copies differ; differences are reported in any case.
      is_checked: compare tensors with the files' checksums.
      process_id, num_processes: this process converts every num_processes-th part.
    """

    num_heads: int | None = None
    max_sequence_length: int = 2048
    dtype: str | None = None
    quantization: str | None = None
    allow_non_finite: bool = False
    allow_differing_copies: bool = False
    is_checked: bool = True
    process_id: int = 0
    num_processes: int = 1


def keep_freed_memory() -> None:
    """Tell the C library to reuse freed memory, which the system would clear if it got it back.

    All copies that are written together are as large as the model.
    """
    with contextlib.suppress(OSError, AttributeError):  # of other C libraries
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, -1)


def convert_shards(
    source: epath.PathLike,
    output: Path,
    options: Options = Options(),
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a model folder, which is named OUTPUT.partial until it is whole.

    Raises:
      ConvertError: the input is not a whole released checkpoint; nothing is left behind.
      SourceError: the input's disk or network fails; converted parts stay.
      OutputError: the output folder is not empty, or cannot be written.
    """
    files.refuse_non_empty(output)
    if options.quantization is not None:
        Scheme.parse(options.quantization)
    allowed = options.allow_differing_copies
    checkpoint = SatCheckpoint(source, options.is_checked, options.dtype, allowed)
    config = checkpoint.config(options.num_heads, options.max_sequence_length)
    if tokenizer is not None:
        config = config.replace(special_tokens=tokenizer.special_tokens)
    if options.dtype is not None:
        config = config.replace(param_dtype=options.dtype, compute_dtype=options.dtype)
    checkpoint.check(config)
    if options.quantization is not None and checkpoint.bits(config) is not None:
        raise ConvertError(
            f"{source} is quantised to int{checkpoint.bits(config)} already: leave out "
            "--quantization"
        )
    if options.dtype is None and (count := checkpoint.cast_count(config)):
        print(f"{count} tensors are cast to {config.param_dtype}, the embedding's dtype")
        options = dataclasses.replace(options, dtype=config.param_dtype)
    conversion = _Conversion(checkpoint, config, options, output)
    with files.explained(output.resolve()):
        conversion.open(_plan(checkpoint, config, options))
        try:
            conversion.write_parts()
        except files.OutputError as error:
            raise _no_room(conversion.partial, str(error)) from error
        except SourceError:
            raise
        except UserError:
            shutil.rmtree(conversion.partial, ignore_errors=True)
            raise
        except Exception as error:
            if is_no_room(error):
                raise _no_room(conversion.partial, str(error)[:200]) from error
            raise
        conversion.finish(() if tokenizer is None else tokenizer.files)


def _no_room(partial: Path, why: str) -> ConvertError:
    return ConvertError(
        f"no room for {partial} ({why}): what is converted stays; make room and give the same "
        "command again"
    )


def _plan(checkpoint: SatCheckpoint, config: GLMConfig, options: Options) -> dict[str, Any]:
    """Describe what is converted and how; another plan makes another model."""
    return {
        "tool": f"glm_jax {version()}",
        "sources": [
            {"name": shard.name, "bytes": shard.size, "entries_crc32": shard.checksum}
            for shard in checkpoint.shards
        ],
        "dtype": options.dtype or config.param_dtype,
        "quantization": options.quantization,
        "config": json.loads(config.to_json()),
    }


class _Conversion:
    def __init__(
        self, checkpoint: SatCheckpoint, config: GLMConfig, options: Options, output: Path
    ):
        self._checkpoint, self._config = checkpoint, config
        self._options, self._output = options, output.resolve()
        self.partial = self._output.with_name(self._output.name + ".partial")
        self._folder = self.partial / parameter_files.PARAMS_FOLDER
        self._stored = _stored_format(checkpoint, config, options)
        self._mesh = _storage_mesh(config, self._stored)
        self._buffers = [_Buffers(), _Buffers()]

    def open(self, plan: dict[str, Any]) -> None:
        """Make the folder, or take over what an earlier run of the same plan left."""
        if self.partial.exists() and self._plan_on_disk() is None:
            shutil.rmtree(self.partial)  # not left by a conversion
        if not self.partial.exists():
            # Made beside and renamed: of several processes one makes it, with its plan.
            beside = self.partial.with_name(f"{self.partial.name}.{os.getpid()}")
            text = json.dumps(plan, indent=1)
            try:
                (beside / parameter_files.PARAMS_FOLDER).mkdir(parents=True)
                files.write_text(beside / _PLAN_FILE, text)
                files.put_in_place(beside, self.partial)
            except OSError:
                if self._plan_on_disk() is None:  # or another process was first
                    raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        if self._plan_on_disk() != plan:
            raise ConvertError(
                f"{self.partial} holds a conversion of another source or with other options: "
                "remove it, or give those again"
            )
        self._check_room()

    def _plan_on_disk(self) -> Any:
        """Read the plan of the conversion in the folder, also of one that is nearly done."""
        for name in (_PLAN_FILE, PROVENANCE_FILE):
            with contextlib.suppress(FileNotFoundError, ValueError):
                return json.loads((self.partial / name).read_text(encoding="utf-8"))
        return None

    def _check_room(self) -> None:
        """Raise ConvertError before anything is written if the disk is too small."""
        count = glm_params.parameter_count(self._config)
        needed = count * self._stored.bits / 8
        written = _bytes_below(self._folder)
        if missing := files.missing_room(self.partial, int(needed) - written):
            raise _no_room(self.partial, missing)

    def _names(self) -> list[str]:
        layers = [parameter_files.layers_part(i, i + 1) for i in range(self._config.num_layers)]
        return [parameter_files.EMBEDDING, *layers]

    def _own_names(self) -> list[str]:
        return self._names()[self._options.process_id :: self._options.num_processes]

    def _is_whole(self, name: str) -> bool:
        """Return whether a part is on disk and undamaged, which reads it."""
        try:
            parameter_files.read_whole_part(self._folder, name)
        except UserError:
            return False
        return True

    def write_parts(self) -> None:
        """Write the missing parts; each is read while the one before is written."""
        own = self._own_names()
        with futures.ThreadPoolExecutor(1) as writer:
            writing: futures.Future[None] | None = None
            for name in progress_bar(own, desc="converting", unit="part"):
                if self._is_whole(name):
                    continue
                parameter_files.remove_unfinished(self._folder, name)
                tree = self._embedding() if name == parameter_files.EMBEDDING else self._layer(name)
                self._refuse_non_finite()
                if writing is not None:
                    writing.result()
                writing = writer.submit(parameter_files.write_part, self._folder, name, tree)
                del tree
            if writing is not None:
                writing.result()

    def _refuse_non_finite(self) -> None:
        found = self._checkpoint.non_finite
        if found and not self._options.allow_non_finite:
            counted = ", ".join(f"{count} in {name}" for name, count in list(found.items())[:5])
            raise ConvertError(
                f"the weights hold numbers that are NaN or infinite: {counted}: fetch the files "
                "again, or take them with --allow_non_finite"
            )

    def _embedding(self) -> dict[str, Any]:
        table = self._cast(self._checkpoint.embedding(self._config, aligned_empty))
        axes, count = glm_params.specs(self._config).word_embeddings.axes, self._mesh.size
        sharding = parameter_sharding(self._mesh, axes, table.shape)
        norm = self._checkpoint.final_layernorm()
        return {
            "word_embeddings": self._join(np.split(table, count), table.shape, sharding),
            "final_layernorm": jax.tree.map(self._cast, norm),
        }

    def _layer(self, name: str) -> LayerParams:
        index = self._names().index(name) - 1
        if self._options.quantization is None and self._options.dtype is None:
            # The layer before is being written from the other buffers.
            self._buffers.reverse()
            layer = self._checkpoint.layer_in_pieces(
                self._config, index, self._mesh.size, self._put_pieces, self._buffers[0].allocate
            )
            return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else x[None], layer)
        # As one stacked layer, the form of every part.
        layer = self._checkpoint.layer(self._config, index)
        layer = jax.tree.map(lambda x: self._cast(x[None]), layer)

        def store(name: str, linear: LinearParams) -> LinearParams:
            axes = ("layers", *KERNEL_AXES[name])
            kernel = linear.kernel
            if self._options.quantization is not None:
                scheme = Scheme.parse(self._options.quantization)
                kernel = quantized_kernel(kernel, scheme, KERNEL_AXES[name])
            if self._stored.is_quantized:
                kernel = dataclasses.replace(kernel, values=self._shard(kernel.values, axes))
            else:
                kernel = self._shard(kernel, axes)
            return LinearParams(kernel, linear.bias)

        return glm_params.map_layer_linears(store, layer)

    def _put_pieces(self, name: str, pieces: np.ndarray) -> jax.Array:
        """Return the stacked kernel of one layer from pieces [pieces, inputs, *outputs]."""
        axis = next(i for i, a in enumerate(KERNEL_AXES[name]) if a in ("heads", "mlp"))
        shape = list(pieces.shape)
        shape[0], shape[1 + axis] = 1, shape[1 + axis] * len(pieces)
        sharding = parameter_sharding(self._mesh, ("layers", *KERNEL_AXES[name]), shape)
        return self._join([piece[None] for piece in pieces], tuple(shape), sharding)

    def _join(
        self, pieces: list[np.ndarray], shape: tuple[int, ...], sharding: jax.sharding.Sharding
    ) -> jax.Array:
        """Return an array of pieces along the tensor axis, each on its device, without copies."""
        devices = self._mesh.devices.flat
        arrays = [jax.device_put(x, device) for x, device in zip(pieces, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _cast(self, x: Any) -> Any:
        dtype = self._options.dtype
        return x if dtype is None or x.dtype.kind in "iu" else cast(x, dtype)

    def _shard(self, x: Any, axes: Any) -> jax.Array:
        """Shard over devices, so that it is stored in as many chunks."""
        return jax.device_put(x, parameter_sharding(self._mesh, axes, x.shape))

    def finish(self, extra_files: tuple[Path, ...]) -> None:
        """Rename the folder to its name when the parts of all processes are written."""
        done = self._own_names()  # just checked or written
        others = [name for name in self._names() if name not in done]
        try:
            with files.locked(self.partial):  # one of the processes that end together
                is_named = (self._output / CONFIG_FILE).exists()
                is_whole = not is_named and all(self._is_whole(name) for name in others)
                if is_whole:
                    self._put_in_place(extra_files)
        except files.LockedError:
            is_named, is_whole = True, False
        if is_named:
            print(f"another process gives {self._output} its name")
        elif not is_whole:
            print(f"this process's parts of {self._output} are done, others are not yet")
        if not is_whole:
            return
        for name, count in self._checkpoint.non_finite.items():
            print(f"{name} holds {count} numbers that are NaN or infinite")
        for difference in self._checkpoint.differing_copies.values():
            print(difference)
        print(
            f"wrote {self._output}: {glm_params.parameter_count(self._config):,} parameters, "
            f"{self._stored.name}, from {len(self._checkpoint.shards)} shards"
        )

    def _put_in_place(self, extra_files: tuple[Path, ...]) -> None:
        for left in self._folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        if (self.partial / _PLAN_FILE).exists():
            (self.partial / _PLAN_FILE).replace(self.partial / PROVENANCE_FILE)
        describe_model(self.partial, self._config, self._stored, extra_files)
        files.put_in_place(self.partial, self._output)


def _bytes_below(folder: Path) -> int:
    """Return the size of all files in a folder, in which other processes may write and rename."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


class _Buffers:
    """Arrays that the next layer reuses: new memory costs as much as reading."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._next = 0

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return a layer's next array; each layer asks for the same ones in the same order."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self._next == len(LINEAR_NAMES):
            self._next = 0
        if self._next == len(self._arrays):
            self._arrays.append(aligned_empty((size,), np.uint8))
        array: np.ndarray = self._arrays[self._next].view(dtype).reshape(shape)
        self._next += 1
        return array


def _stored_format(checkpoint: SatCheckpoint, config: GLMConfig, options: Options) -> WeightFormat:
    """Return the format that kernels are written in."""
    if options.quantization is not None:
        return Scheme.parse(options.quantization).format
    bits = checkpoint.bits(config)
    if bits is None:
        return WeightFormat(config.param_dtype)
    return WeightFormat(f"int{bits}", shards=len(checkpoint.shards))


def _storage_mesh(config: GLMConfig, stored: WeightFormat) -> Mesh:
    """Return a mesh whose tensor axis divides all sizes that are split over it."""
    devices = jax.devices("cpu")
    inputs = (config.inner_hidden_size, config.hidden_size)
    packed = [size // 2 for size in inputs] if stored.bits == 4 else []
    sizes = (config.num_heads, config.vocab_size, *inputs, *packed)
    count = next(
        n for n in (16, 8, 4, 2, 1) if n <= len(devices) and not any(size % n for size in sizes)
    )
    return make_mesh((1, 1, count), devices[:count])
