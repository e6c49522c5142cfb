"""Copies into shared memory that go on beside the program: cp.async, from compute capability 8.0.

Pallas has them too, before 9.0 alone. Here they run on later devices as well, mark for the cache
what is read once, and swizzle rows so that ldmatrix reads 8 of them at once.
"""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from glm_jax.kernels.ptx import address, asm, global_address, i32, thread

_THREADS = 128
_BYTES = 16  # that a thread copies at once
# An instruction's own offset goes from here below its address to as much, less one, above it.
_NEAR = 2048


def start(source: Any, target: Any, swizzled: bool = False, once: bool = False) -> None:
    """Start a copy by the 128 threads of a block.

    Args:
      source: [rows, columns] in global memory; a row has a multiple of 16 bytes.
      target: the same in shared memory.
      swizzled: of each 128 bytes of row r the p-th 16 bytes become the (p ^ (r % 8))-th.
      once: the source is read by nobody else.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=())
    def copy(_: Any, source: Any, target: Any) -> Any:
        kind = ir.MemRefType(target.type)
        rows, columns = kind.shape
        size = mgpu.bytewidth(kind.element_type)
        (stride, _), _ = ir.MemRefType(source.type).get_strides_and_offset()
        chunks = columns * size // _BYTES
        policy = [asm("l", _READ_ONCE, [], "")] if once else []
        bases: dict[Any, tuple[Any, ...]] = {}
        for first in range(0, rows * chunks, _THREADS):
            row, chunk = divmod(first, chunks)
            # A thread has the same position in all turns, but for what the row's number swizzles.
            key = row % 8 if swizzled else 0
            if chunks % _THREADS and _THREADS % chunks:
                key, row, chunk = first, 0, 0
            if key not in bases:
                offsets = _offsets(first, chunks, stride * size, swizzled, row, chunk)
                starts = address(target), global_address(source)
                bases[key] = tuple(map(arith.addi, starts, offsets))
            at = (row * chunks + chunk) * _BYTES, row * stride * size + chunk * _BYTES - _NEAR
            _copy(bases[key], at, policy, rows * chunks - first)
        return ()

    copy(source, target)


def _offsets(
    first: int, chunks: int, stride: int, swizzled: bool, row: int, chunk: int
) -> tuple[Any, Any]:
    """Of a thread in the target, and in the source and _NEAR bytes on, less those of a row and a
    chunk.

    Args:
      first: chunk that the first thread copies, of all.
      chunks: of a row; `stride` bytes of the source's.
    """
    number = arith.addi(thread(), i32(first))
    at_row, at = arith.divui(number, i32(chunks)), arith.remui(number, i32(chunks))
    column = arith.xori(at, arith.andi(at_row, i32(7))) if swizzled else at
    rows = arith.subi(at_row, i32(row))
    to = _sum((rows, chunks * _BYTES), (arith.subi(column, i32(chunk)), _BYTES))
    source = _sum((rows, stride), (arith.subi(at, i32(chunk)), _BYTES))
    source = arith.addi(source, i32(_NEAR))
    return to, arith.extui(ir.IntegerType.get_signless(64), source)


def _sum(first: tuple[Any, int], second: tuple[Any, int]) -> Any:
    return arith.addi(*(arith.muli(value, i32(factor)) for value, factor in (first, second)))


def _copy(base: tuple[Any, ...], at: tuple[int, int], policy: list[Any], left: int) -> None:
    """One turn of all threads, of which the first `left` copy."""
    hint, operand = (".L2::cache_hint", ", $2") if policy else ("", "")
    text = f"cp.async.cg.shared.global{hint} [$0 + {at[0]}], [$1 + {at[1]}], {_BYTES}{operand};"
    operands, kinds = [*base, *policy], "rl" + "l" * len(policy)
    if left < _THREADS:
        text = f"{{ .reg .pred p; setp.lt.u32 p, ${len(operands)}, {left}; @p {text} }}"
        operands, kinds = [*operands, thread()], kinds + "r"
    asm("", text, operands, kinds, effects=True)


_READ_ONCE = "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;"


def end_group() -> None:
    """End a group of copies."""

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def commit(_: Any) -> Any:
        asm("", "cp.async.commit_group;", [], "", effects=True)
        return ()

    commit()


def wait(groups: int) -> None:
    """Wait until all copies but those of the last groups are there, of all threads."""

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def finish(_: Any) -> Any:
        asm("", f"cp.async.wait_group {groups};", [], "", effects=True)
        mgpu.warpgroup_barrier()
        return ()

    finish()
