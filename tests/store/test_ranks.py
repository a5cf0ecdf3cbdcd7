"""Packer `ranks`: compiled loops and reference write and read the same bytes, and refuse the same."""

import importlib.util
import random
import sys

import numpy as np
import pytest

from cag_store.codecs import EncodedSegment, Lossless, Ranks, Zstd, emitting, loops
from cag_store.codecs.ranks import NUM_RANKED, unpack_reference
from cag_store.errors import CorruptEntry
from cag_store.testing import sample_array
from fuzzing import mutated

SHAPES = [(1, 1, 1), (2, 3, 8), (3, 65, 16), (1, 129, 33), (2, 64, 64), (1, 40, 200), (2, 7, 5)]
compiled_only = pytest.mark.skipif(loops.compiled() is None, reason="the compiled loops need numba")


def skewed(shape, seed=0, spread=2.0):
    """Bytes about a base of their channel; a few are anywhere."""
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 256, (shape[0], 1, shape[2]))
    plane = base - np.abs(generator.normal(0, spread, shape)).astype(int)
    anywhere = generator.random(shape) < 0.02
    return np.where(anywhere, generator.integers(0, 256, shape), plane).astype(np.uint8)


@pytest.fixture
def by_reference(monkeypatch):
    def run(function, *arguments):
        with monkeypatch.context() as patched:
            patched.setattr(loops, "compiled", lambda: None)
            return function(*arguments)

    return run


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 40.0])
def test_both_ways_give_the_same_bytes(by_reference, shape, spread):
    plane = skewed(shape, spread=spread)
    packed = Ranks().pack(plane.tobytes(), shape)
    assert by_reference(Ranks().pack, plane.tobytes(), shape) == packed
    if len(packed) < plane.size:
        for unpacked in (Ranks().unpack(memoryview(packed), shape), by_reference(Ranks().unpack, packed, shape)):
            assert np.array_equal(unpacked, plane.reshape(-1))


def test_what_its_bits_cost_is_what_they_say():
    """2 bits for three differences, 4 for three more, 7 for seven more, 15 for the rest: docs/format.md 5."""
    shape, values = (1, 2 * 1024, 1), np.repeat(np.arange(14), [512, 256, 256, 256, 256, 128, *[52] * 7, 20])
    packed = Ranks().pack(values.astype(np.uint8).tobytes(), shape)
    assert len(packed) == 12 + NUM_RANKED + 1 + 2048 * 2 // 8 + 1024 * 2 // 8 + 384 * 3 // 8 + 20
    assert np.array_equal(Ranks().unpack(memoryview(packed), shape), values)


def test_what_cannot_be_packed_is_left():
    data = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8).tobytes()
    assert Ranks().pack(data, (2, 32, 64)) == data


def test_channels_with_bases_of_their_own_cost_nothing():
    """What Huffman codes of all channels together cannot see."""
    shape = (4, 256, 64)
    plane = skewed(shape, spread=1.0)
    assert len(Ranks().pack(plane.tobytes(), shape)) < 0.6 * len(Zstd(1, 7, 6).pack(plane.tobytes(), shape))


@compiled_only
@pytest.mark.parametrize("shape", [(2, 40, 8), (1, 64, 64), (2, 9, 7)])
def test_both_refuse_the_same_damage(shape):
    """Whatever the compiled loops take, the reference takes, and reads as they do; so with what they refuse."""
    plane, chance, accepted = skewed(shape, spread=3.0), random.Random(3), 0
    packed = Ranks().pack(plane.tobytes(), shape)
    out = np.empty(shape, np.uint8)
    for _ in range(1500):
        data = mutated(chance, packed, [packed])
        if not data:
            continue
        taken = loops.compiled().unpack_ranks(np.frombuffer(data, np.uint8), out)
        try:
            expected = unpack_reference(Ranks().parsed(memoryview(data), shape), shape)
        except CorruptEntry:
            assert not taken
            continue
        assert taken
        assert np.array_equal(out.reshape(-1), expected)
        accepted += 1
    assert 0 < accepted < 1500


@compiled_only
@pytest.mark.parametrize("features", [{}, {"bmi2": True}, {"avx2": True}])
def test_processors_with_less(monkeypatch, features):
    """The same loops made for fewer instructions than this machine may have; not kept in numba's cache."""
    if any(not emitting.FEATURES.get(name) for name in features):
        pytest.skip("this processor has not even that")
    monkeypatch.setattr(emitting, "FEATURES", features)
    monkeypatch.setattr(emitting, "compiled", lambda function, *kinds: emitting.numba.njit(list(kinds))(function))
    spec = importlib.util.find_spec("cag_store.codecs.compiled_ranks")
    less = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(less)
    assert less is not sys.modules[spec.name]
    for shape in SHAPES:
        plane = skewed(shape, spread=3.0)
        packed = Ranks().pack(plane.tobytes(), shape)
        out = np.empty(shape, np.uint8)
        if len(packed) < plane.size:
            assert less.unpack_ranks(np.frombuffer(packed, np.uint8), out)
            assert np.array_equal(out, plane)


def segments_of(codec, arrays, outs, dtype="bfloat16"):
    encoded = [codec.encode(array, dtype) for array in arrays]
    return [EncodedSegment(memoryview(data), (out,), "keys", 0, 0) for data, out in zip(encoded, outs, strict=True)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", [Lossless(), Lossless(packers=(Ranks(),)), Lossless(packers=())], ids=repr)
def test_segments_decode_together_as_one_by_one(codec, dtype):
    """Whether they are ranks or not, and wherever they go."""
    arrays = [sample_array(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    arrays.append(np.zeros_like(arrays[2]))  # which zstd packs best
    buffers = [np.zeros((a.shape[0], a.shape[1] + 5, a.shape[2]), a.dtype) for a in arrays]
    outs = [buffer[:, 2:-3] for buffer in buffers]
    spread = np.zeros((5, 7, 2), arrays[-2].dtype).transpose(2, 1, 0)
    codec.decode_segments(segments_of(codec, [*arrays, arrays[-2]], [*outs, spread], dtype))
    for array, out, buffer in zip(arrays, outs, buffers, strict=True):
        assert out.tobytes() == array.tobytes()
        assert not buffer[:, :2].any()
        assert not buffer[:, -3:].any()
    assert spread.tobytes() == arrays[-2].tobytes()


@pytest.mark.parametrize("place", [0, 1, 2, 6, 9, 11, 40, 60, -1])
def test_a_damaged_one_among_them_is_refused(place):
    codec = Lossless(packers=(Ranks(),))
    array = skewed((1, 64, 64)).astype("<u2") << 7
    whole = codec.encode(array, "bfloat16")
    outs = [np.zeros_like(array) for _ in range(3)]
    damaged = bytearray(whole)
    damaged[place] ^= 0x55
    segments = [
        EncodedSegment(memoryview(d), (o,), "keys", 0, 0) for d, o in zip((whole, damaged, whole), outs, strict=True)
    ]
    expected = np.zeros_like(array)
    try:
        codec.decode_into(bytes(damaged), expected)
    except CorruptEntry:
        with pytest.raises(CorruptEntry):
            codec.decode_segments(segments)
    else:
        codec.decode_segments(segments)
        assert np.array_equal(outs[1], expected)
