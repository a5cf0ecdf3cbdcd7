import numpy as np
import pytest
import zstandard

from cag_store.codecs import Int8, codec_from_config, codec_ids
from cag_store.codecs.packers import unpack_frame
from cag_store.dtypes import widen
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec
from cag_store.testing import CodecConformance, sample_array


class TestLossless(CodecConformance):
    configs = [
        {"id": "lossless"},
        {"id": "lossless", "packers": []},
        {"id": "lossless", "transform": {"id": "rotate", "bits": 0}, "packers": [{"id": "zstd", "level": 3}]},
    ]

    def tolerance(self, array, dtype, side):
        return 0


class TestInt8(CodecConformance):
    configs = [
        {"id": "int8"},
        {"id": "int8", "packer": {"id": "zstd"}},
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


def test_exact_tokens_are_those_at_the_start_of_the_prefix():
    array = sample_array((2, 10, 8), "bfloat16")
    codec = Int8(exact_tokens=4)
    for start, num_exact in ((0, 4), (3, 1), (4, 0)):
        out = np.zeros_like(array)
        codec.decode_into(codec.encode(array, "bfloat16", "keys", start), out)
        same = (out == array).all(axis=(0, 2))
        assert same[:num_exact].all()
        assert not same[num_exact:].all()


def test_the_loud_first_token_does_not_spoil_the_scales_of_others():
    array = sample_array((2, 64, 8), "float32")
    array[:, 0] *= 1000
    errors = []
    for exact_tokens in (0, 4):
        out = np.zeros_like(array)
        codec = Int8(exact_tokens=exact_tokens)
        codec.decode_into(codec.encode(array, "float32", "keys"), out)
        errors.append(np.abs(out - array)[:, 4:].max())
    assert errors[1] < errors[0] / 100


def test_int8_keeps_constants_and_extremes():
    codec = Int8(exact_tokens=0)
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
        {"id": "lossless", "packers": [{"id": "zstd"}] * 9},
        {"id": "lossless", "transform": {"id": "zstd"}},
        {"id": "lossless", "transform": {"id": "rotate", "bits": 16}},
        {"id": "lossless", "packers": [{"id": "zstd", "level": "1"}]},
        {"id": "lossless", "packers": [{"id": "zstd", "hash_log": 40}]},
        {"id": "int8", "group_tokens": 0},
        {"id": "int8", "group_tokens": True},
        {"id": "int8", "exact_tokens": -1},
        {"id": "int8", "packer": "zstd"},
    ],
)
def test_configurations_that_are_refused(config):
    with pytest.raises(UnknownCodec):
        codec_from_config(config)


def test_registry_lists_the_shipped_codecs():
    assert {"lossless", "int8"} <= set(codec_ids())
    assert codec_from_config("int8") == codec_from_config({"id": "int8"})
    assert codec_from_config("int8") != codec_from_config("lossless")
