"""The loops of `cpu.rows` as compiled steps of a tape (`cpu.tape`): the same code, called with addresses.

Each function here takes contiguous CPU tensors that stay where they are, and runs at once unless a tape is recorded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu import rows as cpu_rows
from cag_kernels.cpu.kept import keep_code
from cag_kernels.cpu.rows import KEPT, narrowed, numba
from cag_kernels.cpu.tape import CompiledStep, float_bits, new_call

types, carray = numba.types, numba.carray
CFunc: Any = importlib.import_module("numba.core.ccallback").CFunc


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def memory(_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), generate


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def take_task(_context: Any, call: Any) -> Any:
    """The number at the beginning of a call, which is one more for whoever comes next."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        counter = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(call), generate


def compiled_step(function: Callable[[Any], None], **options: Any) -> CompiledStep:
    """A function of the address of a call, compiled; its code is kept (`cpu.kept`)."""
    compiled = keep_code(CFunc(function, ((types.voidptr,), types.void), {}, options), function)
    compiled.compile()
    return CompiledStep(compiled.address, compiled)


def add_and_norm(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float, out: Tensor) -> None:
    """See `cpu.rows.add_and_norm`."""
    _shared(_add_and_norm, [hidden, update, weight, out], [*hidden.shape, float_bits(epsilon)], len(hidden))


def add_normed(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> None:
    """See `cpu.rows.add_normed`."""
    _shared(_add_normed, [hidden, update, weight], [*hidden.shape, float_bits(epsilon)], len(hidden))


def add_normed_and_norm(
    hidden: Tensor, update: Tensor, behind: Tensor, behind_epsilon: float, weight: Tensor, epsilon: float, out: Tensor
) -> None:
    """See `cpu.rows.add_normed_and_norm`."""
    sizes = [*hidden.shape, float_bits(behind_epsilon), float_bits(epsilon)]
    _shared(_add_normed_and_norm, [hidden, update, behind, weight, out], sizes, len(hidden))


def head_norm(projected: Tensor, first: int, num_heads: int, weight: Tensor, epsilon: float) -> None:
    """See `cpu.rows.head_norm`."""
    sizes = [*projected.shape, first, num_heads, len(weight), float_bits(epsilon)]
    _shared(_head_norm, [projected, weight], sizes, len(projected))


def rotate_and_store(
    projected: Tensor,
    cosines: Tensor,
    sines: Tensor,
    query: Tensor,
    rounded: Tensor,
    pool: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
) -> None:
    """See `cpu.rows.rotate_and_store`; `rounded` is the query besides in bfloat16, `targets` pages and places."""
    tensors = [projected, cosines, sines, query, rounded, *pool, *targets]
    step = _rotating(pool[0].dtype)
    _shared(step, tensors, [*query.shape, *pool[0].shape[:3]], query.shape[1])


def take_rows(source: Tensor, rows: Tensor, out: Tensor, rounded: Tensor | None = None) -> None:
    """Rows of `source [count, num_rows, size]` float32 to `out [count, len(rows), size]`, and to `rounded` besides in
    bfloat16; rows: int64."""
    tensors = [source, rows, out, out if rounded is None else rounded]
    _shared(_take_rows, tensors, [*source.shape, len(rows), int(rounded is not None)], 1)


def gate(projected: Tensor, out: Tensor, activation: str = "silu") -> None:
    """See `cpu.rows.GATES`."""
    number = list(cpu_rows.GATES).index(activation)
    _shared(_gate, [projected, out], [*out.shape, number], len(out))


def _shared(function: Callable[[Any], None], tensors: Sequence[Tensor], sizes: Sequence[int], num_tasks: int) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
    call = new_call([0, *(tensor.data_ptr() for tensor in tensors), *sizes], tensors)
    _step(function).shared(call, num_tasks)


@cache
def _step(function: Callable[[Any], None]) -> CompiledStep:
    return compiled_step(function, error_model="numpy")


def _add_and_norm(call: Any) -> None:
    fields = carray(call, 8, np.int64)
    num_rows, size = fields[5], fields[6]
    hidden = carray(memory(fields[1]), (num_rows, size), np.float32)
    update = carray(memory(fields[2]), (num_rows, size), np.float32)
    weight = carray(memory(fields[3]), size, np.float32)
    out = carray(memory(fields[4]), (num_rows, size), np.float32)
    epsilon = carray(memory(fields[7:].ctypes.data), 1, np.float32)[0]
    row = take_task(call)
    while row < num_rows:
        cpu_rows.add_and_norm(hidden[row : row + 1], update[row : row + 1], weight, epsilon, out[row : row + 1])
        row = take_task(call)


def _add_normed(call: Any) -> None:
    fields = carray(call, 7, np.int64)
    num_rows, size = fields[4], fields[5]
    hidden = carray(memory(fields[1]), (num_rows, size), np.float32)
    update = carray(memory(fields[2]), (num_rows, size), np.float32)
    weight = carray(memory(fields[3]), size, np.float32)
    epsilon = carray(memory(fields[6:].ctypes.data), 1, np.float32)[0]
    row = take_task(call)
    while row < num_rows:
        cpu_rows.add_normed(hidden[row : row + 1], update[row : row + 1], weight, epsilon)
        row = take_task(call)


def _add_normed_and_norm(call: Any) -> None:
    fields = carray(call, 10, np.int64)
    num_rows, size = fields[6], fields[7]
    hidden = carray(memory(fields[1]), (num_rows, size), np.float32)
    update = carray(memory(fields[2]), (num_rows, size), np.float32)
    behind = carray(memory(fields[3]), size, np.float32)
    weight = carray(memory(fields[4]), size, np.float32)
    out = carray(memory(fields[5]), (num_rows, size), np.float32)
    behind_epsilon = carray(memory(fields[8:].ctypes.data), 1, np.float32)[0]
    epsilon = carray(memory(fields[9:].ctypes.data), 1, np.float32)[0]
    row = take_task(call)
    while row < num_rows:
        rows = slice(row, row + 1)
        cpu_rows.add_normed_and_norm(hidden[rows], update[rows], behind, behind_epsilon, weight, epsilon, out[rows])
        row = take_task(call)


def _head_norm(call: Any) -> None:
    fields = carray(call, 9, np.int64)
    num_rows, size = fields[3], fields[4]
    projected = carray(memory(fields[1]), (num_rows, size), np.float32)
    weight = carray(memory(fields[2]), fields[7], np.float32)
    epsilon = carray(memory(fields[8:].ctypes.data), 1, np.float32)[0]
    row = take_task(call)
    while row < num_rows:
        cpu_rows.head_norm(projected[row : row + 1], fields[5], fields[6], weight, epsilon)
        row = take_task(call)


@cache
def _rotating(dtype: torch.dtype) -> Callable[[Any], None]:
    """For keys and values in a type."""
    kept = KEPT[dtype]

    def rotate_and_store(call: Any) -> None:
        fields = carray(call, 16, np.int64)
        num_q_heads, num_rows, head_dim, num_pages = fields[10], fields[11], fields[12], fields[13]
        num_kv_heads, page_tokens = fields[14], fields[15]
        width = (num_q_heads + 2 * num_kv_heads) * head_dim
        pool = (num_pages, num_kv_heads, page_tokens, head_dim)
        projected = carray(memory(fields[1]), (num_rows, width), np.float32)
        cosines = carray(memory(fields[2]), (num_rows, head_dim), np.float32)
        sines = carray(memory(fields[3]), (num_rows, head_dim), np.float32)
        query = carray(memory(fields[4]), (num_q_heads, num_rows, head_dim), np.float32)
        rounded = carray(memory(fields[5]), (num_q_heads, num_rows, head_dim), np.uint16)
        keys = carray(memory(fields[6]), pool, kept)
        values = carray(memory(fields[7]), pool, kept)
        pages = carray(memory(fields[8]), num_rows, np.int64)
        places = carray(memory(fields[9]), num_rows, np.int64)
        row = take_task(call)
        while row < num_rows:
            own = slice(row, row + 1)
            cpu_rows.rotate_and_store(
                projected[own], cosines[own], sines[own], query[:, own], keys, values, pages[own], places[own]
            )
            for head in range(num_q_heads):
                for index in range(head_dim):
                    rounded[head, row, index] = narrowed(query[head, row, index])
            row = take_task(call)

    return rotate_and_store


def _take_rows(call: Any) -> None:
    if take_task(call) > 0:
        return
    fields = carray(call, 10, np.int64)
    count, num_rows, size, num_taken = fields[5], fields[6], fields[7], fields[8]
    source = carray(memory(fields[1]), (count, num_rows, size), np.float32)
    rows = carray(memory(fields[2]), num_taken, np.int64)
    out = carray(memory(fields[3]), (count, num_taken, size), np.float32)
    for part in range(count):
        for place in range(num_taken):
            for index in range(size):
                out[part, place, index] = source[part, rows[place], index]
    if fields[9] != 0:
        numbers = carray(memory(fields[3]), count * num_taken * size, np.float32)
        rounded = carray(memory(fields[4]), count * num_taken * size, np.uint16)
        for index in range(count * num_taken * size):
            rounded[index] = narrowed(numbers[index])


def _gate(call: Any) -> None:
    fields = carray(call, 6, np.int64)
    num_rows, size = fields[3], fields[4]
    projected = carray(memory(fields[1]), (num_rows, 2 * size), np.float32)
    out = carray(memory(fields[2]), (num_rows, size), np.float32)
    row = take_task(call)
    while row < num_rows:
        if fields[5] == 0:
            cpu_rows.gate(projected[row : row + 1], out[row : row + 1])
        else:
            cpu_rows.gate_by_gelu(projected[row : row + 1], out[row : row + 1])
        row = take_task(call)
