"""Triton kernel of `rans.decode_segments`: one warp a segment, a lane a token of a block.

`x = frequency * (x >> 12) + place`, words taken in by a running count over the lanes. Grid: `(segments,)`. Unsigned
32-bit integers. Nothing outside of a segment's words and escapes is read, whatever they say. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.rans import LANES, RansSegments


@triton.jit
def _taken(numbers, wanting, position, end):
    """For each lane that wants one the next number, 0 behind the end; and how many were wanted."""
    wanted = wanting.to(tl.int32)
    places = position + tl.cumsum(wanted, 0) - wanted
    return tl.load(numbers + places, mask=wanting & (places < end), other=0), tl.sum(wanted, 0)


@triton.jit
def _filled(states, is_token, words, position, end):
    """States with a word taken in where they are low, and the place of the next word."""
    low = is_token & (states < 65536)
    found, count = _taken(words, low, position, end)
    widened = found.to(tl.int32).to(tl.uint32, bitcast=True) & 0xFFFF
    return tl.where(low, (states << 16) | widened, states), position + count


@triton.jit
def decode_segment(
    states, words, word_starts, escapes, escape_starts, token_starts, token_shifts, component_shifts, slots, tables,
    low_bits, codes, whole, num_components, num_tokens, num_tables, lanes: tl.constexpr,
):  # fmt: skip
    """One segment."""
    segment, lane = tl.program_id(0), tl.arange(0, lanes)
    state = tl.load(states + segment * lanes + lane).to(tl.uint32, bitcast=True)
    word, last_word = tl.load(word_starts + segment), tl.load(word_starts + segment + 1)
    escape, last_escape = tl.load(escape_starts + segment), tl.load(escape_starts + segment + 1)
    first, last = tl.load(token_starts + segment), tl.load(token_starts + segment + 1)
    for begin in range(first, last, lanes):
        tokens = begin + lane
        is_token = tokens < last
        target = codes + tokens
        token_shift = tl.load(token_shifts + tokens, mask=is_token, other=0).to(tl.int32)
        for component in range(num_components):
            shift = tl.load(component_shifts + segment * num_components + component).to(tl.int32)
            table = tl.load(tables + component).to(tl.int32) + shift + token_shift
            table = tl.minimum(tl.maximum(table, 0), num_tables - 1)
            place = table * 4096 + (state & 4095).to(tl.int32)
            entry = tl.load(slots + place, mask=is_token, other=0).to(tl.uint32, bitcast=True)
            moved = ((entry >> 12) & 4095) * (state >> 12) + (entry & 4095)
            state, word = _filled(tl.where(is_token, moved, state), is_token, words, word, last_word)
            symbol = (entry >> 24).to(tl.int32)
            low = tl.load(low_bits + component).to(tl.int32)
            rest = state.to(tl.int32, bitcast=True) & ((1 << low) - 1)
            if low > 0:
                shrunk = tl.where(is_token, state >> low.to(tl.uint32), state)
                state, word = _filled(shrunk, is_token, words, word, last_word)
            escaped = is_token & (symbol == 0)
            number, count = _taken(escapes, escaped, escape, last_escape)
            escape += count
            code = tl.where(escaped, number.to(tl.int32), ((symbol - 64) << low) + rest)
            tl.store(target, code.to(tl.int16), mask=is_token)
            target += num_tokens
    ended = (word == last_word) & (escape == last_escape)
    at_rest = tl.sum((state != 65536).to(tl.int32), 0) == 0
    tl.store(whole + segment, (ended & at_rest).to(tl.int8))


def decode_on_device(segments: RansSegments, slots: Tensor, tables: Tensor, low_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and whether each segment is whole, as `rans.decode_segments_reference` gives them."""
    num_segments, num_components, num_tokens = segments.states.shape[0], len(tables), len(segments.token_shifts)
    codes = torch.empty((num_components, num_tokens), dtype=torch.int16, device=slots.device)
    whole = torch.empty(num_segments, dtype=torch.int8, device=slots.device)
    if num_segments:
        decode_segment[(num_segments,)](
            *segments, slots, tables, low_bits, codes, whole, num_components, num_tokens, slots.shape[0],
            lanes=LANES, num_warps=1,
        )  # fmt: skip
    return codes, whole.bool()
