"""Segments kept undecoded: verified, taken apart, and the same bytes; what can be seen without decoding is refused."""

import struct
from dataclasses import replace

import numpy as np
import pytest

from cag_store.codecs import EncodedSegment, StreamChunk, StreamSide, codec_from_config
from cag_store.codecs.streams import ALIGNED, ESCAPES, EXACT, EXACT_ROWS, NUM_PARTS, STATES, WORDS
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec
from cag_store.testing import sample_array
from cag_store.testing.bases import sample_basis

HEADS, DIMS = (2, 1, 2), (8, 16, 4)


@pytest.fixture
def config(store):
    digest = store.put_blob(sample_basis(HEADS, DIMS, 2, kept=7).to_bytes())
    return {"id": "transform", "basis": digest, "joint_layers": 2, "step": -256, "exact_tokens": 4}


def empty(shape) -> StreamSide:
    bounds = np.full((len(shape.chunks), NUM_PARTS + 1), -1, np.int64)
    return StreamSide(shape, bounds, np.full(shape.slots[-1], 77, np.uint8))


def views(shapes):
    """One pair for each layer, those of a group being the same, and the pairs of the groups."""
    pairs = [tuple(map(empty, both)) for both in shapes]
    return [pair for pair, (keys, _) in zip(pairs, shapes, strict=True) for _ in keys.static.layers], pairs


def test_bytes_are_kept_as_they_are_and_known_by_their_parts(store, small, config):
    with store.reader(small(config, num_tokens=150, chunk_tokens=33).build(store)) as reader:
        shapes, arrived = reader.stream_shapes(), []
        buffers, pairs = views(shapes)
        reader.load(buffers, arrived.append)
        stored = [
            [store.backend.get_range(chunk.path, chunk.offsets[at], chunk.offsets[at + 1] - chunk.offsets[at])
             for chunk in reader._chunks] for at in range(4)
        ]  # fmt: skip
    assert arrived == [0, 1, 2]
    assert [len(keys.static.layers) for keys, _ in shapes] == [2, 1]
    for side, segments in zip((side for pair in pairs for side in pair), stored, strict=True):
        assert [chunk.encoded_bytes for chunk in side.shape.chunks] == [len(segment) for segment in segments]
        for chunk, (parts, segment) in enumerate(zip(side.bounds, segments, strict=True)):
            num_exact, num_escapes, num_words = struct.unpack_from("<III", segment, 4)
            sizes = np.diff(parts)
            assert (sizes[EXACT], sizes[ESCAPES], sizes[WORDS]) == (4 * num_exact, 2 * num_escapes, 2 * num_words)
            assert (num_exact, sizes[STATES]) == (4 if chunk == 0 else 0, 128)
            assert parts[ESCAPES] % 2 == parts[WORDS] % 2 == 0
            assert side.data[parts[0] : parts[-1]].tobytes() == segment[16:]
            assert side.shape.slots[chunk] <= parts[0] - 16
            assert parts[-1] <= side.shape.slots[chunk + 1]
            assert side.data[parts[-1] : side.shape.slots[chunk + 1]].tolist().count(77) < ALIGNED + 2


def test_only_the_codec_of_streams_has_them(store, small, config):
    for codec in ("lossless", "int8"):
        with store.reader(small(codec).build(store)) as reader:
            assert reader.stream_shapes() is None
    with pytest.raises(UnknownCodec, match="keeps no streams"):
        codec_from_config("lossless").keep_streams([], 8)
    codec = store.codec(config)
    sizes, chunks = [(2, 8), (1, 16)], [StreamChunk(0, 9, 99)]
    assert codec.stream_shape(sizes, "keys", 0, chunks, 2).rotations[0].pairing == "halves"
    assert codec.stream_shape(sizes, "values", 0, chunks, 2).rotations == (None, None)
    for shapes, first in ((sizes[:1], 0), (sizes[::-1], 0), (sizes, 1), (sizes, 4)):
        assert codec.stream_shape(shapes, "keys", first, chunks, 2) is None


def test_arrays_of_another_cache_are_refused(store, small, config):
    with store.reader(small(config, num_tokens=50, chunk_tokens=33).build(store)) as reader:
        shapes = reader.stream_shapes()
        buffers, _ = views(shapes)
        keys, values = buffers[2]
        for wrong in (
            keys._replace(data=keys.data[:-1]),
            keys._replace(bounds=keys.bounds[:1]),
            keys._replace(bounds=keys.bounds.astype(np.int32)),
            keys._replace(shape=replace(keys.shape, itemsize=4)),
            buffers[0][0],
        ):
            with pytest.raises(UnencodableArray):
                reader.load([*buffers[:2], (wrong, values)])
        with pytest.raises(UnencodableArray):
            reader.load(buffers[:2])
        keys.data.flags.writeable = False
        with pytest.raises(UnencodableArray):
            reader.load(buffers)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_every_damaged_byte_before_the_stream_is_seen_or_harmless(store, config, side):
    """Nothing is written outside of the segment's slot, and all parts lie within it."""
    codec = store.codec(config)
    arrays = [sample_array((heads, 20, dim), "bfloat16", heads) for heads, dim in zip(HEADS[:2], DIMS[:2], strict=True)]
    data = codec.encode_layers(arrays, "bfloat16", side, 0, 0)
    chunks = [StreamChunk(start, 20, len(data)) for start in (0, 20, 40)]
    shape = codec.stream_shape([(2, 8), (1, 16)], side, 0, chunks, 2)
    kept = empty(shape)
    codec.keep_streams([EncodedSegment(memoryview(data), (kept,), side, 0, 0)], 20)
    exact = int(kept.bounds[0, EXACT_ROWS] - kept.bounds[0, 0]) + 16
    for place in range(exact + 8):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            kept = empty(shape)
            try:
                codec.keep_streams([EncodedSegment(memoryview(bytes(damaged)), (kept,), side, 0, 20)], 20)
            except CorruptEntry:
                assert place < exact
                assert np.all(kept.data == 77)
                continue
            first, last = shape.slots[1:3]
            assert np.all(kept.data[:first] == 77)
            assert np.all(kept.data[last:] == 77)
            assert first <= kept.bounds[1].min()
            assert kept.bounds[1].max() <= last
            assert np.all(kept.bounds[[0, 2]] == -1)
    for torn in (data[:15], data[:-1], data + b"\0", b""):
        with pytest.raises(CorruptEntry):
            codec.keep_streams([EncodedSegment(memoryview(torn), (empty(shape),), side, 0, 0)], 20)
    with pytest.raises(CorruptEntry):
        codec.keep_streams([EncodedSegment(memoryview(data), (empty(shape),), side, 0, 0)], 21)
