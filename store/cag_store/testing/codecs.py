"""What every codec must hold. Subclass `CodecConformance` with `configs` and `tolerance`."""
# ruff: noqa: D102  the names of the tests are their documentation

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest

from cag_store.codecs import Codec, Side, codec_from_config
from cag_store.dtypes import STORAGE_DTYPES, Array, storage_dtype, widen
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec

SHAPES = [(1, 1, 1), (2, 3, 8), (3, 65, 16), (2, 300, 4)]
SIDES: tuple[Side, Side] = ("keys", "values")


def sample_array(shape: tuple[int, int, int], dtype: str, seed: int = 0) -> Array:
    """Something like keys: channels with means and scales of their own, and a loud first token."""
    generator = np.random.default_rng(seed)
    mean, scale = (
        generator.normal(0, 4, (shape[0], 1, shape[2])),
        np.exp(generator.normal(0, 1, (shape[0], 1, shape[2]))),
    )
    values = (mean + scale * generator.normal(size=shape)).astype(np.float32)
    values[:, 0] *= 20
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
    return values.astype(storage_dtype(dtype))


class CodecConformance:
    """The promise of `cag_store.codecs.Codec`, as tests."""

    configs: ClassVar[list[Mapping[str, Any]]]

    def tolerance(self, array: Array, dtype: str, side: Side) -> Any:
        """The largest error allowed, an array that broadcasts against `array`; 0 for lossless codecs."""
        raise NotImplementedError

    def codecs(self) -> list[Codec]:
        """All configurations under test."""
        return [codec_from_config(config) for config in self.configs]

    def decoded(self, codec: Codec, data: bytes, like: Array) -> Array:
        """`data` decoded into a slice of a larger buffer; the rest of the buffer must not change."""
        num_heads, num_tokens, head_dim = like.shape
        buffer = np.full((num_heads, num_tokens + 5, head_dim), 7, dtype=like.dtype)
        codec.decode_into(data, buffer[:, 2 : 2 + num_tokens])
        assert np.all(buffer[:, :2] == 7)
        assert np.all(buffer[:, 2 + num_tokens :] == 7)
        return buffer[:, 2 : 2 + num_tokens]

    def test_a_codec_is_its_configuration(self) -> None:
        for codec in self.codecs():
            again = codec_from_config(json.loads(json.dumps(codec.config())))
            assert again.config() == codec.config()
            assert again == codec
            with pytest.raises(UnknownCodec):
                codec_from_config({**codec.config(), "no_such_key": 1})

    @pytest.mark.parametrize("dtype", STORAGE_DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("side", SIDES)
    @pytest.mark.parametrize("start", [0, 2, 1000])
    def test_round_trip(self, shape: tuple[int, int, int], dtype: str, side: Side, start: int) -> None:
        array = sample_array(shape, dtype)
        for codec in self.codecs():
            data = codec.encode(array, dtype, side, start)
            assert data == codec.encode(array, dtype, side, start)
            found = self.decoded(codec, data, array)
            error = np.abs(widen(found, dtype) - widen(array, dtype))
            assert np.all(error <= self.tolerance(array, dtype, side))
            if codec.lossless:
                assert np.array_equal(found.view(np.uint8), np.ascontiguousarray(array).view(np.uint8))

    def test_strided_input(self) -> None:
        array = sample_array((4, 40, 8), "bfloat16")
        for codec in self.codecs():
            view = array[::2, 5:30]
            assert codec.encode(view, "bfloat16") == codec.encode(np.ascontiguousarray(view), "bfloat16")

    def test_lossless_keeps_every_bit_pattern_and_others_refuse_what_is_not_finite(self) -> None:
        array = np.arange(1 << 16, dtype="<u2").reshape(2, 128, 256)
        for codec in self.codecs():
            if codec.lossless:
                assert np.array_equal(self.decoded(codec, codec.encode(array, "bfloat16"), array), array)
            else:
                with pytest.raises(UnencodableArray):
                    codec.encode(array, "bfloat16")

    def test_foreign_arrays_are_refused(self) -> None:
        for codec in self.codecs():
            for array in (np.zeros((2, 3, 4)), np.zeros((2, 3), dtype="<u2"), np.zeros((2, 0, 4), dtype="<u2")):
                with pytest.raises(UnencodableArray):
                    codec.encode(array, "bfloat16")

    def test_every_truncation_and_extension_is_refused(self) -> None:
        array = sample_array((2, 9, 4), "bfloat16")
        for codec in self.codecs():
            data = codec.encode(array, "bfloat16")
            for end in range(len(data)):
                with pytest.raises(CorruptEntry):
                    codec.decode_into(data[:end], array.copy())
            with pytest.raises(CorruptEntry):
                codec.decode_into(data + b"\0", array.copy())

    def test_the_wrong_buffer_is_refused(self) -> None:
        array = sample_array((2, 9, 4), "bfloat16")
        for codec in self.codecs():
            data = codec.encode(array, "bfloat16")
            for shape in ((2, 8, 4), (2, 10, 4), (1, 9, 4), (2, 9, 16)):
                with pytest.raises(CorruptEntry):
                    codec.decode_into(data, np.zeros(shape, dtype="<u2"))

    def test_damage_never_crashes_nor_takes_much_memory(self) -> None:
        array = sample_array((2, 33, 8), "bfloat16")
        for codec in self.codecs():
            data = codec.encode(array, "bfloat16")
            tracemalloc.start()
            for position in range(0, len(data), max(1, len(data) // 200)):
                for flipped in (1, 0x80):
                    damaged = bytearray(data)
                    damaged[position] ^= flipped
                    try:
                        codec.decode_into(bytes(damaged), array.copy())
                    except CorruptEntry:
                        continue
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1 << 20

    def test_threads_share_a_codec(self) -> None:
        arrays = [sample_array((2, 200, 16), "bfloat16", seed) for seed in range(8)]
        for codec in self.codecs():
            encoded = [codec.encode(array, "bfloat16") for array in arrays]
            alone = [self.decoded(codec, data, array) for data, array in zip(encoded, arrays, strict=True)]
            with ThreadPoolExecutor(4) as pool:
                for _ in range(4):
                    together = list(pool.map(self.decoded, [codec] * len(arrays), encoded, arrays))
                    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
