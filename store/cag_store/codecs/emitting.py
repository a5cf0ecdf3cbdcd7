"""What the compiled loops are made with: numba, LLVM instructions of this processor, and what it can do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cag_store.codecs.kept_code import keep_code

# untyped, and not installed everywhere
numba = importlib.import_module("numba")
types = numba.types
extending = importlib.import_module("numba.extending")
cgutils: Any = importlib.import_module("numba.core.cgutils")
ir: Any = importlib.import_module("llvmlite.ir")
_binding = importlib.import_module("llvmlite.binding")

_HOST: dict[str, bool] = dict(_binding.get_host_cpu_features())
_NAMED = numba.config.CPU_FEATURES  # of another processor that numba is to compile for; None: this one
FEATURES = {name: has and (_NAMED is None or f"+{name}" in _NAMED.split(",")) for name, has in _HOST.items()}
"""What the processor can do, as far as numba compiles for that."""

BIT, INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_MONOTONIC = 1  # a clock of Linux
POINTER = ir.PointerType(INT8)


def compiled(function: Callable[..., Any], *signatures: Any) -> Any:
    """`function` compiled ahead for `signatures`; its code is kept (`kept_code`)."""
    dispatcher = keep_code(numba.njit(nogil=True)(function), function)
    for signature in signatures:
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


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
        if _HOST.get("sse2"):
            intrinsic(builder, "llvm.x86.sse.sfence", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


def _called(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    """Call a function of the C library."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _read_at(typing_context: Any, descriptor: Any, address: Any, count: Any, offset: Any) -> Any:  # noqa: ARG001
    """`pread` of `count` bytes from `offset` of a file to an address: how many were read, or -1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        descriptor, address, count, offset = arguments
        place, number = builder.inttoptr(address, POINTER), builder.trunc(descriptor, INT32)
        return _called(builder, "pread", INT64, [number, place, count, offset])

    return types.int64(*[types.int64] * 4), generate


def _take(typing_context: Any, descriptor: Any) -> Any:  # noqa: ARG001
    """Wait for the next number of a pipe; -2 where the system gives none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = cgutils.alloca_once(builder, INT64)
        number, address = builder.trunc(arguments[0], INT32), builder.bitcast(place, POINTER)
        count = _called(builder, "read", INT64, [number, address, INT64(8)])
        return builder.select(builder.icmp_signed("==", count, INT64(8)), builder.load(place), INT64(-2))

    return types.int64(types.int64), generate


def _put(typing_context: Any, descriptor: Any, value: Any) -> Any:  # noqa: ARG001
    """Put a number of at least 0 into a pipe; whether it is there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = cgutils.alloca_once_value(builder, arguments[1])
        number, address = builder.trunc(arguments[0], INT32), builder.bitcast(place, POINTER)
        count = _called(builder, "write", INT64, [number, address, INT64(8)])
        return builder.icmp_signed("==", count, INT64(8))

    return types.boolean(types.int64, types.int64), generate


def _clock_ns(typing_context: Any) -> Any:  # noqa: ARG001
    """Nanoseconds of the clock that never goes back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = cgutils.alloca_once(builder, ir.ArrayType(INT64, 2))
        _called(builder, "clock_gettime", INT32, [INT32(_MONOTONIC), builder.bitcast(place, POINTER)])
        found = builder.load(place)
        seconds, rest = builder.extract_value(found, 0), builder.extract_value(found, 1)
        return builder.add(builder.mul(seconds, INT64(1_000_000_000)), rest)

    return types.int64(), generate


def _add_at(typing_context: Any, address: Any, number: Any) -> Any:  # noqa: ARG001
    """Add to the word at an address, in one step for all threads; what stood there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = builder.inttoptr(arguments[0], ir.PointerType(INT64))
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


fence = extending.intrinsic(_fence)
read_at, clock_ns, add_at = (extending.intrinsic(function) for function in (_read_at, _clock_ns, _add_at))
take, put = extending.intrinsic(_take), extending.intrinsic(_put)
row_pointer = extending.intrinsic(_row)
copy_bytes = extending.intrinsic(_copy)
