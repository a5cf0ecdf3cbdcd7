"""What the compiled loops are made with: numba, LLVM instructions of this processor, and what it can do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# untyped, and not installed everywhere
numba = importlib.import_module("numba")
types = numba.types
extending = importlib.import_module("numba.extending")
cgutils: Any = importlib.import_module("numba.core.cgutils")
ir: Any = importlib.import_module("llvmlite.ir")
_binding = importlib.import_module("llvmlite.binding")

FEATURES: dict[str, bool] = dict(_binding.get_host_cpu_features())

BIT, INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType(INT8)


def compiled(function: Callable[..., Any], *signatures: Any) -> Any:
    """`function` compiled ahead for `signatures`; without numba's cache where no folder for it can be written."""
    try:
        return numba.njit(list(signatures), nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(list(signatures), nogil=True)(function)


def array(kind: Any, ndim: int, readonly: bool = False) -> Any:
    """The type of a contiguous array."""
    return types.Array(kind, ndim, "C", readonly=readonly)


def pointer(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    """The address `base + offset` in bytes as a pointer to `kind`."""
    return builder.inttoptr(builder.add(base, offset), ir.PointerType(kind))


def load(builder: Any, base: Any, offset: Any, kind: Any, align: int) -> Any:
    """What stands at `base + offset`."""
    return builder.load(pointer(builder, base, offset, kind), align=align)


def store_past(builder: Any, value: Any, place: Any) -> None:
    """Store to a multiple of 64 bytes past the caches, which then need not read first what is written over."""
    stored = builder.store(value, place, align=64)
    stored.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))


def splat(builder: Any, number: Any, vector: Any) -> Any:
    """A number in every lane."""
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), number, INT32(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(INT32, vector.count), [0] * vector.count))


def constant(vector: Any, number: int) -> Any:
    """The same constant in every lane."""
    return ir.Constant(vector, [number] * vector.count)


def intrinsic(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic by its full name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.declare_intrinsic(name, fnty=kind), arguments)


def _row(typing_context: Any, out: Any, address: Any) -> Any:  # noqa: ARG001
    """`address` as a pointer to elements of `out`."""
    element = types.CPointer(out.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return element(out, types.uintp), generate


def _copy(typing_context: Any, source: Any, target: Any, count: Any) -> Any:  # noqa: ARG001
    """`memcpy` between addresses: a loop over pointers of unknown origin is not made into vectors."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        source, target, count = arguments
        places = [builder.inttoptr(place, POINTER) for place in (target, source)]
        cgutils.raw_memcpy(builder, *places, count, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _fence(typing_context: Any) -> Any:  # noqa: ARG001
    """What was stored past the caches comes before what is stored from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        if FEATURES.get("sse2"):
            intrinsic(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


fence = extending.intrinsic(_fence)
row_pointer = extending.intrinsic(_row)
copy_bytes = extending.intrinsic(_copy)
