"""The small steps between the products of a decoder layer, for few rows, compiled with numba.

Each of them is a handful of torch operators on a few kilobytes, whose calls cost more than their work. One thread runs
a call, of all rows or of some; arrays are float32, the tail's keys and values as `kept_numbers` gives them, and all but
a query of some rows are C-contiguous.
`rows_reference` has the same functions in plain torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor

from cag_kernels.cpu.kept import keep_code

numba = importlib.import_module("numba")  # untyped
types = numba.types

Array = NDArray[Any]
RELAXED = {"reassoc", "contract"}  # sums in any order: lanes of a vector; NaN and infinities keep their meaning
_LOG2_E = np.float32(1.4426950408889634)
GELU_LINEAR = 2 * (2 / np.pi) ** 0.5
GELU_CUBIC = 0.044715 * GELU_LINEAR
_GELU_LINEAR, _GELU_CUBIC = np.float32(GELU_LINEAR), np.float32(GELU_CUBIC)
_LEAST, _MOST = np.float32(-126.0), np.float32(126.0)
_TAYLOR = tuple(np.float32(0.6931471805599453**n / np.prod(np.arange(1.0, n + 1))) for n in range(8))


KEPT: dict[torch.dtype, type[np.generic]] = {
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
    torch.float32: np.float32,
}
"""What arrays of numbers in a type hold: bit patterns where compiled code has to widen them."""


def kept_numbers(tensor: Tensor) -> Array:
    """The memory of a CPU tensor as an array of `KEPT`."""
    array: Array = tensor.detach().view(torch.int16 if tensor.element_size() == 2 else tensor.dtype).numpy()
    return array.view(KEPT[tensor.dtype])


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def _float16_number(_context: Any, _pattern: Any) -> Any:
    """The float32 of a float16 bit pattern."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def _float16_pattern(_context: Any, _value: Any) -> Any:
    """The float16 bit pattern nearest to a float32, ties to even; infinite where that is too large."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def compiled(function: Callable[..., Any], relaxed: Set[str] = RELAXED) -> Any:
    """`function`, compiled at its first call; its code is kept (`cpu.kept`)."""
    return keep_code(numba.njit(nogil=True, fastmath=set(relaxed), error_model="numpy")(function), function)


def _exponential(value: Any) -> Any:
    """`exp(value)` to about 1e-7, as operations that fill vectors; beyond +-87 the nearest power of two it knows."""
    exponent = min(max(value * _LOG2_E, _LEAST), _MOST)
    whole = np.floor(exponent + np.float32(0.5))
    fraction = exponent - whole
    result = _TAYLOR[7]
    result = result * fraction + _TAYLOR[6]
    result = result * fraction + _TAYLOR[5]
    result = result * fraction + _TAYLOR[4]
    result = result * fraction + _TAYLOR[3]
    result = result * fraction + _TAYLOR[2]
    result = result * fraction + _TAYLOR[1]
    result = result * fraction + _TAYLOR[0]
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23))
    return result * power.view(np.float32)


def _widened(pattern: Any) -> Any:
    """The float32 of a bfloat16 bit pattern."""
    return np.uint32(np.uint32(pattern) << np.uint32(16)).view(np.float32)


def widened(number: Any) -> Any:
    """A number of an array of `KEPT` as float32, for compiled code."""
    raise NotImplementedError(type(number))


def narrowed_to(value: Any, target: Any) -> Any:
    """What an array of `KEPT` holds of the number nearest to a finite float32, for compiled code."""
    raise NotImplementedError(target.dtype)


@numba.extending.overload(widened)  # type: ignore[untyped-decorator]
def _widened_by_type(number: Any) -> Any:
    def of_float16(number: Any) -> Any:
        return _float16_number(number)

    def of_bfloat16(number: Any) -> Any:
        return _bfloat16_number(number)

    def of_float32(number: Any) -> Any:
        return number

    return {types.int16: of_float16, types.uint16: of_bfloat16, types.float32: of_float32}.get(number)


@numba.extending.overload(narrowed_to)  # type: ignore[untyped-decorator]
def _narrowed_by_type(value: Any, target: Any) -> Any:  # noqa: ARG001  numba calls with these names
    def to_float16(value: Any, target: Any) -> Any:  # noqa: ARG001
        return _float16_pattern(value)

    def to_bfloat16(value: Any, target: Any) -> Any:  # noqa: ARG001
        return narrowed(value)

    def to_float32(value: Any, target: Any) -> Any:  # noqa: ARG001
        return value

    return {types.int16: to_float16, types.uint16: to_bfloat16, types.float32: to_float32}.get(target.dtype)


def _narrowed(value: Any) -> Any:
    """The bfloat16 bit pattern nearest to a finite float32, ties to even; NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def _inverse_rms(values: Any, epsilon: Any) -> Any:
    """`1 / sqrt(mean(values ** 2) + epsilon)`."""
    squares = np.float32(0)
    for index in range(values.shape[0]):
        squares += values[index] * values[index]
    return np.float32(1 / np.sqrt(squares / np.float32(values.shape[0]) + np.float32(epsilon)))


exponential = numba.njit(inline="always", fastmath=RELAXED)(_exponential)
_bfloat16_number = numba.njit(inline="always")(_widened)
narrowed = numba.njit(inline="always")(_narrowed)
inverse_rms = numba.njit(inline="always", fastmath=RELAXED, error_model="numpy")(_inverse_rms)


@compiled
def add_and_norm(hidden: Array, update: Array, weight: Array, epsilon: float, out: Array) -> None:
    """`hidden += update`, then `out = hidden / sqrt(mean(hidden ** 2) + epsilon) * weight`; all `[num_rows, size]`."""
    num_rows, size = hidden.shape
    for row in range(num_rows):
        squares = np.float32(0)
        for index in range(size):
            value = hidden[row, index] + update[row, index]
            hidden[row, index] = value
            squares += value * value
        factor = np.float32(1 / np.sqrt(squares / np.float32(size) + np.float32(epsilon)))
        for index in range(size):
            out[row, index] = hidden[row, index] * factor * weight[index]


@compiled
def add_normed(hidden: Array, update: Array, weight: Array, epsilon: float) -> None:
    """`hidden += update / sqrt(mean(update ** 2) + epsilon) * weight`; both `[num_rows, size]`."""
    num_rows, size = hidden.shape
    for row in range(num_rows):
        factor = inverse_rms(update[row], epsilon)
        for index in range(size):
            hidden[row, index] += update[row, index] * factor * weight[index]


@compiled
def add_normed_and_norm(
    hidden: Array, update: Array, behind: Array, behind_epsilon: float, weight: Array, epsilon: float, out: Array
) -> None:
    """`add_normed` by weight `behind`, then the norm of the sum to `out` as in `add_and_norm`."""
    num_rows, size = hidden.shape
    for row in range(num_rows):
        factor = inverse_rms(update[row], behind_epsilon)
        squares = np.float32(0)
        for index in range(size):
            value = hidden[row, index] + update[row, index] * factor * behind[index]
            hidden[row, index] = value
            squares += value * value
        factor = np.float32(1 / np.sqrt(squares / np.float32(size) + np.float32(epsilon)))
        for index in range(size):
            out[row, index] = hidden[row, index] * factor * weight[index]


@compiled
def head_norm(projected: Array, first: int, num_heads: int, weight: Array, epsilon: float) -> None:
    """Normalize heads of `head_dim` features each, in place; the first begins at column `first` of `projected`."""
    head_dim = weight.shape[0]
    for row in range(projected.shape[0]):
        for head in range(num_heads):
            start = first + head * head_dim
            factor = inverse_rms(projected[row, start : start + head_dim], epsilon)
            for index in range(head_dim):
                projected[row, start + index] *= factor * weight[index]


@compiled
def rotate_and_store(
    projected: Array,
    cosines: Array,
    sines: Array,
    query: Array,
    keys: Array,
    values: Array,
    pages: Array,
    places: Array,
) -> None:
    """Queries, keys and values of new tokens, side by side in `projected`, to where attention wants them.

    projected: `[num_rows, (num_q_heads + 2 * num_kv_heads) * head_dim]`; cosines, sines: `[num_rows, head_dim]`, pairs
    half a head apart; query (out): `[num_q_heads, num_rows, head_dim]`; keys, values (out), as `kept_numbers`:
    `[num_pages, num_kv_heads, page_tokens, head_dim]`, row `r` written to token `places[r]` of page `pages[r]`, int64
    `[num_rows]` both.
    """
    num_q_heads, num_rows, head_dim = query.shape
    num_kv_heads, half = keys.shape[1], head_dim // 2
    for row in range(num_rows):
        page, place = pages[row], places[row]
        for head in range(num_q_heads + num_kv_heads):
            start = head * head_dim
            for index in range(half):
                low, high = projected[row, start + index], projected[row, start + half + index]
                turned_low = low * cosines[row, index] - high * sines[row, index]
                turned_high = high * cosines[row, half + index] + low * sines[row, half + index]
                if head < num_q_heads:
                    query[head, row, index] = turned_low
                    query[head, row, half + index] = turned_high
                else:
                    keys[page, head - num_q_heads, place, index] = narrowed_to(turned_low, keys)
                    keys[page, head - num_q_heads, place, half + index] = narrowed_to(turned_high, keys)
        for head in range(num_kv_heads):
            start = (num_q_heads + num_kv_heads + head) * head_dim
            for index in range(head_dim):
                values[page, head, place, index] = narrowed_to(projected[row, start + index], values)


@compiled
def gate(projected: Array, out: Array) -> None:
    """`silu(left) * right` of the two halves of each row: `[num_rows, 2 * size]` to `[num_rows, size]`."""
    num_rows, size = out.shape
    for row in range(num_rows):
        for index in range(size):
            value = projected[row, index]
            out[row, index] = value / (np.float32(1) + exponential(-value)) * projected[row, size + index]


@compiled
def gate_by_gelu(projected: Array, out: Array) -> None:
    """As `gate`, by the tanh form of GELU: `0.5 * x * (1 + tanh(y / 2))` is `x / (1 + exp(-y))`, and `y` is
    `x * (GELU_LINEAR + GELU_CUBIC * x ** 2)`."""
    num_rows, size = out.shape
    for row in range(num_rows):
        for index in range(size):
            value = projected[row, index]
            inner = value * (_GELU_LINEAR + _GELU_CUBIC * value * value)
            out[row, index] = value / (np.float32(1) + exponential(-inner)) * projected[row, size + index]


GATES = {"silu": gate, "gelu_tanh": gate_by_gelu}
"""By `rows_reference.ACTIVATIONS`."""
