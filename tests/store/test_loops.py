"""Compiled loops and their numpy reference give the same bits; without numba everything still decodes."""

import subprocess
import sys

import numpy as np
import pytest

from cag_store.codecs import EncodedSegment, Int4, Int8, Lossless, Rotate, codec_from_config, loops
from cag_store.codecs.widths import BYTES, NIBBLES
from cag_store.dtypes import STORAGE_DTYPES
from cag_store.errors import CorruptEntry
from cag_store.testing import CodecConformance, sample_array

SHAPES = [(1, 1, 1), (2, 3, 8), (3, 65, 16), (2, 300, 4), (1, 129, 33), (5, 64, 64), (3, 7, 5)]


@pytest.fixture
def compiled():
    pytest.importorskip("numba", reason="the compiled loops need numba")
    return loops.compiled()


@pytest.fixture
def numpy_only(monkeypatch):
    monkeypatch.setattr(loops, "compiled", lambda: None)


def targets(shape, dtype):
    """Buffers of other strides that hold the same: contiguous, strided across heads, tokens outermost."""
    num_heads, num_tokens, head_dim = shape
    yield np.full(shape, 7, dtype)
    yield np.full((num_heads, num_tokens + 6, head_dim), 7, dtype)[:, 1 : 1 + num_tokens]
    yield np.full((num_tokens, num_heads, head_dim), 7, dtype).transpose(1, 0, 2)
    yield np.full((num_heads, 2 * num_tokens, head_dim + 3), 7, dtype)[:, ::2, 1 : 1 + head_dim]


def decoded_both_ways(codec, data, shape, dtype):
    """Pairs of arrays: compiled, reference."""
    for out, reference in zip(targets(shape, dtype), targets(shape, dtype), strict=True):
        assert loops.compiled_for(out) is not None
        codec.decode_into(data, out)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loops, "compiled", lambda: None)
            codec.decode_into(data, reference)
        yield out, reference


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(
    "codec",
    [
        Lossless(),
        Lossless(packers=()),
        Lossless(Rotate(3)),
        Int8(),
        Int8(group_tokens=7, exact_tokens=0),
        Int8(300, 5),
        Int4(),
        Int4(recent_tokens=0),
        Int4(group_tokens=7, exact_tokens=0, group_channels=3, recent_tokens=9),
        Int4(300, 5, group_channels=40, recent_tokens=0),
    ],
    ids=repr,
)
def test_the_same_bits_whatever_the_strides(compiled, codec, side, shape, dtype):
    array = sample_array(shape, dtype, seed=sum(shape))
    data = codec.encode(array, dtype, side)
    unaligned = memoryview(bytearray(b"\0" + data))[1:]
    for out, reference in decoded_both_ways(codec, unaligned, shape, array.dtype):
        assert out.tobytes() == reference.tobytes()
        if codec.lossless:
            assert out.tobytes() == array.tobytes()


@pytest.mark.parametrize("width", [2, 4])
def test_every_byte_in_every_plane(compiled, width):
    generator = np.random.default_rng(width)
    planes = [generator.permutation(np.tile(np.arange(256, dtype=np.uint8), 16)) for _ in range(width)]
    for out in targets((4, 32, 32), f"u{width}"):
        compiled.join_planes(planes, out)
        bits = sum(plane.astype(np.uint64) << np.uint64(8 * i) for i, plane in enumerate(reversed(planes)))
        expected = (bits >> np.uint64(1)) | ((bits & np.uint64(1)) << np.uint64(8 * width - 1))
        assert np.array_equal(out.ravel(), expected.astype(out.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize(
    ("codec", "width"),
    [(Int8(group_tokens=16), BYTES), (Int4(group_tokens=16, group_channels=96), NIBBLES)],
    ids=["int8", "int4"],
)
def test_dequantizing_is_not_fused_and_rounds_alike(compiled, codec, width, side, dtype):
    """Scales and offsets of all magnitudes, zeros and subnormal numbers included, and all codes."""
    shape = (4, 64, 256)
    generator = np.random.default_rng(1)
    codes = generator.permuted(np.tile(np.arange(256).astype(width.dtype), (4, 64, 1)), axis=2)
    codes = codes[..., : width.row_bytes(256)].copy()
    groups = codec._groups(side, *shape[1:])
    parameters = generator.integers(0, 0x7C00, (2, 4, *groups), dtype=np.uint16)
    parameters[1] |= generator.integers(0, 2, parameters[1].shape, dtype=np.uint16) << np.uint16(15)
    out, reference = (np.zeros(shape, STORAGE_DTYPES[dtype]) for _ in range(2))
    size = codec.group_tokens if side == "keys" else codec._channels(256)
    width.dequantize(compiled, side, codes, parameters, size, out)
    codec._dequantize(width, side, codes, parameters, reference)
    assert np.array_equal(out.view(np.uint8), reference.view(np.uint8))


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize(
    "codec",
    [
        Int8(exact_tokens=1),
        Int8(group_tokens=7, exact_tokens=0),
        Int4(wide_key_layers=[1]),
        Int4(9, 0, group_channels=3, recent_tokens=2),
    ],
    ids=repr,
)
def test_segments_decode_together_as_one_by_one(codec, dtype):
    """Plain or not, of every width, wherever they go."""
    segments, expected = [], []
    for number, shape in enumerate(SHAPES):
        array = sample_array(shape, dtype, seed=number)
        for layer, side in ((0, "keys"), (1, "keys"), (1, "values")):
            data = codec.encode_layers([array], dtype, side, layer, 512)
            for out in targets(shape, array.dtype):
                segments.append(EncodedSegment(memoryview(b"\0" + data)[1:], (out,), side, layer, 512))
                expected.append(np.empty_like(array))
                codec.decode_layers_into(data, [expected[-1]], side, layer, 512)
    codec.decode_segments(segments)
    for segment, whole in zip(segments, expected, strict=True):
        assert segment.outs[0].tobytes() == whole.tobytes()


@pytest.mark.parametrize("codec", [Int8(), Int4()], ids=repr)
def test_a_bad_scale_among_segments_is_refused(codec):
    array = sample_array((2, 64, 64), "bfloat16")
    data = codec.encode(array, "bfloat16", "keys", 512)
    bad = bytearray(data)
    bad[12:14] = b"\xc0\xff"
    outs = [np.empty_like(array) for _ in range(2)]
    segments = [EncodedSegment(memoryview(d), (o,), "keys", 0, 512) for d, o in zip((data, bad), outs, strict=True)]
    with pytest.raises(CorruptEntry, match="scales"):
        codec.decode_segments(segments)


@pytest.mark.usefixtures("numpy_only")
class TestLosslessReference(CodecConformance):
    configs = [{"id": "lossless"}]

    def tolerance(self, array, dtype, side):
        return 0


def test_buffers_that_the_loops_cannot_write_are_left_to_the_reference(compiled):
    array = sample_array((2, 9, 4), "bfloat16")
    for codec in (Lossless(), Lossless(packers=())):
        spread = np.zeros((2, 9, 8), "<u2")[..., ::2]
        memory = bytearray(array.nbytes + 1)
        unaligned = np.frombuffer(memoryview(memory)[1:], "<u2").reshape(array.shape)
        for out in (spread, unaligned):
            assert loops.compiled_for(out) is None
            codec.decode_into(codec.encode(array, "bfloat16"), out)
            assert np.array_equal(out, array)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_numba_is_imported_by_decoding_only():
    result = python("import sys, cag_store, cag_store.verify; assert 'numba' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_without_numba_numpy_decodes():
    result = python(
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from cag_store import codec_from_config\n"
        "from cag_store.codecs import loops\n"
        "assert not loops.warm_up()\n"
        "array = np.arange(96, dtype='<u2').reshape(2, 6, 8)\n"
        "out = np.zeros_like(array)\n"
        "codec = codec_from_config('lossless')\n"
        "codec.decode_into(codec.encode(array, 'bfloat16'), out)\n"
        "assert np.array_equal(out, array)\n"
    )
    assert result.returncode == 0, result.stderr


def test_warm_up_readies_the_compiled_loops(compiled):
    assert loops.warm_up()
    assert loops.compiled_for(np.zeros((1, 2, 3), "<u2")) is compiled
    assert codec_from_config("int8") == Int8()
