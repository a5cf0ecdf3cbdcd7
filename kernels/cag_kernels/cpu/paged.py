"""Attention over the tails of many sessions in one call, compiled: rows of each over its own pages.

Keys and values are widened and meet rows in float32. Threads share out tasks, each some rows of a session and a
key/value head. Keys come in blocks that begin at multiples of `BLOCK_TOKENS` of a session's own tokens (pages hold a
multiple of it, or there is one page a session), with an online softmax from block to block, so no number depends on
other sessions, on other rows or on threads. `rows_reference.attend_tails_reference` says what it means;
`cpu.attention.tails` emits the code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from enum import IntEnum
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cag_kernels.cpu.attention.segments import MAX_HEAD_DIM
from cag_kernels.cpu.floats import reads_floats
from cag_kernels.cpu.processor import has_compiler
from cag_kernels.cpu.tape import CompiledStep, float_bits, new_call

Array = Any  # numpy's, whose types say nothing of shapes

THREADS_PAIRS = 1 << 12  # rows of query heads x keys from which a second thread is worth its start
_NO_WINDOW = 1 << 32  # tokens; no tail has as many

_lock = threading.Lock()


class Field(IntEnum):
    """Places in the array of int64 that describes a call; `QUERY` to `LOGSUMEXPS` are addresses."""

    NEXT_TASK = 0
    QUERY = 1  # [num_q_heads, num_rows, head_dim] float32
    KEYS = 2  # [num_pages, num_kv_heads, page_tokens, head_dim], of the type that the code was made for
    VALUES = 3
    PAGES = 4  # [num_sessions, max_pages] int32
    LENGTHS = 5  # [num_sessions] int32, tokens of each tail, those of the rows included
    STARTS = 6  # [num_sessions + 1] int32, first row of each session
    SKIPPED = 7  # [num_sessions] int32, tokens of each tail that were attended to already
    PARTS = 8  # [num_parts, num_q_heads, part_rows, head_dim] float32, what rows found elsewhere
    PART_LOGSUMEXPS = 9  # [num_parts, num_q_heads, part_rows]
    OUT = 10  # [num_rows, num_q_heads, head_dim] float32
    LOGSUMEXPS = 11  # [num_q_heads, num_rows] float32
    NUM_Q_HEADS = 12
    NUM_ROWS = 13
    NUM_KV_HEADS = 14
    PAGE_TOKENS = 15
    MAX_PAGES = 16
    NUM_PARTS = 17
    FIRST_SESSION = 18  # the sessions of this call
    LAST_SESSION = 19  # behind the last of them
    SCALE = 20  # the bits of a float32
    WINDOW = 21  # tokens of its tail that a row sees at most, its own included


ADDRESSES = range(Field.QUERY, Field.LOGSUMEXPS + 1)


class Tails:
    """Rows of sessions and where their tails lie, for many calls: one a layer and group of sessions.

    pages: int32 `[num_sessions, max_pages]`; lengths: int32 `[num_sessions]`, tokens of each tail, those of the rows
    included; starts: int32 `[num_sessions + 1]`, first row of each; skipped: int32 `[num_sessions]`, tokens of each
    tail that were attended to already. All C-contiguous.
    """

    def __init__(self, pages: Array, lengths: Array, starts: Array, skipped: Array) -> None:
        self.arrays = (pages, lengths, starts, skipped)  # what the addresses are of
        self._addresses = [array.ctypes.data for array in self.arrays]
        self._max_pages = pages.shape[1]
        self._starts, self._lengths = starts.tolist(), lengths.tolist()

    def __len__(self) -> int:
        return len(self._lengths)

    def num_pairs(self, first: int, last: int) -> int:
        """Rows of sessions `[first, last)` times the tokens of the longest of their tails."""
        return int((self._starts[last] - self._starts[first]) * max(self._lengths[first:last]))

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        parts: Tensor,
        part_logsumexps: Tensor,
        out: Tensor,
        logsumexps: Tensor,
        sessions: tuple[int, int] | None = None,
        window: int | None = None,
    ) -> None:
        """Causal attention of sessions' rows over their own tails, joined with what other segments gave these rows.

        With a window, a row at place `t` of its tail sees places `t - window < place <= t`.

        query: `[num_q_heads, num_rows, head_dim]` float32; keys, values: `[num_pages, num_kv_heads, page_tokens,
        head_dim]` bfloat16, float16 or float32; parts: `[num_parts, num_q_heads, rows of these sessions, head_dim]`
        float32 with their logsumexps; out: `[num_rows, num_q_heads * head_dim]` and logsumexps `[num_q_heads,
        num_rows]` float32 are written for the rows of sessions `[sessions[0], sessions[1])`, all if None. All
        contiguous on the CPU.
        """
        first, last = (0, len(self)) if sessions is None else sessions
        _, num_kv_heads, page_tokens, head_dim = keys.shape
        num_q_heads, num_rows, _ = query.shape
        kept = (query, keys, values, *self.arrays, parts, part_logsumexps, out, logsumexps)
        fields = (
            0, query.data_ptr(), keys.data_ptr(), values.data_ptr(), *self._addresses, parts.data_ptr(),
            part_logsumexps.data_ptr(), out.data_ptr(), logsumexps.data_ptr(), num_q_heads, num_rows, num_kv_heads,
            page_tokens, self._max_pages, len(parts), first, last, float_bits(scale),
            _NO_WINDOW if window is None else window,
        )  # fmt: skip
        one_thread = self.num_pairs(first, last) * num_q_heads < THREADS_PAIRS
        kernel = compiled_kernel(head_dim, num_q_heads // num_kv_heads, keys.dtype)
        kernel.shared(new_call(fields, kept), 1 if one_thread else (last - first) * num_kv_heads)


def warm_up_tails(head_dims: Iterable[int], group_sizes: Iterable[int], dtype: torch.dtype) -> None:
    """Compile what calls with these head dimensions and so many query heads a key/value head need, over keys and
    values in a type; nothing where that cannot be."""
    if has_compiler() and reads_floats(dtype):
        for head_dim, group in product((size for size in head_dims if size <= MAX_HEAD_DIM), group_sizes):
            compiled_kernel(head_dim, group, dtype)


def compiled_kernel(head_dim: int, group: int, dtype: torch.dtype) -> CompiledStep:
    """The code for so many query heads a key/value head, over keys and values in a type; compiled once a process."""
    with _lock:
        return _compile(head_dim, group, dtype)


@cache
def _compile(head_dim: int, group: int, dtype: torch.dtype) -> CompiledStep:
    from cag_kernels.cpu.attention.panel import host_blocking
    from cag_kernels.cpu.attention.tails import tails_module
    from cag_kernels.cpu.program import Program

    lanes = host_blocking().lanes
    while head_dim % lanes:  # fewer lanes fill the rows of any head
        lanes //= 2
    program = Program(tails_module, head_dim, group, lanes, dtype)
    return CompiledStep(program.address("attend"), program)
