"""Layers that keep only the last tokens: the numbers and codes of a whole load from there on, and no other is read."""

from itertools import pairwise

import numpy as np
import pytest
from test_coded import empty, numbers

from cag_store import Store, pipeline
from cag_store.chunk_files import open_chunk
from cag_store.codecs import StreamSide, loops
from cag_store.codecs.streams import NUM_PARTS
from cag_store.errors import CorruptEntry, UnencodableArray
from cag_store.paths import chunk_path
from cag_store.testing.bases import sample_basis

HEADS, DIMS = (2, 1, 2), (8, 16, 4)
CHUNK = 32
NUM_TOKENS = 140
NEEDED = {
    "all": [0, 0, 0],
    "the end of two layers": [130, 0, 109],
    "nothing of the last layer": [64, 33, NUM_TOKENS],
    "only the middle layer": [NUM_TOKENS, 95, NUM_TOKENS],
    "the last chunk": [139, 139, 139],
    "nothing": [NUM_TOKENS] * 3,
}
CODED = [
    {"id": "int8", "group_tokens": 8},
    {"id": "int4", "group_tokens": 16, "chunk_tokens": CHUNK, "recent_tokens": 5, "wide_key_layers": [1]},
    {"id": "int4", "group_tokens": 16, "chunk_tokens": CHUNK, "recent_tokens": 20},  # of the last chunk all
    {"id": "int8", "group_tokens": 8, "packer": {"id": "zstd"}},  # nothing plain
]
NUMBERS = ["lossless", *CODED]


@pytest.fixture(params=["calls", "threads", "numpy"])
def way(request, monkeypatch):
    """The ways of the pipeline, and one without compiled loops."""
    if request.param == "numpy":
        monkeypatch.setattr(loops, "compiled", lambda: None)
    elif loops.compiled() is None:
        pytest.skip("numba is not there")
    if request.param != "calls":
        monkeypatch.setattr(pipeline, "job_calls", lambda: None)
    return request.param


@pytest.fixture(params=[1, 1 << 20], ids=["small jobs", "large jobs"], autouse=True)
def job_bytes(request, monkeypatch):
    monkeypatch.setattr(pipeline, "JOB_BYTES", request.param)


def inside(shape):
    """An array with numbers before it and behind it that nobody may touch, and those numbers."""
    memory = np.full((shape[0], shape[1] + 2 * CHUNK, shape[2]), 77, np.uint16)
    return memory[:, CHUNK : CHUNK + shape[1]], (memory[:, :CHUNK], memory[:, CHUNK + shape[1] :])


def bytes_of(store, manifest, firsts, groups):
    """Of the segments that are not before the first token of their layers."""
    found = 0
    for chunk in (open_chunk(store.backend, entry, store.codec) for entry in manifest.chunks):
        sizes = [last - first for first, last in pairwise(chunk.offsets)]
        found += sum(sum(sizes[2 * g : 2 * g + 2]) for g, (f, _) in enumerate(groups) if chunk.entry.start >= firsts[f])
    return found


@pytest.mark.parametrize("needed", NEEDED.values(), ids=NEEDED)
@pytest.mark.parametrize("config", NUMBERS, ids=str)
def test_numbers_from_there_on_are_those_of_a_whole_load(store, small, config, needed, way):
    cache = small(config, num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    manifest = cache.build(store)
    with store.reader(manifest) as reader:
        whole = cache.buffers(spare=0)
        reader.load(whole)
    with store.reader(manifest) as reader:
        firsts, arrived = reader.first_tokens(needed), []
        assert [token - first for token, first in zip(needed, firsts, strict=True)] == [
            0 if token == NUM_TOKENS else token % CHUNK for token in needed
        ]
        rooms = [
            tuple(inside((heads, NUM_TOKENS - first, dim)) for _ in range(2))
            for heads, dim, first in zip(HEADS, DIMS, firsts, strict=True)
        ]
        reader.load([(keys[0], values[0]) for keys, values in rooms], arrived.append, first_tokens=firsts)
        assert reader.timings.bytes_read == bytes_of(store, manifest, firsts, [(0, 1), (1, 2), (2, 3)])
    assert arrived == [0, 1, 2]
    for sides, expected, first in zip(rooms, whole, firsts, strict=True):
        for (found, around), side in zip(sides, expected, strict=True):
            assert np.array_equal(found, side[:, first:])
            assert all((part == 77).all() for part in around)


@pytest.mark.parametrize("needed", NEEDED.values(), ids=NEEDED)
@pytest.mark.parametrize("config", CODED, ids=str)
def test_codes_from_there_on_stand_for_the_same_numbers(store, small, config, needed, way):
    cache = small(config, num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    with store.reader(cache.build(store)) as reader:
        whole = cache.buffers(spare=0)
        reader.load(whole)
        firsts, arrived = reader.first_tokens(needed), []
        shapes = reader.coded_shapes(firsts)
        kept = [tuple(map(empty, both)) for both in shapes]
        reader.load(kept, arrived.append, first_tokens=firsts)
    assert arrived == [0, 1, 2]
    for sides, both, expected, first in zip(kept, shapes, whole, firsts, strict=True):
        for side, shape, wanted in zip(sides, both, expected, strict=True):
            assert shape.num_tokens == NUM_TOKENS - first
            assert shape.num_first == (4 if first == 0 else 0)
            if shape.num_tokens:
                assert np.array_equal(numbers(side, shape), wanted[:, first:])


@pytest.fixture
def joint(store, small):
    digest = store.put_blob(sample_basis(HEADS, DIMS, 2, kept=7).to_bytes())
    config = {"id": "transform", "basis": digest, "joint_layers": 2, "step": -256, "exact_tokens": 4}
    return small(config, num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)


def room(firsts):
    """For numbers of all layers, each from its first token on."""
    sizes = zip(HEADS, DIMS, firsts, strict=True)
    return [
        tuple(np.zeros((heads, NUM_TOKENS - first, dim), np.uint16) for _ in range(2)) for heads, dim, first in sizes
    ]


def stream_side(shape):
    bounds = np.full((len(shape.chunks), NUM_PARTS + 1), -1, np.int64)
    return StreamSide(shape, bounds, np.zeros(shape.slots[-1], np.uint8))


@pytest.mark.parametrize(
    ("needed", "firsts"),
    [
        ([130, 0, 109], [0, 0, 96]),
        ([130, 70, 0], [64, 64, 0]),
        ([NUM_TOKENS, 100, NUM_TOKENS], [96, 96, NUM_TOKENS]),
        ([NUM_TOKENS, NUM_TOKENS, 3], [NUM_TOKENS, NUM_TOKENS, 0]),
    ],
)
def test_layers_that_share_segments_keep_what_one_of_them_needs(store, joint, needed, firsts, way):
    manifest = joint.build(store)
    with store.reader(manifest) as reader:
        whole = joint.buffers(spare=0)
        reader.load(whole)
    with store.reader(manifest) as reader:
        assert reader.first_tokens(needed) == firsts
        found = room(firsts)
        reader.load(found, first_tokens=firsts)
        assert reader.timings.bytes_read == bytes_of(store, manifest, firsts, [(0, 2), (2, 3)])
        pairs = [tuple(map(stream_side, both)) for both in reader.stream_shapes(firsts)]
        reader.load([pairs[0], pairs[0], pairs[1]], first_tokens=firsts)
    for sides, expected, first in zip(found, whole, firsts, strict=True):
        assert all(np.array_equal(side, wanted[:, first:]) for side, wanted in zip(sides, expected, strict=True))
    for first, (keys, values) in zip((firsts[0], firsts[2]), pairs, strict=True):
        assert [chunk.start for chunk in keys.shape.chunks] == [*range(first, NUM_TOKENS, CHUNK)]
        assert (values.bounds >= 0).all()


@pytest.mark.parametrize("firsts", [[0, 0], [0, 0, 33], [0, -32, 0], [0, 0, 141]])
def test_only_starts_of_chunks_can_be_first(store, small, firsts):
    cache = small(num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    with store.reader(cache.build(store)) as reader, pytest.raises(UnencodableArray, match="first tokens"):
        reader.load(cache.buffers(), first_tokens=firsts)


def test_layers_of_a_group_begin_alike(store, joint):
    with store.reader(joint.build(store)) as reader, pytest.raises(UnencodableArray, match="alike"):
        reader.load(joint.buffers(), first_tokens=[0, 32, 0])


def test_buffers_are_for_what_is_kept(store, small):
    cache = small(num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    short = [tuple(side[:, 32:] for side in pair) for pair in cache.buffers(spare=0)]
    with store.reader(cache.build(store)) as reader:
        reader.load(short, first_tokens=[32, 32, 32])
        with pytest.raises(UnencodableArray, match="layer 1: expected a writable buffer"):
            reader.load(short, first_tokens=[32, 0, 32])


def test_damage_is_an_error_where_it_is_read_and_only_there(store, small, way):
    cache = small(num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    manifest = cache.build(store)
    needed = [130, 0, 96]
    for number, entry in enumerate(manifest.chunks):
        path = store.backend.root / chunk_path(entry.key)
        whole, chunk = path.read_bytes(), open_chunk(store.backend, entry)
        path.chmod(0o644)
        for position in range(6):
            damaged = bytearray(whole)
            damaged[chunk.offsets[position + 1] - 1] ^= 1
            path.write_bytes(damaged)
            with store.reader(manifest) as reader:
                firsts = reader.first_tokens(needed)
                buffers = room(firsts)
                if number * CHUNK >= firsts[position // 2]:
                    with pytest.raises(CorruptEntry, match=f"of layer {position // 2}: checksum"):
                        reader.load(buffers, first_tokens=firsts)
                else:
                    reader.load(buffers, first_tokens=firsts)
                    assert np.array_equal(buffers[0][0], cache.layers[0][0][:, firsts[0] :])
            assert not store.verify("small").ok
        path.write_bytes(whole)
    assert store.verify("small").ok


def test_headers_of_all_chunks_are_verified_whatever_is_kept(store, small):
    cache = small(num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    manifest = cache.build(store)
    path = store.backend.root / chunk_path(manifest.chunks[0].key)
    path.chmod(0o644)
    for place in (20, manifest.chunks[0].header_bytes + 1):  # of the header, and of the token ids
        damaged = bytearray(path.read_bytes())
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptEntry):
            store.reader(manifest)
        damaged[place] ^= 1
        path.write_bytes(damaged)


def test_only_the_files_that_are_read_are_opened(store, small, monkeypatch):
    cache = small(num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    manifest = cache.build(store)
    opened, descriptor = [], store.backend.descriptor
    monkeypatch.setattr(
        store.backend, "descriptor", lambda path, length: (opened.append(path), descriptor(path, length))[1]
    )
    with store.reader(manifest) as reader:
        firsts = reader.first_tokens([100, 130, 64])
        reader.load(room(firsts), first_tokens=firsts)
    expected = [chunk_path(entry.key) for entry in manifest.chunks[2:]]
    assert opened == (expected if pipeline.job_calls() is not None and loops.compiled() is not None else [])


def test_an_object_store_is_asked_for_fewer_bytes(small):
    store = Store.open("memory://")
    cache = small(num_tokens=NUM_TOKENS, chunk_tokens=CHUNK)
    manifest = cache.build(store)
    taken = []
    for needed in ([0, 0, 0], [130, 0, 109]):
        with store.reader(manifest) as reader:
            firsts = reader.first_tokens(needed)
            buffers = room(firsts)
            reader.load(buffers, first_tokens=firsts)
            taken.append(reader.timings.bytes_read)
            assert np.array_equal(buffers[1][1], cache.layers[1][1])
    assert taken[1] == bytes_of(store, manifest, firsts, [(0, 1), (1, 2), (2, 3)]) < taken[0]
