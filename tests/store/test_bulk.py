"""Verifying and decoding in one compiled step: what it takes on, what it leaves, and that it never takes damage."""

import math

import numpy as np
import pytest
import xxhash
from test_coded import empty

from cag_store import job_decoding, pipeline
from cag_store.chunk_files import open_chunk
from cag_store.codecs import codec_from_config, loops
from cag_store.errors import CorruptEntry
from cag_store.paths import chunk_path

pytestmark = pytest.mark.skipif(loops.compiled() is None, reason="numba is not there")

RANKS = {"id": "lossless", "packers": [{"id": "ranks"}]}
CONFIGS = [
    RANKS,
    "int8",
    {"id": "int8", "group_tokens": 24, "exact_tokens": 0},
    {"id": "int4", "chunk_tokens": 96, "wide_key_layers": [1]},
    {"id": "int4", "group_channels": 3, "chunk_tokens": 96, "recent_tokens": 5, "exact_tokens": 7},
]
GROUPED = [
    {"id": "int8", "group_tokens": 32},
    {"id": "int4", "group_tokens": 32, "chunk_tokens": 96, "wide_key_layers": [1]},
    {"id": "int4", "group_tokens": 32, "group_channels": 4, "chunk_tokens": 96, "exact_tokens": 7},
]


def arrays_of(reader, cache, coded):
    if coded:
        return [tuple(map(empty, both)) for both in reader.coded_shapes()]
    return cache.buffers()


def flat(buffers):
    """All arrays of either kind."""
    return [part for pair in buffers for side in pair for part in ([side] if isinstance(side, np.ndarray) else side)]


@pytest.mark.parametrize("num_bytes", [241, 255, 256, 257, 1023, 1024, 1025, 1088, 1089, 2048, 4097, 124_321])
def test_hashes_are_those_of_xxhash(num_bytes):
    from cag_store.codecs.compiled_xxh3 import SECRET, is_hash_of

    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, dtype=np.uint8)
    expected = np.frombuffer(xxhash.xxh3_128_digest(data), ">u8").astype(np.uint64)
    sums = np.empty(8, np.uint64)
    assert is_hash_of(data.ctypes.data, data.size, expected, SECRET, sums)
    for bit in (0, 63):
        for half in (0, 1):
            other = expected.copy()
            other[half] ^= np.uint64(1 << bit)
            assert not is_hash_of(data.ctypes.data, data.size, other, SECRET, sums)
    for place in {0, 63, 64, num_bytes // 2, num_bytes - 65, num_bytes - 1}:
        data[place] ^= 1
        assert not is_hash_of(data.ctypes.data, data.size, expected, SECRET, sums)
        data[place] ^= 1


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("num_tokens", [90, 96, 200])
@pytest.mark.parametrize(
    ("config", "coded"), [*((config, False) for config in CONFIGS), *((config, True) for config in GROUPED)], ids=str
)
def test_one_step_takes_all_segments_and_gives_what_the_reference_gives(
    store, small, monkeypatch, config, coded, num_tokens, quick
):
    cache = small(config, num_tokens=num_tokens, chunk_tokens=96)
    manifest = cache.build(store)
    left = []
    decode_singly = job_decoding.JobDecoder.decode_singly

    def noted(self, job, data, positions):
        left.extend((job, position) for position in positions)
        decode_singly(self, job, data, positions)

    if not quick:
        monkeypatch.setattr(pipeline, "job_calls", lambda: None)
    monkeypatch.setattr(job_decoding.JobDecoder, "decode_singly", noted)
    with store.reader(manifest) as reader:
        found = arrays_of(reader, cache, coded)
        reader.load(found)
        too_small = [
            (job, position) for job, position in left if job.chunk.index.sizes[position] <= loops.XXH3_ABOVE_BYTES
        ]
        assert left == too_small
        monkeypatch.setattr(loops, "compiled", lambda: None)
        expected = arrays_of(reader, cache, coded)
        reader.load(expected)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(flat(found), flat(expected), strict=True))
    if config is RANKS:
        cache.check(found)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("position", range(6))
def test_damage_in_any_segment_is_named(store, small, position, coded):
    cache = small("int8", num_tokens=120, chunk_tokens=64)
    manifest = cache.build(store)
    chunk = open_chunk(store.backend, manifest.chunks[1])
    path = store.backend.root / chunk_path(chunk.entry.key)
    whole = path.read_bytes()
    for place in (chunk.offsets[position], chunk.offsets[position + 1] - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.chmod(0o644)
        path.write_bytes(damaged)
        with store.reader(manifest) as reader:
            side = "values" if position % 2 else "keys"
            with pytest.raises(CorruptEntry, match=f"{side} of layer {position // 2}: checksum"):
                reader.load(arrays_of(reader, cache, coded))


def room_at(shift, shape):
    """An array of 16-bit elements that begins `shift` bytes behind a line of the processor's cache."""
    memory = np.full(2 * math.prod(shape) + 128, 77, np.uint8)
    first = -memory.ctypes.data % 64 + shift
    return memory[first : first + 2 * math.prod(shape)].view(np.uint16).reshape(shape)


@pytest.mark.parametrize("shift", [0, 2, 32])
@pytest.mark.parametrize("config", [RANKS, "int8", CONFIGS[3]], ids=str)
def test_what_is_damaged_or_of_another_form_is_left(config, shift):
    """With the right hash, as a forger would write it: the step refuses, and nothing is written out of its arrays."""
    from cag_store.codecs.base import RawSegments
    from cag_store.testing import sample_array

    codec, array = codec_from_config(config), sample_array((2, 64, 64), "bfloat16", 3)
    data = codec.encode_layers([array], "bfloat16", "keys", 0, 96)
    room = room_at(shift, (2, 96 + 64 + 8, 64))
    decode = codec.bulk_decoder([(room, room)], [0])

    def decoded(encoded, size=None):
        room[:] = 77
        held = np.frombuffer(encoded, np.uint8)
        hashes = np.frombuffer(xxhash.xxh3_128_digest(held[:size]), ">u8").astype(np.uint64)[None]
        pieces = np.array([[held.ctypes.data, held.size if size is None else size]], np.int64)
        (done,) = decode(RawSegments(0, pieces, hashes, 96, 64))
        assert (room[:, :96] == 77).all()
        assert (room[:, 160:] == 77).all()
        return bool(done)

    assert decoded(data)
    expected = np.empty_like(array)
    codec.decode_layers_into(data, [expected], "keys", 0, 96)
    assert np.array_equal(room[:, 96:160], expected)
    assert not decoded(data, 240)
    assert not decoded(data, len(data) - 1)
    assert not decoded(data + b"\0")
    for place in range(4):
        other = bytearray(data)
        other[place] ^= 1
        assert not decoded(other)
    if codec.codec_id != "lossless":
        other = bytearray(data)
        other[12:14] = b"\xc0\xff"  # a scale that is no number
        assert not decoded(other)


def test_a_checksum_that_is_no_number_fits_nothing(store, small):
    chunk = open_chunk(store.backend, small(num_tokens=90, chunk_tokens=96).build(store).chunks[0])
    found = chunk.hashes(0, 6)
    assert found.shape == (6, 2)
    checksums = chunk.index.checksums
    assert found.astype(">u8").tobytes().hex() == "".join(checksums)
    for text in ("Z" * 32, " " * 32, checksums[1].upper().replace("0", "A")):
        object.__setattr__(chunk.index, "checksums", (checksums[0], text, *checksums[2:]))
        assert chunk.hashes(0, 6) is None
        assert chunk.hashes(2, 6) is not None
