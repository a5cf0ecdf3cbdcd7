"""Codes kept as they are stored: what they stand for is, to the bit, what the codec decodes."""

from dataclasses import replace

import numpy as np
import pytest

from cag_store import ROOT, chunk_key
from cag_store.codecs import CodedSide, EncodedSegment, codec_from_config, loops
from cag_store.dtypes import narrow_into, widen
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec

CONFIGS = [
    {"id": "int8", "group_tokens": 4},
    {"id": "int8", "group_tokens": 8, "exact_tokens": 0},
    {"id": "int8", "group_tokens": 8, "packer": {"id": "zstd"}},
    {"id": "int4", "group_tokens": 8, "group_channels": 2, "chunk_tokens": 8, "recent_tokens": 2},
    {"id": "int4", "group_tokens": 4, "chunk_tokens": 8, "wide_key_layers": [1]},
    {"id": "int4", "group_tokens": 4, "chunk_tokens": 8, "recent_tokens": 0},
]


@pytest.fixture(params=[True, False], ids=["compiled", "numpy"])
def either(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(loops, "compiled", lambda: None)
    elif loops.compiled() is None:
        pytest.skip("numba is not there")


def empty(shape):
    dtypes = [np.int8 if shape.bits == 8 else np.uint8, *[np.uint16] * 4]
    return CodedSide(*(np.full(size, 77, dtype) for size, dtype in zip(shape.shapes, dtypes, strict=True)))


def numbers(side: CodedSide, shape) -> np.ndarray:
    """Bit patterns of all tokens, by the arithmetic of docs/format.md 5.2."""
    codes = side.codes.astype(np.float32)
    if shape.bits == 4:
        codes = np.concatenate([side.codes & 15, side.codes >> 4], axis=2).astype(np.float32)
    axis, repeats = (1, shape.group_tokens) if shape.grouped_along == "tokens" else (2, shape.group_channels)
    scales, offsets = (widen(part, "bfloat16").repeat(repeats, axis) for part in (side.scales, side.offsets))
    cut = tuple(slice(size) for size in codes.shape)
    values = codes * scales[cut]
    values += offsets[cut]
    out = np.empty(values.shape, np.uint16)
    narrow_into(values, out)
    out[:, : shape.num_first] = side.first
    return np.concatenate([out, side.recent], axis=1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 8, 24, 29])
def test_codes_stand_for_what_is_decoded(store, small, config, num_tokens, either):
    cache = small(config, num_tokens=num_tokens)
    manifest = cache.build(store)
    with store.reader(manifest) as reader:
        shapes = reader.coded_shapes()
        assert shapes is not None
        kept = [tuple(map(empty, both)) for both in shapes]
        arrived = []
        reader.load(kept, arrived.append)
        decoded = cache.buffers(spare=0)
        reader.load(decoded)
    assert arrived == [0, 1, 2]
    for layer, expected in enumerate(decoded):
        for side in (0, 1):
            assert shapes[layer][side].num_tokens == num_tokens
            assert np.array_equal(numbers(kept[layer][side], shapes[layer][side]), expected[side])


def test_only_codecs_of_codes_can_be_kept_in_codes(store, small):
    for codec in ("lossless", {"id": "int8", "group_tokens": 3}, {"id": "int8", "exact_tokens": 9, "group_tokens": 8}):
        with store.reader(small(codec).build(store)) as reader:
            assert reader.coded_shapes() is None
    with pytest.raises(UnknownCodec, match="keeps no codes"):
        codec_from_config("lossless").keep_codes([], 8)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_chunks_that_cut_groups_are_not_kept_in_codes(store, small, config, either):
    """No build makes a short chunk before the last one, but the format allows it."""
    cache, entries, parent = small(config), [], ROOT
    with store.build_lease():
        for start, end in ((0, 8), (8, 11), (11, 19), (19, 20)):
            ids, layers = cache.token_ids[start:end], [tuple(s[:, start:end] for s in pair) for pair in cache.layers]
            header = replace(cache.header(ROOT, 0), key=chunk_key(parent, ids, cache.context), parent=parent)
            entries.append(store.put_chunk(replace(header, start=start, num_tokens=end - start), layers, ids))
            parent = header.key
        with store.chunk_reader(entries, cache.context) as reader:
            assert reader.coded_shapes() is None
            buffers = cache.buffers(spare=0)
            reader.load(buffers)
            kept = cache.buffers(spare=0)
            reader.load([(k[:, 11:], v[:, 11:]) for k, v in kept], first_tokens=[11, 11, 11])
    for (keys, _), (expected, _), (exact, _) in zip(kept, buffers, cache.layers, strict=True):
        assert np.array_equal(keys[:, 11:], expected[:, 11:])
        assert np.abs(widen(expected, "bfloat16") - widen(exact, "bfloat16")).max() < 2


def test_arrays_of_other_sizes_are_refused(store, small):
    cache = small(CONFIGS[0])
    with store.reader(cache.build(store)) as reader:
        kept = [tuple(map(empty, both)) for both in reader.coded_shapes()]
        wrong = kept[1][0]._replace(scales=kept[1][0].scales[:, :-1])
        for bad in ([*kept[:1], (wrong, kept[1][1]), kept[2]], kept[:2]):
            with pytest.raises(UnencodableArray):
                reader.load(bad)
        kept[0][0].codes.flags.writeable = False
        with pytest.raises(UnencodableArray):
            reader.load(kept)


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[5]], ids=str)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_every_damaged_byte_of_a_segment_is_an_error_or_a_finite_number(config, side, either, small):
    """The checksum guards segments; behind it nothing is written outside of the arrays, and no scale is no number."""
    codec = codec_from_config(config)
    array = small().layers[0][side == "values"][:, :8]
    data = codec.encode(array, "bfloat16", side, 8)
    shape = codec.coded_shape((2, 16, 8), side, 0, 8)
    for place in range(len(data)):
        for bit in (0, 7):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            out = empty(shape)
            before = [part[:, : part.shape[1] // 2].copy() for part in out[:3]]
            try:
                codec.keep_codes([EncodedSegment(memoryview(bytes(damaged)), (out,), side, 0, 8)], 8)
            except CorruptEntry:
                continue
            assert place >= 12, "a head with another bit was taken"
            after = [part[:, : part.shape[1] // 2] for part in out[:3]]
            assert all(np.array_equal(*pair) for pair in zip(after, before, strict=True))
            assert np.isfinite(widen(out.scales[:, out.scales.shape[1] // 2 :], "bfloat16")).all()
    for length in (0, 11, len(data) - 1):
        with pytest.raises(CorruptEntry):
            codec.keep_codes([EncodedSegment(memoryview(data[:length]), (empty(shape),), side, 0, 8)], 8)
