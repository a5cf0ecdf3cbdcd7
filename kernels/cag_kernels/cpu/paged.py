"""Attention over the tails of many sessions in one call, compiled with numba: rows of each over its own pages.

A task is one key/value head of one session; threads share tasks out as those of the other kernels do. Keys and values
are widened a block of tokens at a time, with an online softmax from block to block. Blocks begin at multiples of
`BLOCK_TOKENS` of a session's own tokens (pages hold a multiple of it, or there is one page a session), so no number
depends on other sessions, on other rows or on threads.
`rows_reference.attend_tails_reference` says what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cag_kernels.cpu.rows import KEPT, Array, exponential, numba, widened
from cag_kernels.cpu.steps import compiled_step, memory, take_task
from cag_kernels.cpu.tape import CompiledStep, float_bits, new_call
from cag_kernels.prefixes import BLOCK_TOKENS

_NO_WINDOW = 1 << 32  # tokens; no tail has as many
THREADS_PAIRS = 1 << 12  # rows of query heads x keys from which a second thread is worth its start

types = numba.types
carray = numba.carray


class Field(IntEnum):
    """Places in the array of int64 that describes a call; `QUERY` to `LOGSUMEXPS` are addresses."""

    NEXT_TASK = 0
    QUERY = 1  # [num_q_heads, num_rows, head_dim] float32
    KEYS = 2  # [num_pages, num_kv_heads, page_tokens, head_dim], of a type that the step was compiled for
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
    HEAD_DIM = 14
    NUM_PAGES = 15
    NUM_KV_HEADS = 16
    PAGE_TOKENS = 17
    NUM_SESSIONS = 18
    MAX_PAGES = 19
    NUM_PARTS = 20
    FIRST_SESSION = 21  # the sessions of this call
    LAST_SESSION = 22  # behind the last of them
    SCALE = 23  # the bits of a float32
    WINDOW = 24  # tokens of its tail that a row sees at most, its own included


NUM_FIELDS = len(Field)
(
    _NEXT_TASK, _QUERY, _KEYS, _VALUES, _PAGES, _LENGTHS, _STARTS, _SKIPPED, _PARTS, _PART_LOGSUMEXPS, _OUT,
    _LOGSUMEXPS, _NUM_Q_HEADS, _NUM_ROWS, _HEAD_DIM, _NUM_PAGES, _NUM_KV_HEADS, _PAGE_TOKENS, _NUM_SESSIONS,
    _MAX_PAGES, _NUM_PARTS, _FIRST_SESSION, _LAST_SESSION, _SCALE, _WINDOW,
) = (int(field) for field in Field)  # fmt: skip


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
        num_pages, num_kv_heads, page_tokens, head_dim = keys.shape
        num_q_heads, num_rows, _ = query.shape
        kept = (query, keys, values, *self.arrays, parts, part_logsumexps, out, logsumexps)
        fields = (
            0, query.data_ptr(), keys.data_ptr(), values.data_ptr(), *self._addresses, parts.data_ptr(),
            part_logsumexps.data_ptr(), out.data_ptr(), logsumexps.data_ptr(), num_q_heads, num_rows, head_dim,
            num_pages, num_kv_heads, page_tokens, len(self), self._max_pages, len(parts), first, last,
            float_bits(scale), _NO_WINDOW if window is None else window,
        )  # fmt: skip
        one_thread = self.num_pairs(first, last) * num_q_heads < THREADS_PAIRS
        _step(keys.dtype).shared(new_call(fields, kept), 1 if one_thread else (last - first) * num_kv_heads)


@cache
def _step(dtype: torch.dtype) -> CompiledStep:
    return compiled_step(_attending(dtype), **_OPTIONS)


_OPTIONS = {"fastmath": {"reassoc", "contract"}, "error_model": "numpy"}


def _attending(dtype: torch.dtype) -> Callable[[Any], None]:
    """What each thread runs; for keys and values in a type."""
    kept = KEPT[dtype]

    def attend_sessions(call: Any) -> None:
        fields: Any = carray(call, NUM_FIELDS, np.int64)
        num_kv_heads, first = fields[_NUM_KV_HEADS], fields[_FIRST_SESSION]
        num_tasks = (fields[_LAST_SESSION] - first) * num_kv_heads
        pool = (fields[_NUM_PAGES], num_kv_heads, fields[_PAGE_TOKENS], fields[_HEAD_DIM])
        keys, values = carray(memory(fields[_KEYS]), pool, kept), carray(memory(fields[_VALUES]), pool, kept)
        task = take_task(call)
        while task < num_tasks:
            _attend_head(fields, keys, values, first + task // num_kv_heads, task % num_kv_heads)
            task = take_task(call)

    return attend_sessions


@numba.njit(nogil=True, **_OPTIONS)  # type: ignore[untyped-decorator]
def _attend_head(fields: Any, keys: Array, values: Array, session: Any, kv_head: Any) -> None:
    """One key/value head of one session: block by block for all rows, then joined with the parts, row by row."""
    num_q_heads, num_rows, head_dim = fields[_NUM_Q_HEADS], fields[_NUM_ROWS], fields[_HEAD_DIM]
    num_sessions, max_pages, page_tokens = fields[_NUM_SESSIONS], fields[_MAX_PAGES], fields[_PAGE_TOKENS]
    pages = carray(memory(fields[_PAGES]), (num_sessions, max_pages), np.int32)[session]
    starts = carray(memory(fields[_STARTS]), num_sessions + 1, np.int32)
    length: Any = np.int64(carray(memory(fields[_LENGTHS]), num_sessions, np.int32)[session])
    skipped: Any = np.int64(carray(memory(fields[_SKIPPED]), num_sessions, np.int32)[session])
    query = carray(memory(fields[_QUERY]), (num_q_heads, num_rows, head_dim), np.float32)
    out = carray(memory(fields[_OUT]), (num_rows, num_q_heads, head_dim), np.float32)
    logsumexps = carray(memory(fields[_LOGSUMEXPS]), (num_q_heads, num_rows), np.float32)
    scale = carray(memory(fields[_SCALE:].ctypes.data), 1, np.float32)[0]
    window = fields[_WINDOW]
    begin: Any = np.int64(starts[session])
    count: Any = np.int64(starts[session + 1]) - begin
    group = num_q_heads // fields[_NUM_KV_HEADS]
    wide = np.empty((2, BLOCK_TOKENS, head_dim), np.float32)
    scores = np.empty(BLOCK_TOKENS, np.float32)
    maxima = np.full((group, count), np.float32(-np.inf))
    totals = np.zeros((group, count), np.float32)
    for row in range(count):
        for head in range(group):
            for index in range(head_dim):
                out[begin + row, kv_head * group + head, index] = np.float32(0)
    least = max(skipped, length - count + 1 - window)  # token that the first row sees first
    for block in range(least // BLOCK_TOKENS * BLOCK_TOKENS, length, BLOCK_TOKENS):
        page, slot = np.int64(pages[block // page_tokens]), block % page_tokens
        first, stop = max(least - block, 0), min(BLOCK_TOKENS, length - block)
        for key in range(first, stop):
            for index in range(head_dim):
                wide[0, key, index] = widened(keys[page, kv_head, slot + key, index])
                wide[1, key, index] = widened(values[page, kv_head, slot + key, index])
        for row in range(max(0, block + first - (length - count)), count):
            behind = length - count + row + 1 - block  # the row itself
            seen, last = max(first, behind - window), min(stop, behind)
            if seen >= last:
                continue
            for head in range(group):
                _attend_block(
                    query[kv_head * group + head, begin + row], wide, scores, seen, last, scale,
                    maxima[head, row : row + 1], totals[head, row : row + 1],
                    out[begin + row, kv_head * group + head],
                )  # fmt: skip
    first_row = np.int64(starts[fields[_FIRST_SESSION]])
    part_rows = np.int64(starts[fields[_LAST_SESSION]]) - first_row
    part_shape = (fields[_NUM_PARTS], num_q_heads, part_rows, head_dim)
    parts = carray(memory(fields[_PARTS]), part_shape, np.float32)
    others = carray(memory(fields[_PART_LOGSUMEXPS]), part_shape[:3], np.float32)
    for row in range(count):
        for head in range(group):
            place = kv_head * group + head
            logsumexps[place, begin + row] = _join(
                parts[:, place, begin + row - first_row], others[:, place, begin + row - first_row],
                maxima[head, row], totals[head, row], out[begin + row, place],
            )  # fmt: skip


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _attend_block(
    query: Array,
    wide: Array,
    scores: Array,
    first: int,
    last: int,
    scale: Any,
    maximum: Array,
    total: Array,
    out: Array,
) -> None:
    """One row over tokens `[first, last)` of a block; `maximum`, `total` and the weighted sum in `out` go on.

    Views that begin at 0 let loops over them fill vectors, as numba minds negative indices.
    """
    weights = scores[first:last]
    _score(query, wide[0, first:last], scale, weights)
    largest = maximum[0]
    for key in range(weights.shape[0]):
        largest = max(largest, weights[key])
    correction = exponential(maximum[0] - largest)
    added = np.float32(0)
    for key in range(weights.shape[0]):
        weights[key] = exponential(weights[key] - largest)
        added += weights[key]
    for index in range(out.shape[0]):
        out[index] *= correction
    _add_weighted(weights, wide[1, first:last], out)
    maximum[0] = largest
    total[0] = total[0] * correction + added


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _score(query: Array, keys: Array, scale: Any, scores: Array) -> None:
    """Scores of keys `[num_keys, head_dim]`, four at a time: sums that do not wait for each other."""
    in_fours = scores.shape[0] // 4 * 4
    for key in range(0, in_fours, 4):
        one, two, three, four = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for index in range(query.shape[0]):
            channel = query[index]
            one += channel * keys[key, index]
            two += channel * keys[key + 1, index]
            three += channel * keys[key + 2, index]
            four += channel * keys[key + 3, index]
        scores[key], scores[key + 1], scores[key + 2], scores[key + 3] = (
            one * scale, two * scale, three * scale, four * scale,
        )  # fmt: skip
    for key in range(in_fours, scores.shape[0]):
        score = np.float32(0)
        for index in range(query.shape[0]):
            score += query[index] * keys[key, index]
        scores[key] = score * scale


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _add_weighted(weights: Array, values: Array, out: Array) -> None:
    """Add weighted values `[num_keys, head_dim]`, four at a time: sums are read and written a quarter as often."""
    in_fours = weights.shape[0] // 4 * 4
    for key in range(0, in_fours, 4):
        one, two, three, four = weights[key], weights[key + 1], weights[key + 2], weights[key + 3]
        for index in range(out.shape[0]):
            out[index] += (one * values[key, index] + two * values[key + 1, index]) + (
                three * values[key + 2, index] + four * values[key + 3, index]
            )
    for key in range(in_fours, weights.shape[0]):
        for index in range(out.shape[0]):
            out[index] += weights[key] * values[key, index]


@numba.njit(inline="always", **_OPTIONS)  # type: ignore[untyped-decorator]
def _join(parts: Array, others: Array, maximum: Any, total: Any, out: Array) -> Any:
    """Add what a row found in other segments, and divide; returns the logsumexp of all."""
    largest = maximum
    for part in range(parts.shape[0]):
        largest = max(largest, others[part])
    share = exponential(maximum - largest)
    total *= share
    for index in range(out.shape[0]):
        out[index] *= share
    for part in range(parts.shape[0]):
        share = exponential(others[part] - largest)
        total += share
        for index in range(out.shape[0]):
            out[index] += share * parts[part, index]
    for index in range(out.shape[0]):
        out[index] /= total
    return largest + np.log(total)
