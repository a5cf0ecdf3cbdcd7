"""Triton kernel of `rans.decode_segments`: one warp a segment, a lane a token of a block.

`x = frequency * (x >> 12) + place`, words taken in by a vote of the lanes. Each step waits for the one before it, so
all that does not depend on a state is read ahead: numbers of tables for 32 components, words into the nearest cache.
Grid: `(segments,)`. Unsigned 32-bit integers. Nothing outside of a segment's words and escapes is read, whatever they
say.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.rans import LANES, CodeBlocks, RansSegments, first_blocks, places_of
from cag_kernels.triton_numbers import EMULATED

GROUP = tl.constexpr(4)  # components between two looks for escapes
AHEAD = tl.constexpr(16)  # words between those that two lanes read ahead: as many as the nearest cache takes in at once
SMALLEST_SYMBOL = tl.constexpr(1 << 24)  # of an entry that is no escape
# $0: the flags of lower lanes, $1: those of all lanes; $2: this lane's flag, $3: a bit for each lower lane
_RANK = tl.constexpr("""{
    .reg .pred flag;
    .reg .b32 flags, lower;
    setp.ne.b32 flag, $2, 0;
    vote.sync.ballot.b32 flags, flag, 0xffffffff;
    and.b32 lower, flags, $3;
    popc.b32 $0, lower;
    popc.b32 $1, flags;
}""")
_OF_LANE = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;")


@triton.jit
def _rank(flags, lower_lanes):
    """Of each lane: how many lower lanes have a flag, and how many of all, which is the same in all lanes."""
    ones = flags.to(tl.int32)
    if EMULATED:
        rank, count = tl.cumsum(ones, 0) - ones, tl.sum(ones, 0) + tl.zeros_like(ones)
    else:
        rank, count = tl.inline_asm_elementwise(
            _RANK, "=r,=r,r,r", [ones, lower_lanes], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
        )
    return rank, count


@triton.jit
def _of_lane(numbers, index, lane):
    """The number of one lane, in all lanes."""
    if EMULATED:
        found = tl.sum(tl.where(lane == index, numbers, 0), 0) + tl.zeros_like(numbers)
    else:
        found = tl.inline_asm_elementwise(
            _OF_LANE, "=r,r,r", [numbers, index + tl.zeros_like(numbers)], dtype=tl.int32, is_pure=False, pack=1
        )
    return found


@triton.jit
def _taken(numbers, left, wanting, lower_lanes):
    """For each lane that wants one the next number, 0 behind the end; what follows them, and how many are left."""
    rank, count = _rank(wanting, lower_lanes)
    found = tl.load(numbers + rank, mask=wanting & (rank < left), other=0)
    return found.to(tl.int32), numbers + count, left - count


@triton.jit
def _filled(state, is_token, words, left, lower_lanes):
    """States with a word taken in where they are low, and the words that follow."""
    low = is_token & (state < 65536)
    found, words, left = _taken(words, left, low, lower_lanes)
    return tl.where(low, (state << 16) | (found.to(tl.uint32, bitcast=True) & 0xFFFF), state), words, left


@triton.jit
def _symbol(state, number, is_token, words, left, slots, last_table, lower_lanes):
    """The slot's entry of each state, and states and words after it. What idle lanes have means nothing."""
    table = tl.minimum(tl.maximum(number, 0), last_table)
    entry = tl.load(slots + table * 4096 + (state & 4095).to(tl.int32)).to(tl.uint32, bitcast=True)
    state = ((entry >> 12) & 4095) * (state >> 12) + (entry & 4095)
    state, words, left = _filled(state, is_token, words, left, lower_lanes)
    return entry, state, words, left


@triton.jit
def _store_escapes(target, entry, is_token, escapes, escapes_left, lower_lanes):
    """The next escapes to where a code is one, and those that follow."""
    escaped = is_token & (entry < SMALLEST_SYMBOL)
    found, escapes, escapes_left = _taken(escapes, escapes_left, escaped, lower_lanes)
    tl.store(target, found.to(tl.int16), mask=escaped)
    return escapes, escapes_left


@triton.jit
def _has_escape(entry, is_token):
    """Whether any token has an entry of the symbol 0."""
    return tl.min(tl.where(is_token, entry, SMALLEST_SYMBOL), 0) < SMALLEST_SYMBOL


@triton.jit
def _components(tables, component_shifts, low_bits, component, num_components):
    """Table, shift and low bits of a component for each lane, as they are: they are waited for where they are used."""
    there = component < num_components
    table = tl.load(tables + component, mask=there, other=0)
    shift = tl.load(component_shifts + component, mask=there, other=0)
    return table, shift, tl.load(low_bits + component, mask=there, other=0)


@triton.jit
def _ahead(words, left, place):
    """A word that will be wanted for each lane, so that it and those beside it come into the nearest cache."""
    return tl.load(words + place, mask=place < left, other=0)


@triton.jit
def _decode_any(
    state, words, left, escapes, escapes_left, target, is_token, shift, numbers, lows, count, slots,
    last_table, lane, lower,
):  # fmt: skip
    """The first `count` components of a window, some with low bits."""
    for index in range(count):
        number, low = _of_lane(numbers, index, lane) + shift, _of_lane(lows, index, lane)
        entry, state, words, left = _symbol(state, number, is_token, words, left, slots, last_table, lower)
        rest = state.to(tl.int32, bitcast=True) & ((1 << low) - 1)
        shrunk = is_token & (low > 0)
        state = tl.where(shrunk, state >> low.to(tl.uint32, bitcast=True), state)
        state, words, left = _filled(state, shrunk, words, left, lower)
        code = (((entry >> 24).to(tl.int32) - 64) << low) + rest
        tl.store(target, code.to(tl.int16), mask=is_token)
        if _has_escape(entry, is_token):
            escapes, escapes_left = _store_escapes(target, entry, is_token, escapes, escapes_left, lower)
        target += lane.shape[0]
    return state, words, left, escapes, escapes_left, target


@triton.jit
def _decode_plain(
    state, words, left, escapes, escapes_left, target, is_token, shift, numbers, slots, last_table, lane,
    lower, lanes: tl.constexpr,
):  # fmt: skip
    """All components of a full window without low bits; escapes are looked for once a group."""
    number = _of_lane(numbers, 0, lane) + shift
    for begin in range(0, lanes, GROUP):
        entries = ()
        least = tl.full((lanes,), 0xFFFFFFFF, tl.uint32)
        for index in tl.static_range(GROUP):
            next_number = _of_lane(numbers, begin + index + 1, lane) + shift
            entry, state, words, left = _symbol(state, number, is_token, words, left, slots, last_table, lower)
            number = next_number
            code = (entry >> 24).to(tl.int32) - 64
            tl.store(target + index * lanes, code.to(tl.int16), mask=is_token)
            entries += (entry,)
            least = tl.minimum(least, entry)
        if _has_escape(least, is_token):
            for index in tl.static_range(GROUP):
                place = target + index * lanes
                escapes, escapes_left = _store_escapes(place, entries[index], is_token, escapes, escapes_left, lower)
        target += GROUP * lanes
    return state, words, left, escapes, escapes_left, target


@triton.jit
def decode_segment(
    states, words, word_starts, escapes, escape_starts, token_starts, token_shifts, component_shifts, slots, tables,
    low_bits, block_starts, blocks, whole, num_components, num_tables, lanes: tl.constexpr,
):  # fmt: skip
    """One segment, its components in windows of one for each lane."""
    segment, lane = tl.program_id(0), tl.arange(0, lanes)
    zeros, last_table = tl.zeros_like(lane), num_tables - 1
    lower = ((zeros + 1) << lane) - 1
    state = tl.load(states + segment * lanes + lane).to(tl.uint32, bitcast=True)
    word, escape = tl.load(word_starts + segment), tl.load(escape_starts + segment)
    words, left = words + word + zeros, tl.load(word_starts + segment + 1) - word + zeros
    escapes, escapes_left = escapes + escape + zeros, tl.load(escape_starts + segment + 1) - escape + zeros
    first, last = tl.load(token_starts + segment), tl.load(token_starts + segment + 1)
    component_shifts += segment * num_components
    near, far, highest = zeros.to(tl.int16), zeros.to(tl.int16), zeros.to(tl.int16)
    for begin in range(first, last, lanes):
        tokens = begin + lane
        is_token = tokens < last
        block = tl.load(block_starts + segment) + (begin - first) // lanes
        target, idle = blocks + block.to(tl.int64) * (num_components * lanes) + lane, state
        shift = tl.load(token_shifts + tokens, mask=is_token, other=0).to(tl.int32)
        table, component_shift, low = _components(tables, component_shifts, low_bits, lane, num_components)
        for window in range(0, num_components, lanes):
            later = window + lanes + lane
            numbers, lows = table.to(tl.int32) + component_shift.to(tl.int32), low.to(tl.int32)
            table, component_shift, low = _components(tables, component_shifts, low_bits, later, num_components)
            highest = tl.maximum(highest, tl.maximum(near, far))
            near, far = _ahead(words, left, lane * AHEAD), _ahead(words, left, (lanes + lane) * AHEAD)
            if (tl.max(lows, 0) > 0) | (window + lanes > num_components):
                state, words, left, escapes, escapes_left, target = _decode_any(
                    state, words, left, escapes, escapes_left, target, is_token, shift, numbers, lows,
                    tl.minimum(num_components - window, lanes), slots, last_table, lane, lower,
                )  # fmt: skip
            else:
                state, words, left, escapes, escapes_left, target = _decode_plain(
                    state, words, left, escapes, escapes_left, target, is_token, shift, numbers, slots,
                    last_table, lane, lower, lanes,
                )  # fmt: skip
        state = tl.where(is_token, state, idle)
    never = highest.to(tl.int32) > 0xFFFF + num_tables  # which a compiler can't know: it would drop the words ahead
    wrong = (state != 65536) | (left != 0) | (escapes_left != 0) | never
    tl.store(whole + segment, (tl.sum(wrong.to(tl.int32), 0) == 0).to(tl.int8))


def decode_on_device(
    segments: RansSegments, slots: Tensor, tables: Tensor, low_bits: Tensor
) -> tuple[CodeBlocks, Tensor]:
    """Codes as `rans.decode_segments_reference` gives them, in blocks, and whether each segment is whole."""
    num_segments, num_components, num_tokens = segments.states.shape[0], len(tables), len(segments.token_shifts)
    most_blocks = num_tokens // LANES + num_segments  # how many there are is on the device only
    blocks = torch.empty((most_blocks, num_components, LANES), dtype=torch.int16, device=slots.device)
    whole = torch.empty(num_segments, dtype=torch.bool, device=slots.device)
    if num_segments:
        block_starts = first_blocks(segments.token_starts)
        decode_segment[(num_segments,)](
            *segments, slots, tables, low_bits, block_starts, blocks, whole.view(torch.int8), num_components,
            slots.shape[0], lanes=LANES, num_warps=1,
        )  # fmt: skip
    return CodeBlocks(blocks, places_of(segments.token_starts, num_tokens)), whole
