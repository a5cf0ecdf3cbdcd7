"""xxh3-128 inside of compiled loops: without the interpreter's lock, and as wide as the processor is.

In: address and size of a piece of memory. Out: whether its hash is the one that the `xxhash` package gives (seed 0, the
default secret). Eight sums of 64 bits take in 64 bytes a step and are stirred each 1,024; a piece of at most 240 bytes
would take another way, which is left to the package. Source: "XXH3", github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.emitting import (
    INT32,
    INT64,
    cgutils,
    compiled,
    constant,
    extending,
    ir,
    load,
    numba,
    pointer,
    types,
)

_STRIPE, _BLOCK = 64, 1024  # bytes
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_STIRRED_WITH = len(_SECRET) - _STRIPE  # offsets in the secret
_LAST_WITH, _LOW_WITH, _HIGH_WITH = _STIRRED_WITH - 7, 11, _STIRRED_WITH - 11
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
_START = np.array([_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0]], np.uint64)
_FIRST, _SECOND, _AVALANCHE = np.uint64(_PRIME64[0]), np.uint64(_PRIME64[1]), np.uint64(0x165667919E3779F9)
_LOW_HALF, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_SUMS = ir.VectorType(INT64, 8)
_NEIGHBOURS = ir.Constant(ir.VectorType(INT32, 8), [1, 0, 3, 2, 5, 4, 7, 6])


def _words(offset: int) -> NDArray[np.uint64]:
    return np.frombuffer(_SECRET[offset : offset + _STRIPE], dtype="<u8").astype(np.uint64)


_HIGH_WORDS, _LOW_WORDS = _words(_HIGH_WITH), _words(_LOW_WITH)


def _add_stripes(typing_context: Any, sums: Any, data: Any, secret: Any, count: Any) -> Any:  # noqa: ARG001
    """Take `count` stripes of 64 bytes at the address `data` into the eight sums at the address `sums`, each with the
    secret 8 bytes further on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = pointer(builder, arguments[0], INT64(0), _SUMS)
        total = cgutils.alloca_once_value(builder, builder.load(place, align=8))
        with cgutils.for_range(builder, arguments[3]) as loop:
            found = load(builder, arguments[1], builder.mul(loop.index, INT64(_STRIPE)), _SUMS, 1)
            keyed = builder.xor(found, load(builder, arguments[2], builder.mul(loop.index, INT64(8)), _SUMS, 1))
            low, high = builder.and_(keyed, constant(_SUMS, 0xFFFFFFFF)), builder.lshr(keyed, constant(_SUMS, 32))
            swapped = builder.shuffle_vector(found, ir.Constant(_SUMS, ir.Undefined), _NEIGHBOURS)
            added = builder.add(builder.mul(low, high), swapped)
            builder.store(builder.add(builder.load(total), added), total)
        builder.store(builder.load(total), place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


def _stir(typing_context: Any, sums: Any, secret: Any) -> Any:  # noqa: ARG001
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        place = pointer(builder, arguments[0], INT64(0), _SUMS)
        total = builder.load(place, align=8)
        shifted = builder.xor(total, builder.lshr(total, constant(_SUMS, 47)))
        keyed = builder.xor(shifted, load(builder, arguments[1], INT64(0), _SUMS, 1))
        builder.store(builder.mul(keyed, constant(_SUMS, _PRIME32[0])), place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


add_stripes, stir = extending.intrinsic(_add_stripes), extending.intrinsic(_stir)


def _folded(left: Any, right: Any) -> Any:
    """The two halves of the product of 128 bits, one xor the other."""
    low_left, high_left, low_right, high_right = left & _LOW_HALF, left >> _HALF, right & _LOW_HALF, right >> _HALF
    lowest, inner, outer = low_left * low_right, high_left * low_right, low_left * high_right
    middle = (lowest >> _HALF) + (inner & _LOW_HALF) + outer
    high = (inner >> _HALF) + (middle >> _HALF) + high_left * high_right
    return high ^ ((middle << _HALF) | (lowest & _LOW_HALF))


folded = numba.njit(inline="always")(_folded)


def _merged(sums: Any, secret: Any, start: Any) -> Any:
    total = start
    for i in range(0, 8, 2):
        total += folded(sums[i] ^ secret[i], sums[i + 1] ^ secret[i + 1])
    total = (total ^ (total >> np.uint64(37))) * _AVALANCHE
    return total ^ (total >> _HALF)


merged = numba.njit(inline="always")(_merged)


def _is_hash_of(data: Any, size: Any, expected: Any, secret: Any, sums: Any) -> Any:
    sums_at, secret_at = np.int64(sums.ctypes.data), np.int64(secret.ctypes.data)
    sums[:] = _START
    num_blocks = (size - 1) // _BLOCK
    for block in range(num_blocks):
        add_stripes(sums_at, data + block * _BLOCK, secret_at, _BLOCK // _STRIPE)
        stir(sums_at, secret_at + _STIRRED_WITH)
    rest = num_blocks * _BLOCK
    add_stripes(sums_at, data + rest, secret_at, (size - 1 - rest) // _STRIPE)
    add_stripes(sums_at, data + size - _STRIPE, secret_at + _LAST_WITH, 1)
    num_bytes = np.uint64(size)
    high = merged(sums, _HIGH_WORDS, ~(num_bytes * _SECOND))
    return high == expected[0] and merged(sums, _LOW_WORDS, num_bytes * _FIRST) == expected[1]


SECRET = np.frombuffer(_SECRET, np.uint8).copy()
is_hash_of = compiled(
    _is_hash_of,
    types.boolean(
        types.int64,
        types.int64,
        types.Array(types.uint64, 1, "C"),
        types.Array(types.uint8, 1, "C"),
        types.Array(types.uint64, 1, "C"),
    ),
)
