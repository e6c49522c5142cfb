"""What the kernels of mosaic.py are made of: tiles, the blocks that they visit, products."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.kernels.attention.dropout import WeightDropout, factors_of_lines

WARPGROUPS = 2  # that multiply; a third copies
ROWS = 64  # of a warpgroup's tile, as wgmma takes them
TILE = WARPGROUPS * ROWS
COLUMN, _ROW = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
_STAGES = 2  # blocks in shared memory at once
_untyped: Any = plgpu  # what its annotations get wrong
_TRANSFORMS = (_untyped.TilingTransform((8, 64)), _untyped.SwizzleTransform(128))


class Static(NamedTuple):
    """What is known while kernels are traced: see `Mosaic`; and dropout without its seed."""

    key_block: int
    interpret: bool
    dropout: WeightDropout | None


@dataclasses.dataclass(frozen=True)
class Tile:
    """A warpgroup's tile within a kernel, and the blocks that it visits.

    Attributes:
      row, head, warpgroup: indices.
      first_row: number of its first query, or of its first key.
      first, count: blocks that it shares a visible key with.
      full_first, full_end: those of them that are visible as a whole.
    """

    row: Any
    head: Any
    warpgroup: Any
    first_row: Any
    first: Any
    count: Any
    full_first: Any
    full_end: Any

    @classmethod
    def of(cls, bounds_ref: Any) -> "Tile":
        row, head, tile, warpgroup = map(lax.axis_index, ("batch", "heads", "tile", "warpgroup"))
        first_row = tile * TILE + warpgroup * ROWS
        return cls(row, head, warpgroup, first_row, *(bounds_ref[row, tile, i] for i in range(4)))

    def _sequence(self, ref: Any, rows: Any = slice(None)) -> Any:
        """Rows of its sequence and head in [batch, length, heads, head_dim],
        [batch, heads, length] or [batch, length]."""
        row, head = self.row, self.head
        index = {4: (row, rows, head), 3: (row, head, rows), 2: (row, rows)}
        return ref.at[index[len(ref.shape)]]

    def _rows(self, ref: Any) -> Any:
        return self._sequence(ref, pl.ds(self.first_row, ROWS))

    def load(self, ref: Any) -> Array:
        """A number for each row of the tile."""
        return plgpu.load(self._rows(ref), layout=_ROW, optimized=False)

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

    def pipeline(self, step: Any, compute: Any, operands: list[tuple[Any, int]]) -> None:
        """Run `compute` with a function that takes `step`'s carry over the visited blocks.

        Args:
          step: (index, a block of each operand, carry) -> carry.
          operands: arrays and how many of their rows are a block.
        """

        def spec(ref: Any, block: int) -> Any:
            if len(ref.shape) == 2:
                shape, index_map = (block, ref.shape[1]), lambda i: (self.first + i, 0)
                return plgpu.BlockSpec(shape, index_map, transforms=_TRANSFORMS)
            return plgpu.BlockSpec((block,), lambda i: (self.first + i,))

        own = [self._sequence(ref) for ref, _ in operands]
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(self.count,),
            memory_registers=40,
            in_specs=[spec(ref, block) for ref, (_, block) in zip(own, operands, strict=True)],
            max_concurrent_steps=_STAGES,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            compute_context=compute,
        )(*own)

    def _first_key(self, shape: tuple[int, ...], index: Any, axis: int) -> Any:
        return self.first_row if axis else (self.first + index[0]) * shape[1]

    def hide(self, scores: Array, of_rows: list[Array], index: Any, axis: int) -> Array:
        """Scores, -infinity where the query does not see the key.

        Args:
          of_rows: first and last (exclusive) key of each query.
          index: the pipeline's.
          axis: that of queries in the block.
        """

        def hidden() -> Array:
            starts, ends = (along(x, scores.shape, axis) for x in of_rows[:2])
            keys = self._first_key(scores.shape, index, axis) + _iota(scores.shape, 1 - axis)
            return jnp.where((keys >= starts) & (keys < ends), scores, -jnp.inf)

        block = self.first + index[0]
        is_full = (block >= self.full_first) & (block < self.full_end)
        return lax.cond(is_full, lambda: scores, hidden)

    def drop(
        self,
        dropout: WeightDropout | None,
        of_rows: list[Array],
        shape: tuple[int, ...],
        index: Any,
        axis: int,
    ) -> Array | float:
        """What dropout multiplies a block's weights by; `of_rows` ends in the queries' hashes."""
        if dropout is None:
            return 1.0
        keys = self._first_key(shape, index, axis) + _iota(shape, 1 - axis)
        return factors_of_lines(dropout, along(of_rows[2], shape, axis), keys)


def call(
    kernel: Any, outputs: list[Any], tiles: list[Any], grid: tuple[int, ...], static: Static
) -> Any:
    copies = sum(len(tile.shape) == 3 for tile in tiles)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        scratch_types=[
            tuple(tiles),
            plgpu.Barrier(num_arrivals=copies, num_barriers=WARPGROUPS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=grid,
        grid_names=("batch", "heads", "tile"),
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
      int32 [batch, tiles, 4]: the first visible block, how many from there to the last, and the
      first and last (exclusive) of the last run of blocks that are visible as a whole.
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
    return jnp.stack([first, last - first, full_first, full_end], axis=-1)


def zeros(shape: tuple[int, ...]) -> Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROW
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcast_in_dim(x, shape, [axis])


def product(left: Any, right: Any, shape: tuple[int, ...]) -> Array:
    def compute(sums: Any) -> Array:
        plgpu.wgmma(sums, left, right)
        return sums[...]

    return pl.run_scoped(compute, _untyped.ACC(shape, jnp.float32))


def add_product(total: Array, left: Any, right: Any, static: Static) -> Array:
    if static.interpret:  # which has no wgmma of registers, nor sums that start from something
        return total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda sums: plgpu.wgmma(sums, left, right))(_untyped.ACC.init(total))
