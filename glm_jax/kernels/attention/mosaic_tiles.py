"""What the kernels of mosaic.py are made of: tiles, the blocks that they visit, products."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.kernels.attention.dropout import WeightDropout, are_kept

WARPGROUPS = 2  # that multiply; a third copies
ROWS = 64  # of a warpgroup's tile, as wgmma takes them
TILE = WARPGROUPS * ROWS
COLUMN, _ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
_untyped: Any = plgpu  # what its annotations get wrong
_TRANSFORMS = (_untyped.TilingTransform((8, 64)), _untyped.SwizzleTransform(128))


class Static(NamedTuple):
    """What is known while kernels are traced: see `Mosaic`; and dropout without its seed."""

    key_block: int
    interpret: bool
    dropout: WeightDropout | None

    @property
    def scale(self) -> float:
        """What weights that dropout keeps are multiplied by."""
        return self.dropout.scale if self.dropout else 1.0


@dataclasses.dataclass(frozen=True)
class Tile:
    """A warpgroup's tile within a kernel, and the blocks that it visits.

    Attributes:
      row, head, warpgroup: indices.
      first_row: number of its first query, or of its first key.
      first, count: blocks that it shares a visible key with.
      full_first, full_count: those of them, numbered from `first`, that are visible as a whole.
    """

    row: Any
    head: Any
    warpgroup: Any
    first_row: Any
    first: Any
    count: Any
    full_first: Any
    full_count: Any

    @classmethod
    def of(cls, bounds_ref: Any, last_first: bool = False) -> "Tile":
        """Return this program's; `last_first` starts with the last queries, which see most."""
        row, head, tile, warpgroup = map(lax.axis_index, ("batch", "heads", "tile", "warpgroup"))
        if last_first:
            tile = bounds_ref.shape[1] - 1 - tile
        first_row = tile * TILE + warpgroup * ROWS
        first, count, full_first, full_count = (bounds_ref[row, tile, i] for i in range(4))
        full_count = full_count.astype(jnp.uint32)
        return cls(row, head, warpgroup, first_row, first, count, full_first, full_count)

    def _rows(self, ref: Any) -> Any:
        """Its rows of [batch, length, heads, head_dim] or [batch, heads, length]."""
        rows = pl.ds(self.first_row, ROWS)
        four = len(ref.shape) == 4
        return ref.at[(self.row, rows, self.head) if four else (self.row, self.head, rows)]

    def load(self, ref: Any) -> list[Array]:
        """Numbers of each row of the tile, of [batch, heads, number, length]."""
        rows = pl.ds(self.first_row, ROWS)
        at = lambda i: ref.at[self.row, self.head, i, rows]
        return [plgpu.load(at(i), layout=_ROW, optimized=False) for i in range(ref.shape[2])]

    def copy_in(self, barrier: Any, *copies: tuple[Any, Any]) -> None:
        """Copy its rows of each array into shared memory, and wait."""
        for source, destination in copies:
            plgpu.copy_gmem_to_smem(self._rows(source), destination, barrier.at[self.warpgroup])
        plgpu.barrier_wait(barrier.at[self.warpgroup])

    def copy_out(self, *copies: tuple[Any, Any]) -> None:
        """Copy shared memory to its rows of each array, and wait."""
        plgpu.commit_smem()
        for source, destination in copies:
            plgpu.copy_smem_to_gmem(source, self._rows(destination))
        plgpu.wait_smem_to_gmem(0)

    def blocks(self, ref: Any, length: int) -> tuple[Any, Any]:
        """`pipeline`'s blocks of so many rows of [batch, length, heads, head_dim]."""
        shape, index_map = (length, ref.shape[3]), lambda i: (self.first + i, 0)
        spec = plgpu.BlockSpec(shape, index_map, transforms=_TRANSFORMS)
        return ref.at[self.row, :, self.head], spec

    def blocks_of_numbers(self, ref: Any, length: int) -> tuple[Any, Any]:
        """`pipeline`'s blocks of so many rows of [batch, heads, number, length]."""
        spec = plgpu.BlockSpec((ref.shape[2], length), lambda i: (0, self.first + i))
        return ref.at[self.row, self.head], spec

    def pipeline(
        self, step: Any, compute: Any, operands: list[tuple[Any, Any]], stages: int
    ) -> None:
        """Run `compute` with a function that takes `step`'s carry over the visited blocks.

        Args:
          step: (index, a block of each operand, a barrier for each, carry) -> carry. It arrives at
            an operand's barrier when it has read the block.
          operands: from `blocks` and `blocks_of_numbers`.
          stages: blocks in shared memory at once.
        """
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(self.count,),
            # The others have 240 then: three times the 168 that all start with. More than those
            # there are not, and a thread that asks for them hangs.
            memory_registers=24,
            in_specs=[spec for _, spec in operands],
            max_concurrent_steps=stages,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            manual_consumed_barriers=True,
            compute_context=compute,
        )(*(ref for ref, _ in operands))

    def _keys(self, shape: tuple[int, ...], index: Any, axis: int) -> Array:
        """Return the number of each key of a block, whose queries lie along `axis`."""
        first = self.first_row if axis else (self.first + index[0]) * shape[1]
        return first + plgpu.broadcasted_iota(jnp.int32, shape, 1 - axis, layout=plgpu.Layout.WGMMA)

    def hide(self, scores: Array, starts: Any, ends: Any, index: Any, axis: int) -> Array:
        """Scores, -infinity where the query does not see the key.

        Args:
          starts, ends: functions that return the first and last (exclusive) key of each query.
          index: the pipeline's.
          axis: that of queries in the block.
        """

        def hidden() -> Array:
            first, last = (along(x(), scores.shape, axis) for x in (starts, ends))
            keys = self._keys(scores.shape, index, axis)
            # One comparison for both: before the first key the difference is large without a sign.
            place, length = (x.astype(jnp.uint32) for x in (keys - first, last - first))
            return jnp.where(place < length, scores, -jnp.inf)

        is_full = (index[0] - self.full_first).astype(jnp.uint32) < self.full_count
        return lax.cond(is_full, lambda: scores, hidden)

    def are_kept(
        self,
        static: Static,
        lines: Array,
        shape: tuple[int, ...],
        index: Any,
        axis: int,
    ) -> Array:
        """Which weights of a block dropout leaves.

        Args:
          lines: the queries' hashes.
          axis: that of queries in the block.
        """
        assert static.dropout is not None
        of_queries = along(lines.astype(jnp.uint32), shape, axis)
        keys = self._keys(shape, index, axis)
        pairs = None if static.interpret else _first_of_pairs(keys, axis)
        return are_kept(static.dropout, of_queries, keys, pairs)


def _first_of_pairs(keys: Array, axis: int) -> Array:
    """Return the first of the two keys that share a hash of `dropout.are_kept`, for each key."""
    array = plgpu.ShapeDtypeStruct(keys.shape, keys.dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=array)
    def first(_: Any, numbers: Any) -> Any:
        return mgpu.FragmentedArray(
            _registers=first_registers(numbers.registers, axis),
            _layout=numbers.layout,
            _is_signed=numbers.is_signed,
        )

    made: Array = first(keys)
    return made


def first_registers(registers: Any, axis: int) -> Any:
    """Put registers of first keys in the place of those of second ones, 8 behind them.

    The compiler then computes one hash for both.

    Args:
      registers: of a thread, in the layout WGMMA.
      axis: 0 where keys are columns, 1 where they are rows.
    """
    # Of each 8 columns the two rows of a thread, which are 8 apart.
    by_place = registers.reshape(-1, 2).copy()
    if axis:
        by_place[:, 1] = by_place[:, 0]
    else:
        by_place[1::2] = by_place[::2]
    return by_place.reshape(registers.shape)


def call(
    kernel: Any,
    outputs: list[Any],
    tiles: list[Any],
    barriers: list[Any],
    grid: tuple[int, ...],
    static: Static,
) -> Any:
    copies = sum(len(tile.shape) == 3 for tile in tiles)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_types=[
            tuple(tiles),
            plgpu.Barrier(num_arrivals=copies, num_barriers=WARPGROUPS),
            *barriers,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=grid,
        grid_names=("batch", "heads", "tile"),  # tiles of a head at a time: its keys stay in cache
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=plgpu.InterpretGPUParams() if static.interpret else None,
    )


def tiles_like(like: Array) -> Any:
    """Shared memory for a tile of each warpgroup."""
    shape = (WARPGROUPS, ROWS, like.shape[-1])
    return plgpu.SMEM(shape, like.dtype, transforms=_TRANSFORMS)


def visited_blocks(
    ranges: Array, num_keys: int, rows: int, keys: int, by_keys: bool = False
) -> Array:
    """Which blocks each tile visits.

    Args:
      rows, keys: sizes of groups of queries and of keys.
      by_keys: groups of keys are the tiles and groups of queries the blocks; else the reverse.

    Returns:
      int32 [batch, tiles, 4]: the first visible block and how many from there to the last; the
      first of the last run of blocks that are visible as a whole, from that first one on, and
      how many those are.
    """
    batch = len(ranges)
    starts, ends = (ranges[..., i].reshape(batch, -1, rows, 1) for i in (0, 1))
    first_keys = jnp.arange(0, num_keys, keys)
    is_seen = (starts < ends) & (starts < first_keys + keys) & (ends > first_keys)
    is_full = (starts <= first_keys) & (ends >= first_keys + keys)
    is_seen, is_full = jnp.any(is_seen, axis=2), jnp.all(is_full, axis=2)
    if by_keys:
        is_seen, is_full = is_seen.swapaxes(1, 2), is_full.swapaxes(1, 2)
    numbers = jnp.arange(is_seen.shape[2], dtype=jnp.int32)
    first = jnp.argmax(is_seen, axis=2).astype(jnp.int32)
    last = jnp.max(jnp.where(is_seen, numbers + 1, first[..., None]), axis=2)
    full_end = jnp.max(jnp.where(is_full, numbers + 1, 0), axis=2)
    is_between = ~is_full & (numbers < full_end[..., None])
    full_first = jnp.max(jnp.where(is_between, numbers + 1, 0), axis=2)
    return jnp.stack([first, last - first, full_first - first, full_end - full_first], axis=-1)


def zeros(shape: tuple[int, ...]) -> Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROW
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcast_in_dim(x, shape, [axis])


class Products(NamedTuple):
    """Products of matrices that run beside other instructions (wgmma).

    Where they are simulated, which is done without sums that stay in registers, they are arrays,
    and are computed at once.
    """

    interpret: bool

    def scoped(self, body: Callable[..., Any], shape: tuple[int, ...], count: int) -> Any:
        """Return `body` of so many accumulators, for `start`."""
        if self.interpret:
            return body(*[None] * count)
        return pl.run_scoped(body, *[_untyped.ACC(shape, jnp.float32)] * count)

    def start(self, sums: Any, left: Any, right: Any) -> Any:
        """Start left right^T, both in shared memory; return what `finish` takes."""
        if self.interpret:
            contracted = (((1,), (1,)), ((), ()))
            return lax.dot_general(
                left[...], right[...], contracted, preferred_element_type=jnp.float32
            )
        plgpu.wgmma(sums, left, right.transpose((1, 0)))
        return sums

    def finish(self, sums: Any, running: int = 0) -> Array:
        """Wait until at most `running` later products run; return the product."""
        return sums if self.interpret else plgpu.wgmma_accumulator_load(sums, wait_n=running)

    def accumulate(
        self, run: Callable[[tuple[Any, ...]], Any], shape: tuple[int, ...], count: int
    ) -> list[Array]:
        """Return so many sums, from zero, which `run` adds products to.

        Args:
          run: takes the sums to what `add` returned for them last.
        """
        if self.interpret:
            return list(run(tuple(zeros(shape) for _ in range(count))))

        def body(*sums: Any) -> list[Array]:
            run(sums)
            return [x[...] for x in sums]

        return pl.run_scoped(body, *[_untyped.ACC(shape, jnp.float32)] * count)

    def add(self, sums: Any, left: Array, right: Any) -> Any:
        """Start adding left right, in registers and in shared memory, to `accumulate`'s sums."""
        if self.interpret:
            return sums + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        plgpu.wgmma(sums, left, right)
        return sums

    def added(self, total: Array, left: Array, right: Any) -> Array:
        """Return total + left right, with the left operand in registers."""
        if self.interpret:
            return self.add(total, left, right)
        run = lambda sums: plgpu.wgmma(sums, left, right)
        return pl.run_state(run)(_untyped.ACC.init(total))

    def wait(self, running: int = 0) -> None:
        """Wait until at most so many products run."""
        if not self.interpret:
            plgpu.wgmma_wait(running)
