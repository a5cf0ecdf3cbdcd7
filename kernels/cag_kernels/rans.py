"""Entropy decoding of many segments at once: static rANS, 32 tokens of a segment side by side, a table for each code.

Tables, words and states in, integer codes out; `inverse.inverse_transform` makes keys or values of them. The stream is
that of the codec `transform` (docs/format.md 5.4, since its tables go by token and component).
Source: Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392 (interleaving).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cag_kernels.device import triton_runs_on

LANES = 32
SLOTS = 4096
LOWEST_STATE = 1 << 16
MIDDLE = 64  # the symbol of code 0; symbol 0 stands for the next escape


class RansSegments(NamedTuple):
    """Segments of one side of one group of layers; all tensors on one device, contiguous.

    states: int32 `[num_segments, 32]`, bit patterns of unsigned numbers.
    words: int16, the segments' words one behind the other, bit patterns of unsigned numbers.
    word_starts: int32 `[num_segments + 1]`, where each segment's words begin.
    escapes, escape_starts: int16 and int32, in the same way.
    token_starts: int32 `[num_segments + 1]`, in the same way for coded tokens.
    token_shifts: int8, one a coded token.
    component_shifts: int8 `[num_segments, num_components]`.
    """

    states: Tensor
    words: Tensor
    word_starts: Tensor
    escapes: Tensor
    escape_starts: Tensor
    token_starts: Tensor
    token_shifts: Tensor
    component_shifts: Tensor


class RansSide(NamedTuple):
    """One side of one group of layers; all tensors on one device, contiguous.

    segments: see there. Words and escapes that are missing count as 0.
    slots: int32 `[num_tables, 4096]`, bit patterns of `symbol << 24 | frequency << 12 | place`.
    tables: int8 `[num_components]`: a code has table `tables + component shift + token shift`, within the tables.
    low_bits: int8 `[num_components]`, 0 to 15.
    num_blocks: of 32 tokens, in all segments together (`count_blocks`), or more.
    """

    segments: RansSegments
    slots: Tensor
    tables: Tensor
    low_bits: Tensor
    num_blocks: int


class CodeBlocks(NamedTuple):
    """Codes in the order in which they are decoded, which is the quickest to write.

    blocks: int16 `[num_blocks, num_components, 32]`: 32 tokens of a segment. What has no token means nothing.
    tokens: int32 `[num_blocks * 32]`: the token of each place, rising, -1 where there is none.
    num_tokens: that have a place.
    """

    blocks: Tensor
    tokens: Tensor
    num_tokens: int

    def by_token(self) -> Tensor:
        """int16 `[num_tokens, num_components]`."""
        return self.blocks.transpose(1, 2).flatten(0, 1)[self.tokens >= 0]


def decode_segments(sides: Sequence[RansSide]) -> list[tuple[CodeBlocks, Tensor]]:
    """Codes of all segments of each side, and which segments are whole; see `decode_segments_reference`.

    A segment is read one code behind the other, so all that can be read beside each other belongs into one call: sides
    may differ in everything, the number of their components too.

    Raises:
        ValueError: tensors that do not fit together, or that lie on several devices.
    """
    for side in sides:
        _check(side, sides[0].slots.device)
    if not sides or not triton_runs_on(sides[0].slots.device):
        return [_decoded(side) for side in sides]
    from cag_kernels.triton.rans import decode_on_device

    return decode_on_device(sides)


def count_blocks(token_counts: Sequence[int]) -> int:
    """Blocks of segments of so many tokens."""
    return sum(-(-int(count) // LANES) for count in token_counts)


def _decoded(side: RansSide) -> tuple[CodeBlocks, Tensor]:
    """By the reference, as the kernel lays codes out."""
    (codes, whole), starts = decode_segments_reference(side), side.segments.token_starts
    ends = ((starts.diff() + LANES - 1) // LANES).cumsum(0)
    shifts = torch.nn.functional.pad(ends, (1, 0))[:-1] * LANES - starts[:-1]
    numbers, num_places = torch.arange(codes.shape[1], dtype=torch.int32), side.num_blocks * LANES
    places = numbers + torch.repeat_interleave(shifts, starts.diff())
    blocks, tokens = codes.new_zeros(num_places, len(codes)), numbers.new_full((num_places,), -1)
    blocks[places], tokens[places] = codes.T, numbers
    blocks = blocks.view(side.num_blocks, LANES, len(codes)).transpose(1, 2).contiguous()
    return CodeBlocks(blocks, tokens, len(numbers)), whole


def decode_segments_reference(side: RansSide) -> tuple[Tensor, Tensor]:
    """Codes int16 `[num_components, num_tokens]`, tokens of all segments side by side, and which segments are whole.

    A segment's tokens come in blocks of 32, a lane each; a block is read component by component. With the entry of
    the state's slot, `x = frequency * (x >> 12) + place`; below 65536 a lane takes in the next word, lanes in order.
    Low bits are taken off the state in the same way.

    Returns:
        codes, and bool `[num_segments]`: whether all states ended at 65536 with no word and no escape left.
    """
    segments, slots, tables, low_bits, _ = side
    num_segments = segments.states.shape[0]
    codes = torch.empty((len(tables), len(segments.token_shifts)), dtype=torch.int16, device=slots.device)
    whole = torch.zeros(num_segments, dtype=torch.bool, device=slots.device)
    for segment in range(num_segments):
        reader = _Reader(segments, segment)
        first, last = segments.token_starts[segment : segment + 2].tolist()
        for begin in range(first, last, LANES):
            tokens = slice(begin, min(begin + LANES, last))
            for component in range(len(tables)):
                number = int(tables[component]) + int(segments.component_shifts[segment, component])
                table = (number + segments.token_shifts[tokens].long()).clamp(0, len(slots) - 1)
                codes[component, tokens] = reader.codes(slots, table, int(low_bits[component]))
        whole[segment] = reader.is_whole()
    return codes, whole


class _Reader:
    """States, and places among words and escapes, of one segment that is being read."""

    def __init__(self, segments: RansSegments, segment: int) -> None:
        self._states = segments.states[segment].long() & 0xFFFFFFFF
        self._words = segments.words[slice(*segments.word_starts[segment : segment + 2].tolist())].long() & 0xFFFF
        self._escapes = segments.escapes[slice(*segments.escape_starts[segment : segment + 2].tolist())].long()
        self._num_words = self._num_escapes = 0

    def codes(self, slots: Tensor, table: Tensor, low_bits: int) -> Tensor:
        """The codes of one component of a block."""
        states = self._states[: len(table)]
        entry = slots[table, states & SLOTS - 1].long() & 0xFFFFFFFF
        states = (entry >> 12 & SLOTS - 1) * (states >> 12) + (entry & SLOTS - 1)
        states = self._filled(states)
        symbols, rest = entry >> 24, torch.zeros_like(states)
        if low_bits:
            rest, states = states & (1 << low_bits) - 1, self._filled(states >> low_bits)
        self._states[: len(table)] = states
        escaped = symbols == 0
        found = (symbols - MIDDLE << low_bits) + rest
        if count := int(escaped.sum()):
            found[escaped] = _taken(self._escapes, self._num_escapes, count)
            self._num_escapes += count
        return found.to(torch.int16)

    def is_whole(self) -> bool:
        """Whether the segment ended where its parts do."""
        ended = self._num_words == len(self._words) and self._num_escapes == len(self._escapes)
        return ended and bool((self._states == LOWEST_STATE).all())

    def _filled(self, states: Tensor) -> Tensor:
        low = states < LOWEST_STATE
        if count := int(low.sum()):
            states[low] = states[low] << 16 | _taken(self._words, self._num_words, count)
            self._num_words += count
        return states


def _taken(numbers: Tensor, first: int, count: int) -> Tensor:
    """The next numbers, 0 behind the end."""
    found = numbers[first : first + count]
    return found if len(found) == count else torch.nn.functional.pad(found, (0, count - len(found)))


def _check(side: RansSide, device: torch.device) -> None:
    segments, slots, tables, low_bits, num_blocks = side
    count, num_components = segments.states.shape[0], tables.shape[0]
    dtypes = [torch.int32, torch.int16, torch.int32, torch.int16, torch.int32, torch.int32, torch.int8, torch.int8]
    parts, starts = (*segments, slots, tables, low_bits), (*segments[2:5:2], segments.token_starts)
    fits = (
        [part.dtype for part in parts] == [*dtypes, torch.int32, torch.int8, torch.int8]
        and segments.states.shape == (count, LANES)
        and all(part.shape == (count + 1,) for part in starts)
        and segments.component_shifts.shape == (count, num_components)
        and slots.ndim == 2
        and slots.shape[0] > 0
        and slots.shape[1] == SLOTS
        and tables.shape == low_bits.shape == (num_components,)
        and num_blocks * LANES >= len(segments.token_shifts)
        and all(part.is_contiguous() and part.device == device for part in parts)
    )
    if not fits:
        shapes = ", ".join(f"{part.dtype} {tuple(part.shape)} on {part.device}" for part in parts)
        raise ValueError(f"parts of entropy-coded segments do not fit each other or {num_blocks} blocks: {shapes}")
