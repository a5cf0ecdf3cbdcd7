"""Triton kernel of `rans.decode_segments`: one warp a segment, a lane a token of a block.

`x = frequency * (x >> 12) + place`, words taken in by a vote of the lanes. Each step waits for the one before it, so
all that does not depend on a state is read ahead: numbers of tables for 32 components, words into the nearest cache.
Sides differ in their tensors, so their addresses come out of a table. Grid: `(most segments of a side, sides)`.
Unsigned 32-bit integers. Nothing outside of a segment's words and escapes is read, whatever they say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.rans import LANES, CodeBlocks, RansSide
from cag_kernels.triton.numbers import EMULATED

GROUP = tl.constexpr(4)  # components between two looks for escapes
AHEAD = tl.constexpr(16)  # words between those that two lanes read ahead: as many as the nearest cache takes in at once
NUM_FIELDS = tl.constexpr(17)  # of a side in the table
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
        tl.store(target, code.to(tl.int16))
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
            tl.store(target + index * lanes, code.to(tl.int16))
            entries += (entry,)
            least = tl.minimum(least, entry)
        if _has_escape(least, is_token):
            for index in tl.static_range(GROUP):
                place = target + index * lanes
                escapes, escapes_left = _store_escapes(place, entries[index], is_token, escapes, escapes_left, lower)
        target += GROUP * lanes
    return state, words, left, escapes, escapes_left, target


@triton.jit(do_not_specialize=["num_segments", "num_components", "num_tables"])
def describe_side(
    side, states, words, word_starts, escapes, escape_starts, token_starts, token_shifts, component_shifts, slots,
    tables, low_bits, blocks, block_tokens, whole, num_segments, num_components, num_tables,
):  # fmt: skip
    """A row of the table, `side`, int64: addresses and numbers in this order. The host has no part in it, so that a
    graph which is played again has them too."""
    tl.store(side, states.to(tl.int64))
    tl.store(side + 1, words.to(tl.int64))
    tl.store(side + 2, word_starts.to(tl.int64))
    tl.store(side + 3, escapes.to(tl.int64))
    tl.store(side + 4, escape_starts.to(tl.int64))
    tl.store(side + 5, token_starts.to(tl.int64))
    tl.store(side + 6, token_shifts.to(tl.int64))
    tl.store(side + 7, component_shifts.to(tl.int64))
    tl.store(side + 8, slots.to(tl.int64))
    tl.store(side + 9, tables.to(tl.int64))
    tl.store(side + 10, low_bits.to(tl.int64))
    tl.store(side + 11, blocks.to(tl.int64))
    tl.store(side + 12, block_tokens.to(tl.int64))
    tl.store(side + 13, whole.to(tl.int64))
    tl.store(side + 14, num_segments)
    tl.store(side + 15, num_components)
    tl.store(side + 16, num_tables)


@triton.jit
def _blocks_before(token_starts, segment, lane):
    """Blocks of the segments before this one, which are where its own begin."""
    counts, lanes = tl.zeros_like(lane), lane.shape[0]
    for begin in range(0, segment, lanes):
        before = begin + lane < segment
        first = tl.load(token_starts + begin + lane, mask=before, other=0)
        last = tl.load(token_starts + begin + lane + 1, mask=before, other=0)
        counts += (last - first + lanes - 1) // lanes
    return tl.sum(counts, 0)


@triton.jit
def decode_segment(sides, lanes: tl.constexpr):
    """One segment of a side, its components in windows of one for each lane."""
    side, segment, lane = sides + tl.program_id(1) * NUM_FIELDS, tl.program_id(0), tl.arange(0, lanes)
    if segment >= tl.load(side + 14):
        return
    num_components, num_tables = tl.load(side + 15).to(tl.int32), tl.load(side + 16).to(tl.int32)
    states = tl.load(side).to(tl.pointer_type(tl.int32))
    words = tl.load(side + 1).to(tl.pointer_type(tl.int16))
    word_starts = tl.load(side + 2).to(tl.pointer_type(tl.int32))
    escapes = tl.load(side + 3).to(tl.pointer_type(tl.int16))
    escape_starts = tl.load(side + 4).to(tl.pointer_type(tl.int32))
    token_starts = tl.load(side + 5).to(tl.pointer_type(tl.int32))
    token_shifts = tl.load(side + 6).to(tl.pointer_type(tl.int8))
    component_shifts = tl.load(side + 7).to(tl.pointer_type(tl.int8))
    slots = tl.load(side + 8).to(tl.pointer_type(tl.int32))
    tables = tl.load(side + 9).to(tl.pointer_type(tl.int8))
    low_bits = tl.load(side + 10).to(tl.pointer_type(tl.int8))
    blocks = tl.load(side + 11).to(tl.pointer_type(tl.int16))
    block_tokens = tl.load(side + 12).to(tl.pointer_type(tl.int32))
    whole = tl.load(side + 13).to(tl.pointer_type(tl.int8))
    zeros, last_table = tl.zeros_like(lane), num_tables - 1
    lower = ((zeros + 1) << lane) - 1
    state = tl.load(states + segment * lanes + lane).to(tl.uint32, bitcast=True)
    word, escape = tl.load(word_starts + segment), tl.load(escape_starts + segment)
    words, left = words + word + zeros, tl.load(word_starts + segment + 1) - word + zeros
    escapes, escapes_left = escapes + escape + zeros, tl.load(escape_starts + segment + 1) - escape + zeros
    first, last = tl.load(token_starts + segment), tl.load(token_starts + segment + 1)
    component_shifts += segment * num_components
    block = _blocks_before(token_starts, segment, lane)
    near, far, highest = zeros.to(tl.int16), zeros.to(tl.int16), zeros.to(tl.int16)
    for begin in range(first, last, lanes):
        tokens = begin + lane
        is_token = tokens < last
        tl.store(block_tokens + block * lanes + lane, tl.where(is_token, tokens, -1))
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
        block += 1
    never = highest.to(tl.int32) > 0xFFFF + num_tables  # which a compiler can't know: it would drop the words ahead
    wrong = (state != 65536) | (left != 0) | (escapes_left != 0) | never
    tl.store(whole + segment, (tl.sum(wrong.to(tl.int32), 0) == 0).to(tl.int8))


def decode_on_device(sides: Sequence[RansSide]) -> list[tuple[CodeBlocks, Tensor]]:
    """Codes as `rans.decode_segments_reference` gives them, in blocks, and whether each segment is whole."""
    device, num_places = sides[0].slots.device, [side.num_blocks * LANES for side in sides]
    table = torch.empty((len(sides), NUM_FIELDS.value), dtype=torch.int64, device=device)
    tokens = torch.full((sum(num_places),), -1, dtype=torch.int32, device=device).split(num_places)
    found = [_described(*both) for both in zip(table, sides, tokens, strict=True)]
    most_segments = max(len(whole) for _, whole in found)
    if most_segments:
        decode_segment[(most_segments, len(sides))](table, lanes=LANES, num_warps=1)
    return found


def _described(row: Tensor, side: RansSide, tokens: Tensor) -> tuple[CodeBlocks, Tensor]:
    """Where the codes of a side will be, and whether its segments are whole; `row` of the table says it too."""
    segments, num_components, device = side.segments, len(side.tables), row.device
    blocks = torch.empty((side.num_blocks, num_components, LANES), dtype=torch.int16, device=device)
    whole = torch.empty(len(segments.states), dtype=torch.bool, device=device)
    describe_side[(1,)](
        row, *segments, side.slots, side.tables, side.low_bits, blocks, tokens, whole.view(torch.int8),
        len(whole), num_components, len(side.slots), num_warps=1,
    )  # fmt: skip
    return CodeBlocks(blocks, tokens, len(segments.token_shifts)), whole
