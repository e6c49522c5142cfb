"""Instructions of PTX in a Mosaic GPU kernel."""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm


def asm(results: str, text: str, operands: list[Any], inputs: str, effects: bool = False) -> Any:
    """Instructions of PTX.

    Args:
      results: a letter for each: r is 32 bits, l 64 bits, f a float32.
      text: results are $0, $1, ...; operands follow.
      inputs: such letters for the operands.
      effects: instructions with effects keep their order.

    Returns:
      The results' list; of one result, that; None without results.
    """
    integer = ir.IntegerType.get_signless
    kinds = {"r": integer(32), "l": integer(64), "f": ir.F32Type.get()}
    # A result of several instructions may be written before the last operand is read.
    mark = "=&" if text.count(";") > 1 else "="
    types = [kinds[letter] for letter in results]
    result: Any = llvm.StructType.get_literal(types)
    if len(types) < 2:
        result = types[0] if types else None
    constraints = ",".join([mark + letter for letter in results] + list(inputs))
    made = llvm.inline_asm(
        result, operands, text, constraints, asm_dialect=0, has_side_effects=effects
    )
    if len(types) < 2:
        return made if types else None
    return [llvm.extractvalue(kind, made, [index]) for index, kind in enumerate(types)]


def i32(value: int) -> Any:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def thread() -> Any:
    """Return the number of a thread in its block of 128."""
    return mgpu.thread_idx()


def address(ref: Any) -> Any:
    """Where an array in shared memory begins, in 32 bits."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(ref))


def global_address(ref: Any) -> Any:
    """Where an array in global memory begins, in 64 bits."""
    pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), mgpu.utils.memref_ptr(ref))
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)
