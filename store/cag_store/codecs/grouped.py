"""Integer codes with a scale and an offset a group: what `int8` and `int4` share. Keys are grouped per channel over
tokens, values per token over channels. Layout and arithmetic: docs/format.md 5.2 and 5.3.

Scales and offsets are bfloat16: the range of the data itself, so nothing overflows. Non-finite values are refused.
Source: keys per channel, values per token as in KIVI (arXiv:2402.02750);
first tokens exact as in KVQuant (arXiv:2401.18079).
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops
from cag_store.codecs.base import (
    BulkDecoder,
    Codec,
    Config,
    EncodedSegment,
    Packer,
    Side,
    Target,
    checked_array,
    checked_int,
    corrupt_segment,
    left_over,
    tokens_of,
)
from cag_store.codecs.coded import CodedShape, CodedSide
from cag_store.codecs.streams import StreamSide
from cag_store.codecs.widths import CodeWidth, to_bfloat16
from cag_store.dtypes import Array, narrow_into, widen
from cag_store.errors import UnencodableArray

_SIDES: tuple[Side, Side] = ("keys", "values")
_HEAD = struct.Struct("<BBHII")
_LARGEST = np.float32(1e38)
_BLOCK_TOKENS = 256  # decoded at once: float32 scratch that stays in the cache of a core


class QuantizedGroups(NamedTuple):
    """Codes with their scales and offsets.

    codes: int8 [num_kv_heads, num_tokens, head_dim]; scales, offsets: float32 that are exact bfloat16 values, keys
    [num_kv_heads, num_groups, head_dim], values [num_kv_heads, num_tokens, num_channel_groups].
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32]


class _Parsed(NamedTuple):
    """A segment taken apart: codes as stored, scales and offsets as bit patterns `[2, ...]`, and the exact tokens, of
    which the first `num_first` stand at the beginning of the chunk and the others at its end."""

    side: Side
    width: CodeWidth
    codes: Array
    parameters: NDArray[np.uint16]
    exact: Array
    num_first: int


class GroupedIntegers(Codec):
    """A codec of groups. `widths` says which numbers in the head of a segment stand for which width of its codes."""

    lossless = False
    widths: Mapping[int, CodeWidth]

    def __init__(self, group_tokens: int, exact_tokens: int, packer: Packer | None) -> None:
        self.group_tokens = group_tokens
        self.exact_tokens = exact_tokens
        self.packer = packer

    @classmethod
    def _common(cls, config: Mapping[str, Any]) -> tuple[int, int, Packer | None]:
        """`group_tokens` 1 to 65536, `exact_tokens` 0 to 65536, `packer` (configuration or null). Raises:
        UnknownCodec."""
        from cag_store.codecs import packer_from_config

        packer = config.get("packer")
        return (
            checked_int(cls.codec_id, config, "group_tokens", 64, 1, 1 << 16),
            checked_int(cls.codec_id, config, "exact_tokens", 4, 0, 1 << 16),
            None if packer is None else packer_from_config(packer),
        )

    def _packer_config(self) -> Config | None:
        return None if self.packer is None else self.packer.config()

    @abstractmethod
    def _mark(self, side: Side, layer: int | None) -> int:
        """Which of `widths` one side of a layer has; None: of a layer like most."""

    @abstractmethod
    def _channels(self, head_dim: int) -> int:
        """Channels of a group of values; at least 1."""

    def _num_first(self, num_tokens: int, start: int) -> int:
        """How many tokens at the beginning of a chunk are exact: those of the prefix' first `exact_tokens`."""
        return min(max(self.exact_tokens - start, 0), num_tokens)

    def _num_recent(self, num_tokens: int, num_first: int) -> int:  # noqa: ARG002
        """How many tokens at the end of a chunk are exact, besides `num_first` at its beginning."""
        return 0

    def encode(self, array: Array, dtype: str, side: Side = "keys", start: int = 0) -> bytes:
        """See `Codec`. Raises: UnencodableArray for NaN, infinities and magnitudes above 1e38."""
        return self._encode(array, dtype, side, None, start)

    def encode_layers(self, arrays: Sequence[Array], dtype: str, side: Side, first_layer: int, start: int = 0) -> bytes:
        """See `Codec` and `encode`."""
        (array,) = arrays
        return self._encode(array, dtype, side, first_layer, start)

    def decode_into(self, data: bytes | memoryview, out: Array) -> None:
        """See `Codec`."""
        self._decode(self._parse(memoryview(data), out), out)

    def decode_layers_into(
        self, data: bytes | memoryview, outs: Sequence[Array], side: Side, first_layer: int, start: int = 0
    ) -> None:
        """See `Codec`."""
        (out,) = outs
        self._decode(self._parsed_layer(memoryview(data), out, side, first_layer, start), out)

    def _parsed_layer(self, view: memoryview, out: Array, side: Side, layer: int, start: int) -> _Parsed:
        """The parts of a segment that is of this side, layer and place; of `out` only shape and type count."""
        parsed = self._parse(view, out)
        bits, num_first = self.widths[self._mark(side, layer)].bits, self._num_first(out.shape[1], start)
        expected, found = (side, bits, num_first), (parsed.side, parsed.width.bits, parsed.num_first)
        if found != expected:
            raise corrupt_segment(f"side, bits and exact tokens of layer {layer}", expected, found)
        return parsed

    def coded_shape(self, shape: tuple[int, int, int], side: Side, layer: int, chunk_tokens: int) -> CodedShape | None:
        """See `Codec`; None where groups or rows of codes are cut by chunks or bytes."""
        num_heads, num_tokens, head_dim = shape
        bits, channels = self.widths[self._mark(side, layer)].bits, self._channels(head_dim)
        if chunk_tokens % self.group_tokens or head_dim * bits % 16 or chunk_tokens < self.exact_tokens:
            return None
        start = (num_tokens - 1) // chunk_tokens * chunk_tokens
        last = num_tokens - start
        num_recent = self._num_recent(last, self._num_first(last, start))
        if num_recent == num_tokens:
            return None
        num_first = self._num_first(num_tokens - num_recent, 0)
        along = "tokens" if side == "keys" else "channels"
        coded = num_tokens - num_recent
        return CodedShape(num_heads, head_dim, coded, num_first, num_recent, bits, self.group_tokens, channels, along)

    def keep_codes(self, segments: Sequence[EncodedSegment], num_tokens: int) -> None:
        """See `Codec`. What is plain moves in one compiled step, which needs no interpreter's lock."""
        fast, left = loops.compiled(), segments
        if fast is not None and segments and all(_can_keep(segment.outs[0]) for segment in segments):
            span = self._span(segments[0].start, num_tokens)
            left = left_over(segments, fast.keep_grouped(*self._plain(segments), span))
        for segment in left:
            self._keep(segment, num_tokens)

    def decode_segments(self, segments: Sequence[EncodedSegment]) -> None:
        """See `Codec`. What is plain is dequantized in one compiled step, which needs no interpreter's lock."""
        fast = loops.compiled()
        for num_tokens, same in groupby(segments, key=tokens_of):
            left = list(same)
            if fast is not None and all(_can_decode(segment.outs[0]) for segment in left):
                span = self._span(left[0].start, num_tokens)._replace(start=0)
                left = left_over(left, fast.decode_grouped(*self._plain(left), span))
            super().decode_segments(left)

    def bulk_decoder(self, buffers: Sequence[Sequence[Target]], first_tokens: Sequence[int]) -> BulkDecoder | None:
        """See `Codec`."""
        fast, outs = loops.compiled(), [out for sides in buffers for out in sides]
        keeps = all(map(_can_keep, outs))
        if fast is None or not (keeps or all(map(_can_decode, outs))):
            return None
        num_sides = len(buffers[0])
        places = ((side, layer, first) for layer, first in enumerate(first_tokens) for side in _SIDES[:num_sides])
        rows = np.array([self._row(out, *place) for out, place in zip(outs, places, strict=True)], np.int64)
        return BulkDecoder(loops.Loop(loops.KEPT if keeps else loops.GROUPED), rows, self._span)

    def _plain(
        self, segments: Sequence[EncodedSegment]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]:
        """Pieces, hashes and rows of verified segments, as `Loops` takes them."""
        rows = [self._row(part.outs[0], part.side, part.first_layer, _kept_from(part)) for part in segments]
        return loops.addresses(segment.data for segment in segments), loops.UNVERIFIED, np.array(rows, np.int64)

    def _row(self, out: Target, side: Side, layer: int, kept_from: int) -> tuple[int, ...]:
        """What `Loops.decode_grouped` or `Loops.keep_grouped` takes of a segment. They count tokens from the beginning
        of the prefix on, so places are where token 0 would lie if `out` did not begin with token `kept_from`."""
        assert not isinstance(out, StreamSide)
        arrays, numbers = (out, out.recent) if isinstance(out, CodedSide) else ((out,), out)
        num_heads, _, head_dim = numbers.shape
        mark, is_keys = self._mark(side, layer), side == "keys"
        group_size = self.group_tokens if is_keys else self._channels(head_dim)
        places = [number for array in arrays for number in (array.ctypes.data, array.strides[0])]
        if kept_from:
            group = self._parameter_at(side, kept_from)
            missing = kept_from, group, group, kept_from, 0  # rows of each array
            for at, array in enumerate(arrays):
                places[2 * at] -= missing[at] * array.strides[1]
        return (num_heads, head_dim, self.widths[mark].bits, int(is_keys), group_size, mark, numbers.itemsize, *places)

    def _parameter_at(self, side: Side, token: int) -> int:
        """The row of scales or offsets of a token that begins a group."""
        return token // self.group_tokens if side == "keys" else token

    def _span(self, start: int, num_tokens: int) -> loops.ChunkSpan:
        num_first = self._num_first(num_tokens, start)
        return loops.ChunkSpan(start, num_tokens, num_first, self._num_recent(num_tokens, num_first))

    def _keep(self, segment: EncodedSegment, num_tokens: int) -> None:
        """Any segment; numpy moves it."""
        (out,), side, start = segment.outs, segment.side, segment.start
        assert isinstance(out, CodedSide)
        shape = out.codes.shape[0], num_tokens, out.recent.shape[2]
        like = np.broadcast_to(np.empty((), out.recent.dtype), shape)
        parsed = self._parsed_layer(segment.data, like, side, segment.first_layer, start)
        num_first, num_coded = parsed.num_first, num_tokens - (parsed.exact.shape[1] - parsed.num_first)
        at = start - segment.kept_from
        out.codes[:, at : at + num_coded] = parsed.codes[:, :num_coded]
        first = self._parameter_at(side, at)
        count = -(-num_coded // self.group_tokens) if side == "keys" else num_coded
        for target, source in zip((out.scales, out.offsets), parsed.parameters, strict=True):
            target[:, first : first + count] = source[:, :count]
        if num_first:
            out.first[:, at : at + num_first] = parsed.exact[:, :num_first]
        if num_coded < num_tokens:
            out.recent[:] = parsed.exact[:, num_first:]

    def _encode(self, array: Array, dtype: str, side: Side, layer: int | None, start: int) -> bytes:
        values = widen(checked_array(array, dtype), dtype)
        if not np.all(np.abs(values) <= _LARGEST):
            raise UnencodableArray(
                f"codec {self.codec_id!r} keeps finite values up to 1e38, found NaN, infinity or more: use 'lossless'",
                codec=self.codec_id,
            )
        mark, first = self._mark(side, layer), self._num_first(array.shape[1], start)
        end = array.shape[1] - self._num_recent(array.shape[1], first)
        width = self.widths[mark]
        groups = self._quantize(width, values, side, first, end)
        stored_codes = width.pack(groups.codes)
        codes = stored_codes.tobytes()
        packed = codes if self.packer is None else self.packer.pack(codes, stored_codes.shape)
        smaller = len(packed) < len(codes)
        stored = packed if smaller else codes
        head = _HEAD.pack(_SIDES.index(side), int(smaller), mark, first, len(stored))
        parameters = [to_bfloat16(groups.scales).tobytes(), to_bfloat16(groups.offsets).tobytes()]
        exact = np.concatenate([array[:, :first], array[:, end:]], axis=1)
        return b"".join([head, *parameters, exact.tobytes(), stored])

    def _decode(self, parsed: _Parsed, out: Array) -> None:
        fast = None if out.dtype == np.float16 else loops.compiled_for(out)
        if fast is None:
            self._dequantize(parsed.width, parsed.side, parsed.codes, parsed.parameters, out)
        else:
            size = self.group_tokens if parsed.side == "keys" else self._channels(out.shape[2])
            parsed.width.dequantize(fast, parsed.side, parsed.codes, parsed.parameters, size, out)
        if parsed.exact.size:
            first, num_last = parsed.num_first, parsed.exact.shape[1] - parsed.num_first
            out[:, :first] = parsed.exact[:, :first]
            out[:, out.shape[1] - num_last :] = parsed.exact[:, first:]

    def _dequantize(self, width: CodeWidth, side: Side, codes: Array, parameters: Array, out: Array) -> None:
        """The reference for the dequantizing loops of `Loops`, for any storage dtype."""
        scales, offsets = widen(parameters, "bfloat16")
        for first, last in self._blocks(out.shape[1], _BLOCK_TOKENS // self.group_tokens):
            values = width.unpack(codes[:, first:last], out.shape[2])
            with np.errstate(over="ignore"):  # a forged scale may: infinity, as the arithmetic of the format says
                if side == "keys":
                    by_group = self._by_group(values)
                    group = first // self.group_tokens
                    near = slice(group, group + by_group.shape[1])
                    by_group *= scales[:, near, None]
                    by_group += offsets[:, near, None]
                else:
                    values *= self._by_channel(scales[:, first:last], out.shape[2])
                    values += self._by_channel(offsets[:, first:last], out.shape[2])
                narrow_into(values, out[:, first:last])

    def _blocks(self, num_tokens: int, num_groups: int) -> list[tuple[int, int]]:
        """Spans of `num_groups` (at least one) whole groups; the tokens of the last, partial group have a span of
        their own."""
        step = max(num_groups, 1) * self.group_tokens
        whole = num_tokens - num_tokens % self.group_tokens
        spans = [(first, min(first + step, whole)) for first in range(0, whole, step)]
        return spans if whole == num_tokens else [*spans, (whole, num_tokens)]

    def _by_group(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view `[num_kv_heads, groups, tokens of a group, head_dim]` of a span of `_blocks`."""
        num_heads, num_tokens, head_dim = values.shape
        return values.reshape(num_heads, -1, min(self.group_tokens, num_tokens), head_dim)

    def _by_channel(self, parameters: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
        """Scales or offsets of values `[..., num_channel_groups]`, one a channel (or one for all)."""
        if parameters.shape[-1] == 1:
            return parameters
        return np.repeat(parameters, self._channels(head_dim), axis=-1)[..., :head_dim]

    def _quantize(
        self, width: CodeWidth, values: NDArray[np.float32], side: Side, start: int, end: int
    ) -> QuantizedGroups:
        """Groups of the tokens `[start, end)` of `values` `[num_kv_heads, num_tokens, head_dim]`; 0 for the others."""
        num_heads, num_tokens, head_dim = values.shape
        codes = np.zeros(values.shape, dtype=np.int8)
        scales, offsets = np.zeros((2, num_heads, *self._groups(side, num_tokens, head_dim)), dtype=np.float32)
        if side == "values":
            step, coded = self._channels(head_dim), slice(start, end)
            for group in range(scales.shape[2] if start < end else 0):
                part = slice(group * step, (group + 1) * step)
                found = width.quantize(values[:, coded, part], axis=2)
                codes[:, coded, part], scales[:, coded, [group]], offsets[:, coded, [group]] = found
            return QuantizedGroups(codes, scales, offsets)
        for group, span in enumerate(self._blocks(num_tokens, 1)):
            first, last = max(span[0], start), min(span[1], end)
            if first < last:
                found = width.quantize(values[:, first:last], axis=1)
                codes[:, first:last], scales[:, [group]], offsets[:, [group]] = found
        return QuantizedGroups(codes, scales, offsets)

    def _groups(self, side: Side, num_tokens: int, head_dim: int) -> tuple[int, int]:
        """Shape of the scales of one head."""
        if side == "keys":
            return -(-num_tokens // self.group_tokens), head_dim
        return num_tokens, -(-head_dim // self._channels(head_dim))

    def _parse(self, view: memoryview, out: Array) -> _Parsed:
        num_heads, num_tokens, head_dim = out.shape
        if len(view) < _HEAD.size:
            raise corrupt_segment("length", f"at least {_HEAD.size}", len(view))
        side, packed, mark, num_exact, stored = _HEAD.unpack_from(view)
        known = side < 2 and packed < 2 and mark in (self.widths if side == 0 else {self._mark("values", None)})
        if not known or num_exact > min(num_tokens, self.exact_tokens):
            raise corrupt_segment(
                "head", "side, flag, codes and number of exact tokens in range", (side, packed, mark, num_exact)
            )
        shape = num_heads, *self._groups(_SIDES[side], num_tokens, head_dim)
        exact_at = _HEAD.size + 4 * math.prod(shape)
        exact_shape = num_heads, num_exact + self._num_recent(num_tokens, num_exact), head_dim
        codes_at = exact_at + math.prod(exact_shape) * out.itemsize
        if codes_at + stored != len(view):
            raise corrupt_segment("length", codes_at + stored, len(view))
        parameters = _checked_bfloat16(view[_HEAD.size : exact_at]).reshape(2, *shape)
        exact = np.frombuffer(view[exact_at:codes_at], dtype=out.dtype).reshape(exact_shape)
        width = self.widths[mark]
        codes = self._codes(view[codes_at:], bool(packed), width, out)
        return _Parsed(_SIDES[side], width, codes, parameters, exact, num_exact)

    def _codes(self, data: memoryview, packed: bool, width: CodeWidth, out: Array) -> Array:
        if packed and self.packer is None:
            raise corrupt_segment("codes", "not packed", "packed")
        shape = *out.shape[:2], width.row_bytes(out.shape[2])
        if not packed and len(data) != math.prod(shape):
            raise corrupt_segment("number of codes", math.prod(shape), len(data))
        unpacked = self.packer.unpack(data, shape) if packed and self.packer else data
        codes = np.frombuffer(unpacked, dtype=width.dtype).reshape(shape)
        width.check(codes, out.shape[2])
        return codes


def _kept_from(segment: EncodedSegment) -> int:
    """Where the arrays of a segment begin: those of numbers with its own tokens."""
    return segment.kept_from if isinstance(segment.outs[0], CodedSide) else 0


def _checked_bfloat16(data: memoryview) -> NDArray[np.uint16]:
    """A copy of the bfloat16 bit patterns of scales, then offsets, aligned as they need not be in a file. Raises:
    CorruptEntry when one is not finite or a scale is negative."""
    patterns = np.frombuffer(data, dtype="<u2").astype(np.uint16)
    if (patterns & np.uint16(0x7F80)).max() == 0x7F80:
        raise corrupt_segment("scales and offsets", "finite", "NaN or infinity")
    if patterns[: len(patterns) // 2].max() > 0x8000:
        raise corrupt_segment("scales", "none below 0", "one below 0")
    return patterns


def _can_decode(out: Target) -> bool:
    """Whether `Loops.decode_grouped` can write there."""
    if not isinstance(out, np.ndarray) or not loops.has_whole_heads(out):
        return False
    return out.dtype != np.float16 and out.shape[2] % 2 == 0


def _can_keep(out: Target) -> bool:
    """Whether `Loops.keep_grouped` can write there: each head of its arrays is contiguous."""
    return isinstance(out, CodedSide) and all(array[0].flags.c_contiguous for array in out)
