"""`transform`: several layers at once through a basis that was calibrated for the model; uniform steps; static rANS.
Layout and arithmetic:
docs/format.md 5.4, figures: docs/design/004-transform-codec.md.

Keys are coded before rotary embedding. Decoding is exact integer arithmetic up to one scale and mean a value, so its
bits depend neither on the order of sums nor on
which loops run.
Source: PCA over layers and heads as in KVTC (arXiv:2511.01815); first tokens exact as in KVQuant (arXiv:2401.18079).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import (
    MAX_JOINT_LAYERS,
    Codec,
    Config,
    EncodedSegment,
    Resources,
    Side,
    checked_array,
    checked_int,
    config_resources,
    corrupt_segment,
    refuse_unknown_keys,
)
from cag_store.codecs.blas import one_thread_a_product
from cag_store.codecs.streams import EXACT, StreamChunk, StreamShape, StreamSide
from cag_store.codecs.transform import loops, rans, shifts, symbols
from cag_store.codecs.transform.basis import Basis
from cag_store.codecs.transform.prepared import Angles, PreparedBasis, PreparedSide
from cag_store.codecs.transform.product import rotated
from cag_store.dtypes import Array, widen
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec

MAX_STEP = 1 << 12
_HEAD = struct.Struct("<BBHIII")
_SIDES: tuple[Side, Side] = ("keys", "values")
_LARGEST = np.float32(1e38)
_STATES_BYTES = 4 * rans.LANES
_LEAST_CENTERED = 64  # tokens from which on a segment's own center is worth a byte a channel


class _Segment(NamedTuple):
    """The parts of a segment: its center, positions and rows of exact tokens, how codes are written, and codes."""

    center: NDArray[np.int8]
    exact: NDArray[np.uint32]
    exact_rows: Array
    layout: rans.Layout
    stream: rans.Stream


class JointTransform(Codec):
    """Mean squared error in the basis' metric: at most a twelfth of the squared step a coded component."""

    codec_id = "transform"
    lossless = False

    def __init__(self, basis: str, joint_layers: int, step: int, exact_tokens: int = 4) -> None:
        self.basis_digest = basis
        self.step = step
        self.exact_tokens = exact_tokens
        self._joint_layers = joint_layers
        self._ready: PreparedBasis | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: `basis` (sha256 of its blob), `joint_layers`, `step` (64ths of an octave), `exact_tokens` 0 to
        65536."""
        refuse_unknown_keys(cls.codec_id, config, ("basis", "joint_layers", "step", "exact_tokens"))
        digests = config_resources(config)
        if not digests:
            raise UnknownCodec("codec 'transform' needs a basis: cag.calibration.calibrate makes one for a model")
        return cls(
            digests[0],
            checked_int(cls.codec_id, config, "joint_layers", 1, 1, MAX_JOINT_LAYERS),
            checked_int(cls.codec_id, config, "step", 0, -MAX_STEP, MAX_STEP),
            checked_int(cls.codec_id, config, "exact_tokens", 4, 0, 1 << 16),
        )

    def config(self) -> Config:
        """The full configuration."""
        shape = {"joint_layers": self._joint_layers, "step": self.step, "exact_tokens": self.exact_tokens}
        return {"id": self.codec_id, "basis": self.basis_digest, **shape}

    def with_resources(self, resources: Resources) -> JointTransform:
        """See `Codec`."""
        where = f"basis {self.basis_digest}"
        basis = Basis.from_bytes(resources(self.basis_digest), where)
        if basis.joint_layers != self._joint_layers:
            raise CorruptEntry(
                f"{where} joins {basis.joint_layers} layers, the codec {self._joint_layers}",
                where=where,
                expected=self._joint_layers,
                found=basis.joint_layers,
            )
        codec = JointTransform(self.basis_digest, self._joint_layers, self.step, self.exact_tokens)
        codec._ready = PreparedBasis(basis, self.step)
        return codec

    def encode(self, array: Array, dtype: str, side: Side = "keys", start: int = 0) -> bytes:
        """One layer of a basis that has a single one. See `Codec`."""
        return self.encode_layers([array], dtype, side, 0, start)

    def decode_into(self, data: bytes | memoryview, out: Array) -> None:
        """One layer from position 0 on; the side is in the data. See `Codec`."""
        side = _SIDES[memoryview(data)[0] & 1] if len(data) else "keys"
        self.decode_layers_into(data, [out], side, 0)

    def encode_layers(self, arrays: Sequence[Array], dtype: str, side: Side, first_layer: int, start: int = 0) -> bytes:
        """See `Codec`. Raises: UnencodableArray for NaN, infinities, magnitudes above 1e38, and shapes that are not
        the basis'."""
        with one_thread_a_product():
            return self._encoded(arrays, dtype, side, first_layer, start)

    def _encoded(self, arrays: Sequence[Array], dtype: str, side: Side, first_layer: int, start: int) -> bytes:
        prepared = self._side(side, first_layer)
        for array in arrays:
            checked_array(array, dtype)
        if prepared.shapes != tuple((array.shape[0], array.shape[2]) for array in arrays):
            raise UnencodableArray(
                f"the basis is for heads {prepared.shapes} from layer {first_layer} on, "
                f"found {[array.shape for array in arrays]}"
            )
        if len({array.shape[1] for array in arrays}) != 1:
            raise UnencodableArray("layers of one segment have the same number of tokens")
        num_tokens = arrays[0].shape[1]
        flat, kept = (num_tokens, len(prepared.mean)), (num_tokens, prepared.num_components)
        kinds = (flat, np.float32), (flat, np.float32), (kept, np.float32), (kept, np.int16)
        with self._prepared.scratch.arrays(*kinds) as (values, spare, products, codes):
            self._flatten(arrays, dtype, side, first_layer, start, values)
            np.matmul(np.subtract(values, prepared.mean, out=spare), prepared.forward, out=products)
            np.rint(products, out=products)
            near = products.max(axis=1, initial=0) <= symbols.MAX_CODE  # False for NaN
            near &= products.min(axis=1, initial=0) >= -symbols.MAX_CODE
            near[: max(self.exact_tokens - start, 0)] = False
            exact = np.flatnonzero(~near).astype("<u4")
            num_coded = num_tokens - len(exact)
            for first, last, token in _runs(exact, num_tokens):
                np.copyto(codes[first:last], products[token : token + last - first], casting="unsafe")
                np.copyto(spare[first:last], values[token : token + last - first])
            coded, center = codes[:num_coded], np.empty(0, np.int8)
            if num_coded >= _LEAST_CENTERED:
                center = prepared.center_of(spare[:num_coded], coded)
            return self._packed(coded, center, exact, arrays, prepared, side)

    def decode_layers_into(
        self, data: bytes | memoryview, outs: Sequence[Array], side: Side, first_layer: int, start: int = 0
    ) -> None:
        """See `Codec`."""
        prepared = self._side(side, first_layer)
        if prepared.shapes != tuple((out.shape[0], out.shape[2]) for out in outs):
            raise corrupt_segment("heads of the basis", prepared.shapes, [out.shape for out in outs])
        num_tokens = outs[0].shape[1]
        segment = _parsed(memoryview(data), prepared, outs, side)
        num_coded = num_tokens - len(segment.exact)
        codes = _decoded(segment, prepared, num_coded)
        angles = [self._turned(side, layer, start, num_tokens) for layer in prepared.layers]
        mean = prepared.centered_mean(segment.center)
        prepared.decode(codes, _runs(segment.exact, num_tokens), mean, outs, angles)
        _place_exact(segment, outs)

    def stream_shape(
        self,
        shapes: Sequence[tuple[int, int]],
        side: Side,
        first_layer: int,
        chunks: Sequence[StreamChunk],
        itemsize: int,
    ) -> StreamShape | None:
        """See `Codec`. None too for a group that is not the basis', which decoding refuses."""
        if first_layer % self._joint_layers or first_layer // self._joint_layers >= self._prepared.num_groups:
            return None
        static = self._side(side, first_layer)
        if static.shapes != tuple(shapes):
            return None
        rotations = [self._prepared.rotation(layer) if side == "keys" else None for layer in static.layers]
        return StreamShape(static, tuple(rotations), tuple(chunks), itemsize)

    def keep_streams(self, segments: Sequence[EncodedSegment], num_tokens: int) -> None:
        """See `Codec`."""
        for segment in segments:
            kept, data, side = segment.outs[0], segment.data, segment.side
            assert isinstance(kept, StreamSide)
            prepared = self._side(side, segment.first_layer)
            bounds = _part_bounds(data, prepared, num_tokens, kept.shape.itemsize, side)
            _exact_tokens(data[bounds[EXACT] : bounds[EXACT + 1]], num_tokens)
            kept.put(segment.start, data, bounds)

    @property
    def _prepared(self) -> PreparedBasis:
        if self._ready is None:
            raise UnknownCodec(f"codec 'transform' works only with its basis {self.basis_digest}: give it resources")
        return self._ready

    def _side(self, side: Side, first_layer: int) -> PreparedSide:
        index = first_layer // self._joint_layers
        if first_layer % self._joint_layers or index >= self._prepared.num_groups:
            raise UnencodableArray(f"no group of the basis begins at layer {first_layer}", found=first_layer)
        if _SIDES.index(side) >= self._prepared.num_sides:
            raise UnencodableArray("the basis is of keys that are values, too, and the cache has values", found=side)
        return self._prepared.side(index, _SIDES.index(side))

    def _turned(self, side: Side, layer: int, start: int, num_tokens: int) -> Angles:
        """What is taken off and put back on a layer's keys; None for values, and for layers without rotation."""
        return self._prepared.angles(layer, start, num_tokens) if side == "keys" else None

    def _flatten(
        self, arrays: Sequence[Array], dtype: str, side: Side, first_layer: int, start: int, out: NDArray[np.float32]
    ) -> None:
        """All layers into `out` `[num_tokens, num_channels]`, keys without their rotation. Raises: UnencodableArray."""
        spans = self._side(side, first_layer).spans
        for layer, (array, span) in enumerate(zip(arrays, spans, strict=True), start=first_layer):
            values = widen(array, dtype)
            if not np.all(np.abs(values) <= _LARGEST):
                raise UnencodableArray(
                    "codec 'transform' keeps finite values up to 1e38, found NaN, infinity or more: use 'lossless'",
                    codec=self.codec_id,
                )
            angles = self._turned(side, layer, start, array.shape[1])
            if angles is not None:
                values = rotated(values, angles[1], -angles[2], angles[0])
            out[:, span].reshape(array.shape[1], array.shape[0], -1)[:] = values.transpose(1, 0, 2)

    def _packed(
        self,
        codes: NDArray[np.int16],
        center: NDArray[np.int8],
        exact: NDArray[np.uint32],
        arrays: Sequence[Array],
        prepared: PreparedSide,
        side: Side,
    ) -> bytes:
        kinds = symbols.symbols_of(codes, prepared.low)
        by_component, by_token = shifts.chosen_shifts(kinds, prepared.table_numbers, prepared.tables)
        layout = rans.Layout(prepared.table_numbers + by_component, prepared.low, by_token.astype(np.int32))
        stream = rans.encode_codes(codes, layout, prepared.tables)
        counts = len(exact), stream.num_escapes, stream.num_words
        head = _HEAD.pack(_SIDES.index(side), int(center.size > 0), 0, *counts)
        rows = [
            np.ascontiguousarray(array[:, exact].transpose(1, 0, 2)).reshape(len(exact), heads * dim)
            for array, (heads, dim) in zip(arrays, prepared.shapes, strict=True)
        ]
        parts: list[Array] = [center, exact, np.concatenate(rows, axis=1)]
        coded: list[Array] = [
            stream.escapes.astype("<i2"),
            stream.states.astype("<u4"),
            stream.words.astype("<u2"),
        ]
        shifted = [shifts.pack_shifts(by_component), shifts.pack_shifts(by_token)]
        return b"".join([head, *(part.tobytes() for part in parts), *shifted, *(part.tobytes() for part in coded)])


def _parsed(view: memoryview, prepared: PreparedSide, outs: Sequence[Array], side: Side) -> _Segment:
    """The parts of a segment. Raises: CorruptEntry."""
    num_tokens = outs[0].shape[1]
    bounds = _part_bounds(view, prepared, num_tokens, outs[0].itemsize, side)
    parts = [view[first:last] for first, last in pairwise(bounds)]
    exact = _exact_tokens(parts[1], num_tokens)
    rows = np.frombuffer(parts[2], outs[0].dtype).reshape(len(exact), len(prepared.mean))
    by_component = shifts.unpack_shifts(parts[3], prepared.num_components)
    by_token = shifts.unpack_shifts(parts[4], num_tokens - len(exact))
    layout = rans.Layout(prepared.table_numbers + by_component, prepared.low, by_token)
    escapes, states, words = (
        np.frombuffer(part, kind) for part, kind in zip(parts[5:], ("<i2", "<u4", "<u2"), strict=True)
    )
    stream = rans.Stream.padded(states, words, escapes)
    return _Segment(np.frombuffer(parts[0], "i1"), exact, rows, layout, stream)


def _part_bounds(view: memoryview, prepared: PreparedSide, num_tokens: int, itemsize: int, side: Side) -> list[int]:
    """Where the parts of a segment begin, in the order of `codecs.streams`, and where the last one ends. Raises:
    CorruptEntry unless they are those of `num_tokens` tokens of this side, and the bytes end with them."""
    if len(view) < _HEAD.size:
        raise corrupt_segment("length", f"{_HEAD.size} bytes at least", len(view))
    number, centered, zero, num_exact, num_escapes, num_words = _HEAD.unpack_from(view)
    if (number, centered >> 1, zero) != (_SIDES.index(side), 0, 0) or num_exact > num_tokens:
        raise corrupt_segment("head", f"{side}, at most {num_tokens} exact tokens", bytes(view[: _HEAD.size]))
    sizes = [
        centered * len(prepared.mean),
        4 * num_exact,
        num_exact * len(prepared.mean) * itemsize,
        shifts.packed_size(prepared.num_components),
        shifts.packed_size(num_tokens - num_exact),
        2 * num_escapes,
        _STATES_BYTES,
        2 * num_words,
    ]
    if len(view) != _HEAD.size + sum(sizes):
        raise corrupt_segment("length", _HEAD.size + sum(sizes), len(view))
    return list(accumulate(sizes, initial=_HEAD.size))


def _exact_tokens(part: memoryview, num_tokens: int) -> NDArray[np.uint32]:
    """Places of exact tokens. Raises: CorruptEntry."""
    exact: NDArray[np.uint32] = np.frombuffer(part, "<u4")
    if exact.size and (np.any(np.diff(exact.astype(np.int64)) <= 0) or exact[-1] >= num_tokens):
        raise corrupt_segment("exact tokens", f"ascending ones below {num_tokens}", exact[-1])
    return exact


def _decoded(segment: _Segment, prepared: PreparedSide, num_coded: int) -> NDArray[np.int16]:
    """The codes, in a `code_buffer`. Raises: CorruptEntry."""
    buffer = prepared.code_buffer(num_coded)
    codes = buffer[:num_coded, : prepared.num_components]
    fast = loops.compiled()
    if fast is None:
        rans.decode_codes(segment.stream, segment.layout, prepared.tables, codes)
    elif not fast.decode_codes(segment.stream, segment.layout, prepared.tables, codes):
        raise rans.torn(segment.stream.num_words)
    return buffer


def _runs(exact: NDArray[np.uint32], num_tokens: int) -> list[tuple[int, int, int]]:
    """Runs of coded tokens between exact ones: rows [first, last) of the codes, and the token of the first."""
    runs, first, token = [], 0, 0
    for stop in [*exact.tolist(), num_tokens]:
        if stop > token:
            runs.append((first, first + stop - token, token))
            first += stop - token
        token = stop + 1
    return runs


def _place_exact(segment: _Segment, outs: Sequence[Array]) -> None:
    channel = 0
    for out in outs:
        width = out.shape[0] * out.shape[2]
        rows = segment.exact_rows[:, channel : channel + width].reshape(-1, out.shape[0], out.shape[2])
        out[:, segment.exact] = rows.transpose(1, 0, 2)
        channel += width
