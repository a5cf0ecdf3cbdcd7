from functools import partial

import numpy as np
import pytest
import zstandard

from cag_store.codecs import Int4, Int8, codec_from_config, codec_ids
from cag_store.codecs.packers import unpack_frame
from cag_store.dtypes import widen
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec
from cag_store.testing import CodecConformance, sample_array


class TestLossless(CodecConformance):
    configs = [
        {"id": "lossless"},
        {"id": "lossless", "packers": []},
        {"id": "lossless", "packers": [{"id": "ranks"}]},
        {"id": "lossless", "packers": [{"id": "zstd", "level": 1, "min_match": 7, "hash_log": 6}]},
        {"id": "lossless", "transform": {"id": "rotate", "bits": 0}, "packers": [{"id": "zstd", "level": 3}]},
    ]

    def tolerance(self, array, dtype, side):
        return 0


class TestInt8(CodecConformance):
    configs = [
        {"id": "int8"},
        {"id": "int8", "packer": {"id": "zstd"}},
        {"id": "int8", "packer": {"id": "ranks"}},
        {"id": "int8", "group_tokens": 5, "exact_tokens": 0},
        {"id": "int8", "group_tokens": 300, "exact_tokens": 300},
    ]

    def tolerance(self, array, dtype, side):
        """Half a step of the whole channel (or token), scale rounded up, and the storage dtype's rounding."""
        values = widen(array, dtype)
        axis = 1 if side == "keys" else 2
        spread = values.max(axis=axis, keepdims=True) - values.min(axis=axis, keepdims=True)
        reach = np.abs(values).max(axis=axis, keepdims=True)
        return spread / 254 * 1.02 + reach * 2.0**-8 * (1 + 1 / 127)


class TestInt4(CodecConformance):
    configs = [
        {"id": "int4"},
        {"id": "int4", "chunk_tokens": 1},
        {"id": "int4", "recent_tokens": 7, "packer": {"id": "zstd"}},
        {"id": "int4", "group_tokens": 5, "group_channels": 3, "exact_tokens": 0, "recent_tokens": 0},
        {"id": "int4", "group_tokens": 300, "group_channels": 5, "exact_tokens": 300, "wide_key_layers": [0, 998]},
    ]

    def tolerance(self, array, dtype, side):
        """Half a step of the whole channel (or token), and the rounding of the offset and of the storage dtype."""
        values = widen(array, dtype)
        axis = 1 if side == "keys" else 2
        spread = values.max(axis=axis, keepdims=True) - values.min(axis=axis, keepdims=True)
        reach = np.abs(values).max(axis=axis, keepdims=True)
        return spread / 30 * 1.02 + reach * 2.0**-8 * (1 + 1 / 15)


@pytest.mark.parametrize("codec", [Int8(exact_tokens=4), Int4(exact_tokens=4, recent_tokens=0)], ids=repr)
def test_exact_tokens_are_those_at_the_start_of_the_prefix(codec):
    array = sample_array((2, 10, 8), "bfloat16")
    for start, num_exact in ((0, 4), (3, 1), (4, 0)):
        out = np.zeros_like(array)
        codec.decode_into(codec.encode(array, "bfloat16", "keys", start), out)
        same = (out == array).all(axis=(0, 2))
        assert same[:num_exact].all()
        assert not same[num_exact:].all()


@pytest.mark.parametrize("kind", [Int8, partial(Int4, recent_tokens=0)], ids=["int8", "int4"])
def test_the_loud_first_token_does_not_spoil_the_scales_of_others(kind):
    array = sample_array((2, 64, 8), "float32")
    array[:, 0] *= 1000
    errors = []
    for exact_tokens in (0, 4):
        out = np.zeros_like(array)
        codec = kind(exact_tokens=exact_tokens)
        codec.decode_into(codec.encode(array, "float32", "keys"), out)
        errors.append(np.abs(out - array)[:, 4:].max())
    assert errors[1] < errors[0] / 100


@pytest.mark.parametrize("codec", [Int8(exact_tokens=0), Int4(exact_tokens=0, recent_tokens=0)], ids=repr)
def test_constants_and_extremes_are_kept(codec):
    for dtype, value in (
        ("float16", 65504.0),
        ("float16", -65504.0),
        ("float32", 1e38),
        ("float32", 1e-45),
        ("float32", 0.0),
    ):
        array = np.full((1, 3, 4), value, dtype={"float16": "<f2", "float32": "<f4"}[dtype])
        out = np.empty_like(array)
        codec.decode_into(codec.encode(array, dtype), out)
        assert np.isfinite(out).all()
        assert np.allclose(out, array, rtol=2**-8, atol=1e-40)
    for value in (np.nan, np.inf, -np.inf, 2e38):
        with pytest.raises(UnencodableArray, match="lossless"):
            codec.encode(np.full((1, 3, 4), value, dtype="<f4"), "float32")


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("head_dim", [1, 2, 7, 8])
def test_int4_is_exact_for_what_sixteen_levels_can_say(side, head_dim):
    """Each code comes back in its place, whichever nibble it has; 16 levels reach from each group's least value."""
    levels = np.random.default_rng(head_dim).integers(0, 16, (2, 40, head_dim))
    levels[:, ::20], levels[:, 1::20] = 0, 15
    levels[:, :, 0], levels[:, :, -1] = (levels[:, :, 0], levels[:, :, -1]) if side == "keys" else (0, 15)
    array = (levels * 0.25 - 2).astype("<f4")
    codec, out = Int4(group_tokens=20, exact_tokens=0, recent_tokens=0), np.empty_like(array)
    codec.decode_into(codec.encode(array, "float32", side), out)
    assert np.array_equal(out, array)


def test_int4_packs_the_halves_of_a_row():
    """docs/format.md 5.3, byte by byte."""
    array = np.array([[[0, 15, 3, 7, 1]]], "<f4")
    data = Int4(exact_tokens=0, recent_tokens=0).encode(array, "float32", "values")
    assert data[:12].hex() == "0100" + "0400" + "00000000" + "03000000"
    assert data[12:16].hex() == "803f" + "0000"
    assert data[16:].hex() == "70" + "1f" + "03"


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(("num_tokens", "start", "exact"), [
    (32, 96, []), (31, 96, range(26, 31)), (5, 96, range(5)), (3, 96, range(3)), (32, 0, [0, 1]),
    (31, 0, [0, 1, *range(26, 31)]), (6, 0, range(6)), (31, 1, [0, *range(26, 31)]),
])  # fmt: skip
def test_the_recent_window_is_the_end_of_a_chunk_that_is_not_whole(side, num_tokens, start, exact):
    array = sample_array((2, num_tokens, 16), "bfloat16", seed=5)
    codec = Int4(group_tokens=8, exact_tokens=2, recent_tokens=5, chunk_tokens=32)
    out = np.zeros_like(array)
    codec.decode_into(codec.encode(array, "bfloat16", side, start), out)
    assert np.flatnonzero((out == array).all(axis=(0, 2))).tolist() == list(exact)


def test_exact_tokens_at_the_end_do_not_spoil_the_scales_of_others():
    array = sample_array((2, 60, 8), "float32")
    array[:, -3:] *= 1000
    codec, out = Int4(recent_tokens=3), np.zeros_like(array)
    codec.decode_into(codec.encode(array, "float32", "keys"), out)
    others = array[:, 4:-3]
    assert np.abs(out[:, 4:-3] - others).max() < (others.max(axis=1) - others.min(axis=1)).max() / 15


def test_int4_takes_about_a_half_of_int8():
    array = sample_array((3, 512, 64), "bfloat16")
    for side in ("keys", "values"):
        assert len(Int4().encode(array, "bfloat16", side, 512)) == 12 + array.size * 4.5 / 8
        assert len(Int8().encode(array, "bfloat16", side, 512)) == 12 + array.size * 8.5 / 8


def test_wide_key_layers_have_the_codes_of_int8():
    array = sample_array((2, 70, 16), "bfloat16")
    wide, narrow = Int4(recent_tokens=0, wide_key_layers=[3]), Int4(recent_tokens=0)
    for side in ("keys", "values"):
        for layer in (2, 3):
            data = wide.encode_layers([array], "bfloat16", side, layer)
            out, other = np.empty_like(array), np.empty_like(array)
            wide.decode_layers_into(data, [out], side, layer)
            like = Int8() if (side, layer) == ("keys", 3) else narrow
            like.decode_into(like.encode(array, "bfloat16", side), other)
            assert np.array_equal(out, other)


def test_a_segment_of_another_side_width_or_place_is_refused():
    array = sample_array((2, 20, 4), "bfloat16")
    codec, out = Int4(recent_tokens=0, wide_key_layers=[1]), np.empty_like(array)
    for side, layer, other_side, other_layer in (
        ("keys", 0, "values", 0), ("values", 0, "keys", 0), ("keys", 0, "keys", 1), ("keys", 1, "keys", 0),
    ):  # fmt: skip
        data = codec.encode_layers([array], "bfloat16", side, layer)
        codec.decode_layers_into(data, [out], side, layer)
        with pytest.raises(CorruptEntry, match="of layer"):
            codec.decode_layers_into(data, [out], other_side, other_layer)
    data = Int8().encode(array, "bfloat16", "keys", 2)
    for side, start in (("values", 2), ("keys", 0)):
        with pytest.raises(CorruptEntry, match="of layer"):
            Int8().decode_layers_into(data, [out], side, 0, start)
    Int8().decode_layers_into(data, [out], "keys", 0, 2)


def test_values_with_wide_codes_are_refused():
    """Nobody writes them; every length of this one fits."""
    out = np.zeros((1, 3, 4), "<u2")
    data = bytes([1, 0, 8, 0, *bytes(4), 12, 0, 0, 0]) + bytes(4 * 3 * 2) + bytes(12)
    with pytest.raises(CorruptEntry, match="head"):
        Int4(recent_tokens=0, group_channels=2).decode_into(data, out)


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
@pytest.mark.parametrize("pattern", [b"\x80\x7f", b"\xc0\xff", b"\x80\xbf"])
def test_scales_that_are_not_finite_or_negative_are_refused(codec, pattern):
    array = sample_array((1, 3, 4), "bfloat16")
    data = bytearray(codec.encode(array, "bfloat16"))
    data[12:14] = pattern
    with pytest.raises(CorruptEntry, match="scales"):
        codec.decode_into(bytes(data), array)


def test_int4_refuses_a_code_that_no_channel_has():
    """Of an odd number of channels, the last byte of a row has one code; the place of the other is 0."""
    array = sample_array((1, 3, 5), "bfloat16")
    codec = Int4(exact_tokens=0, recent_tokens=0)
    data = bytearray(codec.encode(array, "bfloat16"))
    data[-1] |= 0x10
    with pytest.raises(CorruptEntry, match="unused"):
        codec.decode_into(bytes(data), array)


def test_decompression_bombs_are_refused_before_they_are_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    assert len(bomb) < 1 << 15
    with pytest.raises(CorruptEntry, match="content size"):
        unpack_frame(bomb, 1000)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    with pytest.raises(CorruptEntry):
        unpack_frame(unsized, 1000)
    lying = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    size_at = lying.index((1 << 20).to_bytes(4, "little"))
    lying[size_at : size_at + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(CorruptEntry):
        unpack_frame(bytes(lying), 1000)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"id": 3},
        {"id": "pickle"},
        {"id": "lossless", "packers": [{"id": "gzip"}]},
        {"id": "lossless", "packers": "zstd"},
        {"id": "lossless", "packers": [{"id": "ranks", "level": 1}]},
        {"id": "lossless", "packers": [{"id": "zstd"}] * 9},
        {"id": "lossless", "transform": {"id": "zstd"}},
        {"id": "lossless", "transform": {"id": "rotate", "bits": 16}},
        {"id": "lossless", "packers": [{"id": "zstd", "level": "1"}]},
        {"id": "lossless", "packers": [{"id": "zstd", "hash_log": 40}]},
        {"id": "int8", "group_tokens": 0},
        {"id": "int8", "group_tokens": True},
        {"id": "int8", "exact_tokens": -1},
        {"id": "int8", "packer": "zstd"},
        {"id": "int8", "group_channels": 64},
        {"id": "int4", "group_channels": 0},
        {"id": "int4", "recent_tokens": -1},
        {"id": "int4", "chunk_tokens": 0},
        {"id": "int4", "wide_key_layers": 7},
        {"id": "int4", "wide_key_layers": "7"},
        {"id": "int4", "wide_key_layers": [True]},
        {"id": "int4", "wide_key_layers": [-1]},
        {"id": "int4", "wide_key_layers": [999]},
        {"id": "int4", "wide_key_layers": [3, 2]},
        {"id": "int4", "wide_key_layers": [3, 3]},
    ],
)
def test_configurations_that_are_refused(config):
    with pytest.raises(UnknownCodec):
        codec_from_config(config)


def test_registry_lists_the_shipped_codecs():
    assert {"lossless", "int8", "int4", "transform"} <= set(codec_ids())
    assert codec_from_config("int8") == codec_from_config({"id": "int8"})
    assert codec_from_config("int8") != codec_from_config("lossless")
