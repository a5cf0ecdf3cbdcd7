"""`transform` caches decoded on a device: the bits of the store's own decoder, and its errors. On a CPU by torch's
reference operations, on a GPU by Triton's kernels."""

import importlib
import os
import struct
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from cag import model as model_module
from cag.calibration import CalibrationOptions, calibrate
from cag.engine import Engine
from cag.forward.state import KvShape
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel, ModelOptions
from cag.residency import stream_buffers, stream_decoding
from cag.residency.angles import angles_on
from cag.residency.buffers import storage_view
from cag.residency.host_copies import HostCopies
from cag.residency.load_plan import plan_load
from cag.residency.resident import ResidentPrefix
from cag.residency.stream_buffers import StreamBuffers, can_decode
from cag.residency.uploads import Uploads
from cag_store import ROOT, ChunkContext, ChunkHeader, Store, chunk_key
from cag_store.codecs import JointTransform, StreamChunk
from cag_store.codecs.transform import Rotation, rans
from cag_store.errors import CorruptEntry
from cag_store.testing import sample_array
from cag_store.testing.bases import sample_basis
from tiny import tiny_config, write_tiny_model

HEADS, DIMS = (2, 1, 2, 1, 3), (8, 16, 8, 4, 6)  # groups of two layers, the last of one
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
rans_operation, inverse_operation = (importlib.import_module(f"cag_kernels.{name}") for name in ("rans", "inverse"))
SEGMENT_HEAD = struct.Struct("<BBHIII")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request) -> torch.device:
    return torch.device(request.param)


class Cache:
    """Chunks of one prefix in a store, and a reader of them."""

    def __init__(self, num_tokens=150, chunk_tokens=70, dtype="bfloat16", layers=None, **choices):
        self.store, self.num_tokens, self.chunk_tokens = Store.in_memory(workers=1), num_tokens, chunk_tokens
        self.token_ids = np.random.default_rng(1).integers(0, 9999, num_tokens)
        shapes = {name: choices.pop(name) for name in ("kept", "pairing") if name in choices}
        digest = self.store.put_blob(sample_basis(HEADS, DIMS, 2, **shapes).to_bytes())
        codec = {"id": "transform", "basis": digest, "joint_layers": 2, "step": -256, "exact_tokens": 4} | choices
        self.context = ChunkContext("model", {"theta": 1.0}, dtype, "float32", codec, chunk_tokens)
        self.layers = layers or [
            tuple(sample_array((heads, num_tokens, dim), dtype, 2 * layer + side) for side in (0, 1))
            for layer, (heads, dim) in enumerate(zip(HEADS, DIMS, strict=True))
        ]
        self.entries = self._put()

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.context.dtype)

    def _put(self):
        entries, parent = [], ROOT
        for start in range(0, self.num_tokens, self.chunk_tokens):
            ids = self.token_ids[start : start + self.chunk_tokens]
            key = chunk_key(parent, ids, self.context)
            header = ChunkHeader(key, parent, start, len(ids), HEADS, DIMS, self.context)
            part = slice(start, start + len(ids))
            entries.append(self.store.put_chunk(header, [(k[:, part], v[:, part]) for k, v in self.layers], ids))
            parent = key
        return entries

    def reader(self):
        return self.store.chunk_reader(self.entries, self.context)

    def decoded(self):
        """By the store, on the CPU."""
        sizes = [(heads, self.num_tokens, dim) for heads, dim in zip(HEADS, DIMS, strict=True)]
        found = [(torch.empty(size, dtype=self.dtype), torch.empty(size, dtype=self.dtype)) for size in sizes]
        with self.reader() as reader:
            reader.load([tuple(map(storage_view, pair)) for pair in found])
        return found

    def kept(self, device, needed=None) -> StreamBuffers:
        """Read and verified, on the way to a device; of each layer what it needs, all if nothing is said."""
        with self.reader() as reader:
            firsts = None if needed is None else reader.first_tokens(needed)
            shapes = reader.stream_shapes(firsts)
            assert can_decode(shapes)
            buffers, arrived = StreamBuffers(shapes, self.dtype, device), []
            for ((keys, values),) in buffers.layers():
                assert keys.fill_(77).device.type == values.fill_(77).device.type == device.type
            if device.type == "cuda":
                torch.cuda.synchronize()

            def on_layer(layer):
                arrived.append(layer)
                buffers.arrived(layer)

            reader.load(buffers.views(), on_layer, first_tokens=firsts)
        buffers.uploads.finish()
        assert arrived == list(range(len(HEADS)))
        for layer in arrived:
            buffers.confirm(layer)
        return buffers


def assert_same_bits(found, expected):
    for (mine,), theirs in zip(found, expected, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.shape == other.shape
            assert torch.equal(one.cpu().contiguous().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "num_tokens, chunk_tokens, choices",
    [
        (150, 70, {}),
        (150, 70, {"kept": 7, "pairing": "adjacent"}),
        (1, 64, {}),
        (3, 2, {}),  # chunks of exact tokens only
        (67, 33, {"exact_tokens": 0, "step": -512}),  # low bits
        (99, 33, {"exact_tokens": 35, "step": 90}),  # most components are not kept
        (129, 64, {"step": 4000}),  # none is
    ],
    ids=str,
)
def test_decoded_there_is_decoded_here(device, dtype, num_tokens, chunk_tokens, choices):
    cache = Cache(num_tokens, chunk_tokens, dtype, **choices)
    found, expected = cache.kept(device), cache.decoded()
    assert_same_bits(found.layers(), expected)
    again = found.host_copy().again()
    for layer in range(len(HEADS)):
        again.arrived(layer)
    again.uploads.finish()
    assert_same_bits(again.layers(), expected)
    assert again.layers()[0][0].keys.data_ptr() != found.layers()[0][0].keys.data_ptr()


NEEDED = [[0, 0, 140, 100, 170], [199, 170, 0, 9, 66], [199] * 5]


def assert_ends(found, expected):
    """The last tokens of each layer, one segment each."""
    for (mine,), theirs in zip(found, expected, strict=True):
        assert_same_bits([(mine,)], [[side[:, -mine.num_tokens :].contiguous() for side in theirs]])


@pytest.mark.parametrize("most_codes", [1 << 30, 2 * 70 * 24, 1])
@pytest.mark.parametrize("needed", NEEDED, ids=str)
def test_groups_that_keep_their_last_chunks(device, monkeypatch, needed, most_codes):
    """In one piece and in several, of which some groups have nothing; and once more from the host's copy."""
    monkeypatch.setattr("cag.residency.stream_buffers.MAX_CODES", most_codes)
    cache = Cache(200, 33)
    found, expected = cache.kept(device, needed), cache.decoded()
    firsts = [min(needed[:2]) // 33 * 33] * 2 + [min(needed[2:4]) // 33 * 33] * 2 + [needed[4] // 33 * 33]
    assert [segment.num_tokens for (segment,) in found.layers()] == [200 - first for first in firsts]
    assert_ends(found.layers(), expected)
    again = found.host_copy().again()
    for layer in range(len(HEADS)):
        again.arrived(layer)
    again.uploads.finish()
    assert_ends(again.layers(), expected)
    assert found.host_copy().num_bytes < cache.kept(device).host_copy().num_bytes


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
@pytest.mark.parametrize(
    "choices",
    [{}, pytest.param({"kept": 7, "pairing": "adjacent", "exact_tokens": 0, "step": -512}, marks=pytest.mark.slow)],
    ids=["usual", "other choices"],
)
def test_the_kernels_in_their_interpreter_take_what_is_made_for_them(choices, monkeypatch):
    """Among it: segments without tokens between the others."""
    pytest.importorskip("triton")
    for module in (rans_operation, inverse_operation):
        monkeypatch.setattr(module, "triton_runs_on", lambda _device: True)
    cache = Cache(40, 33, **choices)
    found, expected = cache.kept(torch.device("cpu")), cache.decoded()
    assert_same_bits(found.layers(), expected)
    again = found.host_copy().again()  # all groups in one launch
    again.arrived(0)
    assert_same_bits(again.layers(), expected)
    again = cache.kept(torch.device("cpu"), [39, 39, 0, 0, 35]).host_copy().again()
    again.arrived(0)
    assert_ends(again.layers(), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_escapes_and_far_tokens(device, dtype):
    """Codes that no symbol reaches, and tokens that no code reaches, amid others."""
    layers = [list(pair) for pair in Cache(dtype=dtype).layers]
    for layer, side, factor, tokens in ((0, 0, 30, [9, 80]), (1, 1, 1e6, [5, 69, 70, 149]), (2, 0, 300, range(60, 90))):
        loud = layers[layer][side].copy()
        numbers = torch.from_numpy(loud)
        numbers = numbers.view(torch.bfloat16) if dtype == "bfloat16" else numbers
        numbers[:, list(tokens)] *= factor
        layers[layer][side] = loud
    cache = Cache(dtype=dtype, layers=[tuple(pair) for pair in layers])
    found = cache.kept(device)
    escapes = [np.diff(side.bounds[:, 5:7]).sum() for both in found.views() for side in both]
    exact = [np.diff(side.bounds[:, 1:3]).sum() // 4 for both in found.views() for side in both]
    assert sum(escapes) > 0
    assert max(exact) > 4
    assert_same_bits(found.layers(), cache.decoded())


def test_a_long_prefix_is_decoded_in_pieces(device, monkeypatch):
    cache = Cache(200, 33)
    monkeypatch.setattr("cag.residency.stream_buffers.MAX_CODES", 2 * 70 * 24)
    found = cache.kept(device)
    assert len(list(found._pieces(range(1)))) > 2
    assert_same_bits(found.layers(), cache.decoded())
    monkeypatch.setattr("cag.residency.stream_buffers.MAX_CODES", 1)
    assert len(list(found._pieces(range(1)))) == len(cache.entries)
    assert_same_bits(cache.kept(device).layers(), cache.decoded())


def test_a_piece_stays_until_the_device_is_done_with_it(monkeypatch):
    cache, pieces, alive = Cache(200, 33), [], []
    decode = stream_buffers.decode_chunks

    def decoded(streams):
        found = decode(streams)
        pieces.append([weakref.ref(part) for part in found])
        return found

    def done(_uploads):
        return lambda piece=pieces[-1]: alive.append(all(part() is not None for part in piece))

    monkeypatch.setattr(stream_buffers, "MAX_CODES", 2 * 70 * 24)
    monkeypatch.setattr(stream_buffers, "decode_chunks", decoded)
    monkeypatch.setattr(Uploads, "done", done)
    assert_same_bits(cache.kept(torch.device("cpu")).layers(), cache.decoded())
    assert len(alive) > 0
    assert all(alive)
    assert sum(part() is not None for piece in pieces for part in piece) < sum(map(len, pieces))


def test_what_is_there_is_read_in_one_launch(device, monkeypatch):
    """Keys and values of a group from the store; of as many groups as have few enough codes from the host's copy."""
    decode, launches, cache = stream_decoding.decode_segments, [], Cache()
    monkeypatch.setattr(stream_decoding, "decode_segments", lambda sides: launches.append(len(sides)) or decode(sides))
    found, expected = cache.kept(device), cache.decoded()
    assert launches == [2, 2, 2]
    with cache.reader() as reader:
        widths = [sum(side.static.num_components for side in both) for both in reader.stream_shapes()]
    assert min(widths) > 0
    for limit, batches in ((sum(widths), [6]), (sum(widths[:2]), [4, 2]), (sum(widths[:2]) - 1, [2, 4])):
        monkeypatch.setattr("cag.residency.stream_buffers.MAX_CODES", limit * cache.num_tokens)
        launches.clear()
        again = found.host_copy().again()
        for layer in range(len(HEADS)):
            again.arrived(layer)
            again.confirm(layer)
            again.uploads.wait(layer)
            assert_same_bits([again.layers()[layer]], [expected[layer]])
        assert launches == batches
        again.uploads.finish()


@pytest.fixture
def damaged(monkeypatch):
    """Let one segment be written otherwise; all checksums are those of what is written: only decoding can tell."""
    encode = JointTransform.encode_layers

    def choose(change, side="keys", first_layer=2, start=70):
        def changed(self, arrays, dtype, a_side, a_layer, a_start=0):
            data = encode(self, arrays, dtype, a_side, a_layer, a_start)
            return change(data) if (a_side, a_layer, a_start) == (side, first_layer, start) else data

        monkeypatch.setattr(JointTransform, "encode_layers", changed)

    return choose


def with_counts(data, num_escapes=0, num_words=0, escapes=b"", end=b"", cut=0):
    """A segment whose head counts so many more escapes and words, and with other bytes before its states and behind."""
    *head, found_escapes, found_words = SEGMENT_HEAD.unpack_from(data)
    states = len(data) - 2 * found_words - 4 * rans.LANES
    head = SEGMENT_HEAD.pack(*head, found_escapes + num_escapes, found_words + num_words)
    return head + data[SEGMENT_HEAD.size : states] + escapes + data[states : len(data) - cut] + end


def with_state(data):
    place = len(data) - 2 * SEGMENT_HEAD.unpack_from(data)[-1] - 4
    return data[:place] + struct.pack("<I", 123456) + data[place + 4 :]


WRONG = {
    "a word too many": lambda data: with_counts(data, num_words=1, end=b"\1\2"),
    "a word too few": lambda data: with_counts(data, num_words=-1, cut=2),
    "no words": lambda data: with_counts(data, num_words=-SEGMENT_HEAD.unpack_from(data)[-1])[: -2 * words_of(data)],
    "an escape that nobody takes": lambda data: with_counts(data, num_escapes=1, escapes=b"\0\x80"),
    "a lane that begins elsewhere": with_state,
}


def words_of(data):
    return SEGMENT_HEAD.unpack_from(data)[-1]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_stream_that_does_not_end_is_the_stores_own_error(device, damaged, wrong, side):
    damaged(WRONG[wrong], side)
    cache = Cache()
    with pytest.raises(CorruptEntry) as expected:
        cache.decoded()
    with pytest.raises(CorruptEntry) as found:
        cache.kept(device)
    assert (str(found.value), found.value.facts) == (str(expected.value), expected.value.facts)


def test_no_layer_of_a_torn_group_is_ever_given_out(device, damaged):
    damaged(WRONG["a word too few"], "values")
    cache = Cache()
    shapes = [KvShape(heads, dim) for heads, dim in zip(HEADS, DIMS, strict=True)]
    with cache.reader() as reader:
        plan = plan_load(reader, shapes, cache.dtype, device, in_streams=True)
        prefix = ResidentPrefix.load(plan, on_host_copy=pytest.fail)
        prefix.wait_quietly()
        for layer in (2, 3, 4):
            with pytest.raises(CorruptEntry, match="entropy-coded words"):
                prefix.segments(layer)


def test_a_layer_is_given_out_when_its_segments_are_confirmed_and_not_before(device, monkeypatch):
    """`segments` waits for what the device says of them, also when all of it has been started."""
    released, fetch, cache, found = threading.Event(), Uploads.fetch, Cache(), []
    shapes = [KvShape(heads, dim) for heads, dim in zip(HEADS, DIMS, strict=True)]

    def late(self, numbers):
        arrived = fetch(self, numbers)
        return lambda: arrived() if released.wait(30) else pytest.fail("never released")

    monkeypatch.setattr(Uploads, "fetch", late)
    with cache.reader() as reader:
        prefix = ResidentPrefix.load(plan_load(reader, shapes, cache.dtype, device, in_streams=True))
        user = threading.Thread(target=lambda: found.append(prefix.segments(0)))
        user.start()
        assert prefix._ready[0].wait(30)
        user.join(0.1)
        assert not (found or prefix.is_loaded)
        released.set()
        user.join(30)
        prefix.wait()
    assert prefix._confirm is None
    assert_same_bits([found[0], *(prefix.segments(layer) for layer in range(1, len(HEADS)))], cache.decoded())


def test_any_damaged_byte_gives_the_stores_bits_or_its_error(device, damaged):
    """Bytes of each part of a segment, in a cache of one chunk."""
    chance, seen = np.random.default_rng(0), set()
    size = len(with_counts(segment_of(Cache(40, 64))))
    for place in [*range(SEGMENT_HEAD.size), *chance.integers(SEGMENT_HEAD.size, size, 60).tolist()]:
        flip = int(chance.integers(1, 256))
        damaged(lambda data, place=place, flip=flip: flipped(data, place, flip), first_layer=0, start=0)
        cache = Cache(40, 64)
        try:
            expected = cache.decoded()
        except CorruptEntry as error:
            seen.add(str(error)[:40])
            with pytest.raises(CorruptEntry) as found:
                cache.kept(device)
            assert str(found.value) == str(error)
        else:
            seen.add("decoded")
            assert_same_bits(cache.kept(device).layers(), expected)
    assert len(seen) > 3


def segment_of(cache):
    """The first segment."""
    with cache.reader() as reader:
        (chunk,) = reader._chunks
        first, last = chunk.offsets[:2]
        return cache.store.backend.get_range(chunk.path, first, last - first)


def flipped(data, place, flip):
    return data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :]


def test_angles_are_the_stores(device, monkeypatch):
    rotation = Rotation("halves", tuple(float(10000.0 ** (-pair / 16)) for pair in range(16)))
    for found, expected in zip(angles_on(device, rotation, 40_000), rotation.angles(0, 40_000), strict=True):
        assert np.array_equal(found.cpu().numpy().view(np.int32), expected.view(np.int32))
    monkeypatch.setattr("cag.residency.angles.DOUBTFUL", 1 << 28)  # all of them are the host's
    monkeypatch.setattr(torch.Tensor, "float", lambda self: torch.zeros_like(self, dtype=torch.float32))
    for found, expected in zip(angles_on(device, rotation, 300), rotation.angles(0, 300), strict=True):
        assert np.array_equal(found.cpu().numpy(), expected)


def test_what_kernels_do_not_take_is_decoded_here(device):
    odd = Cache()
    with odd.reader() as reader:
        shapes = reader.stream_shapes()
    wide = [(replace(keys, static=replace(keys.static, shapes=((1, 512),))), values) for keys, values in shapes]
    uneven = [(keys, replace(values, static=replace(values.static, shapes=((1, 7),)))) for keys, values in shapes]
    large = [(replace(keys, chunks=(StreamChunk(0, 1, 1 << 32),)), values) for keys, values in shapes]
    assert can_decode(shapes)
    assert not any(map(can_decode, (wide, uneven, large)))


OPTIONS = CalibrationOptions(
    joint_layers=2, num_windows=9, corpus_windows=2, window_tokens=160, least_step=-1280, step=-800
)


@pytest.fixture
def engine(device, tmp_path, monkeypatch, corpus_dir):
    """A tiny network of three layers with a cache of several chunks, decoded on the device."""
    plan = RuntimePlan(device.type, "bfloat16", 1, 1, "plain", {}, "for tests")
    monkeypatch.setattr(model_module, "plan_runtime", lambda _device: plan)
    alpha = corpus_dir / "alpha.md"
    alpha.write_text(alpha.read_text() + "".join(f"Gate {number} is number {number * 7}.\n" for number in range(40)))
    config = tiny_config(hidden_size=64, head_dim=32, num_hidden_layers=3)
    directory = write_tiny_model(tmp_path / "model", config=config)
    options = ModelOptions(device=device.type, compute_dtype="bfloat16")
    model = LanguageModel.load(directory, model_id="tiny", options=options)
    model.kv_dtype = torch.bfloat16  # the tiny model is stored in float32
    model.run_in_steps(capture=device.type == "cuda")
    assert model.decodes_streams == (device.type == "cuda")
    model.decodes_streams = True
    engine = Engine(model, Store.open(tmp_path / "store"))
    with engine.store.build_lease():
        codec = calibrate(model, engine.store, (), OPTIONS).codec
        engine.build([corpus_dir], name="a", codec=codec)
    return engine


QUESTION = "When does the gate open?"


def test_questions_to_a_cache_that_the_device_decodes(engine):
    model = engine.model
    engine.host_copies = HostCopies(1 << 30)
    told = []
    with engine.open("a", make_room=lambda manifest, num_bytes: told.append(num_bytes)) as prefix:
        assert told == [prefix.resident.num_bytes]
        answer = prefix.ask(QUESTION, max_tokens=5)
        assert isinstance(engine.host_copies.get(prefix.digest).again(), StreamBuffers)
        with engine.store.reader(prefix.manifest) as reader:
            assert len(reader._chunks) > 2
            plan = plan_load(reader, model.kv_shapes, model.kv_dtype, torch.device("cpu"))
            expected = ResidentPrefix.load(plan)
            expected.wait()
        layers = range(len(model.kv_shapes))
        want = [expected.layer(layer) for layer in layers]
        assert_same_bits([prefix.resident.segments(layer) for layer in layers], want)
        assert answer.usage.cached_tokens == prefix.resident.num_tokens
        assert prefix.resident.load_s > 0
        assert prefix.resident.tier == "disk"
        kept = engine.host_copies.get(prefix.digest)
        assert kept.num_bytes < 0.8 * prefix.resident.num_bytes
    with engine.open("a") as prefix:  # from the host's memory
        assert_same_bits([prefix.resident.segments(layer) for layer in layers], want)
        assert prefix.ask(QUESTION, max_tokens=5).token_ids == answer.token_ids
        assert prefix.resident.tier == "memory"
    model.decodes_streams = False
    engine.host_copies = HostCopies(0)
    with engine.open("a") as prefix:
        assert prefix.ask(QUESTION, max_tokens=5).token_ids == answer.token_ids
