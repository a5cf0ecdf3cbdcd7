import hashlib
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cag_store import Store
from cag_store.codecs import codec_from_config
from cag_store.codecs.transform import Basis, rans, shifts, symbols
from cag_store.codecs.transform import loops as transform_loops
from cag_store.codecs.transform.product import code_buffer, product_reference
from cag_store.dtypes import STORAGE_DTYPES, widen
from cag_store.errors import CorruptEntry, EntryNotFound, UnencodableArray, UnknownCodec
from cag_store.testing import sample_array
from cag_store.testing.bases import sample_basis

HEADS, DIMS = (2, 1, 2), (8, 16, 4)
SIDES = ("keys", "values")


def transform(basis: Basis, step: int = -256, exact_tokens: int = 4):
    data = basis.to_bytes()
    config = {
        "id": "transform",
        "basis": hashlib.sha256(data).hexdigest(),
        "joint_layers": basis.joint_layers,
        "step": step,
        "exact_tokens": exact_tokens,
    }
    return codec_from_config(config, lambda digest: data)


def arrays(num_tokens: int, dtype: str = "bfloat16", seed: int = 0, layers: range = range(2)):
    return [sample_array((HEADS[i], num_tokens, DIMS[i]), dtype, seed + i) for i in layers]


def decoded(codec, data, like, side="keys", first_layer=0, start=0):
    outs = [np.full((a.shape[0], a.shape[1] + 5, a.shape[2]), 7, a.dtype) for a in like]
    views = [out[:, 2:-3] for out in outs]
    codec.decode_layers_into(data, views, side, first_layer, start)
    for out in outs:
        assert np.all(out[:, :2] == 7)
        assert np.all(out[:, -3:] == 7)
    return views


@pytest.fixture(scope="module")
def basis() -> Basis:
    return sample_basis(HEADS, DIMS, 2)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_tokens, start", [(1, 0), (3, 0), (70, 0), (300, 0), (65, 2), (200, 512)])
def test_errors_stay_within_the_step(basis, side, dtype, num_tokens, start):
    codec = transform(basis)
    given = arrays(num_tokens, dtype)
    found = decoded(codec, codec.encode_layers(given, dtype, side, 0, start), given, side, 0, start)
    exact = min(max(4 - start, 0), num_tokens)
    error = 0.0
    for one, other in zip(given, found, strict=True):
        assert np.array_equal(one[:, :exact], other[:, :exact])
        difference = (widen(one, dtype) - widen(other, dtype))[:, exact:]
        error += float((difference**2).sum())
        rounding = np.abs(widen(one, dtype)).max() * 2.0**-8
    num_values = max(sum(one[:, exact:].size for one in given), 1)
    step = 2.0 ** (-256 / 64)
    assert error / num_values <= step**2 / 12 * 1.5 + rounding**2


def test_a_smaller_step_costs_bytes_and_gives_accuracy(basis):
    given = arrays(400, "float32")
    sizes, errors = [], []
    for step in (0, -128, -256):
        codec = transform(basis, step)
        data = codec.encode_layers(given, "float32", "values", 0)
        found = decoded(codec, data, given, "values")
        sizes.append(len(data))
        errors.append(sum(float(((a - b) ** 2).sum()) for a, b in zip(given, found, strict=True)))
    assert sizes[0] < sizes[1] < sizes[2]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("pairing", ["halves", "adjacent"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("kept", [7, None])
def test_compiled_and_reference_loops_give_the_same_bits(monkeypatch, dtype, kept, pairing):
    if transform_loops.compiled() is None:
        pytest.skip("numba is not installed")
    codec = transform(sample_basis(HEADS, DIMS, 2, kept=kept, pairing=pairing), -512)
    given = arrays(211, dtype)
    given[0][:, 100] = sample_array((2, 1, 8), dtype)[:, 0]
    for side in SIDES:
        data = codec.encode_layers(given, dtype, side, 0, 3)
        fast = decoded(codec, data, given, side, 0, 3)
        with monkeypatch.context() as patched:
            patched.setattr(transform_loops, "compiled", lambda: None)
            assert codec.encode_layers(given, dtype, side, 0, 3) == data
            slow = decoded(codec, data, given, side, 0, 3)
        for one, other in zip(fast, slow, strict=True):
            assert np.array_equal(one.view(np.uint8), other.view(np.uint8))


def test_tokens_that_no_code_reaches_are_kept_exact(basis):
    codec = transform(basis, -256, 0)
    given = arrays(90, "float32")
    given[0][:, [5, 6, 80]] *= 1e6
    data = codec.encode_layers(given, "float32", "values", 0)
    found = decoded(codec, data, given, "values")
    for one, other in zip(given, found, strict=True):
        assert np.array_equal(one[:, [5, 6, 80]], other[:, [5, 6, 80]])
        assert np.allclose(one, other, atol=0.5)


def test_keys_are_turned_by_their_position(basis):
    codec = transform(basis, -256, 0)
    given = arrays(80, "float32")
    at_zero = codec.encode_layers(given, "float32", "keys", 0, 0)
    assert at_zero != codec.encode_layers(given, "float32", "keys", 0, 700)
    assert codec.encode_layers(given, "float32", "values", 0, 0) == codec.encode_layers(
        given, "float32", "values", 0, 700
    )


def test_the_last_group_may_be_shorter(basis):
    codec = transform(basis)
    given = arrays(66, layers=range(2, 3))
    found = decoded(codec, codec.encode_layers(given, "bfloat16", "keys", 2), given, "keys", 2)
    assert np.array_equal(found[0][:, :4], given[0][:, :4])


def test_foreign_arrays_are_refused(basis):
    codec = transform(basis)
    wrong_shape, unequal = arrays(9)[:1], [arrays(9)[0], arrays(8)[1]]
    not_finite = arrays(9, "float32")
    not_finite[0][0, 0, 0] = np.nan
    for given, layer in ((wrong_shape, 0), (unequal, 0), (arrays(9), 1)):
        with pytest.raises(UnencodableArray):
            codec.encode_layers(given, "bfloat16", "keys", layer)
    with pytest.raises(UnencodableArray, match="lossless"):
        codec.encode_layers(not_finite, "float32", "keys", 0)


def test_every_truncation_extension_and_wrong_buffer_is_refused(basis):
    codec = transform(basis)
    given = arrays(70)
    data = codec.encode_layers(given, "bfloat16", "keys", 0)
    for end in range(0, len(data), 3):
        with pytest.raises(CorruptEntry):
            decoded(codec, data[:end], given)
    for torn in (data + b"\0", data[:-1]):
        with pytest.raises(CorruptEntry):
            decoded(codec, torn, given)
    with pytest.raises(CorruptEntry):
        decoded(codec, data, given, "values")
    with pytest.raises(CorruptEntry):
        decoded(codec, data, arrays(71))
    with pytest.raises(CorruptEntry):
        decoded(codec, data, given[::-1])


@pytest.mark.parametrize("compiled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_damage_never_crashes_nor_takes_much_memory(basis, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(transform_loops, "compiled", lambda: None)
    codec = transform(basis)
    given = arrays(70)
    data = codec.encode_layers(given, "bfloat16", "keys", 0)
    decoded(codec, data, given)
    tracemalloc.start()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(data), 300):
        damaged = bytearray(data)
        damaged[position] ^= int(generator.integers(1, 256))
        try:
            decoded(codec, bytes(damaged), given)
        except CorruptEntry:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_basis_comes_back_as_it_was(basis):
    data = basis.to_bytes()
    assert Basis.from_bytes(data).to_bytes() == data


def test_a_hostile_basis_is_refused(basis):
    data = basis.to_bytes()
    side = basis.groups[0][0]

    def with_side(**changes):
        groups = ((replace(side, **changes), basis.groups[0][1]), *basis.groups[1:])
        return replace(basis, groups=groups).to_bytes()

    bad_tables, lone = basis.frequencies.copy(), basis.frequencies.copy()
    bad_tables[0, 3] += 1
    lone[1] = 0
    lone[1, 5] = rans.TOTAL
    hostile = {
        "empty": b"",
        "magic": b"x" + data,
        "truncated": data[:-1],
        "extended": data + b"\0",
        "header": data.replace(b'"joint_layers":2', b'"joint_layers":0'),
        "groups": data.replace(b'"joint_layers":2', b'"joint_layers":1'),
        "huge": data.replace(b'"head_dim":[8,', b'"head_dim":[9,'),
        "rotation": data.replace(b'"layer_rotation":[0,', b'"layer_rotation":[1,'),
        "frequency": data.replace(b"[1.0,0.5]", b"[9.0,0.5]"),
        "tables": replace(basis, frequencies=bad_tables).to_bytes(),
        "one symbol only": replace(basis, frequencies=lone).to_bytes(),
        "mean": with_side(mean=np.full_like(side.mean, np.nan)),
        "unit": with_side(unit=np.full_like(side.unit, np.inf)),
        "order": with_side(log_deviation=side.log_deviation[::-1]),
        "rows": with_side(row_shifts=np.full_like(side.row_shifts, 15)),
        "shift": with_side(row_shifts=np.full_like(side.row_shifts, 40)),
    }
    for name, found in hostile.items():
        assert found != data, name
        with pytest.raises(CorruptEntry):
            Basis.from_bytes(found)
            pytest.fail(name)


def test_flipped_bits_of_a_basis_are_refused_or_decode_something(basis):
    """A basis that was read is the one that the bytes say, and arrays come back from it in their shapes."""
    data, given = basis.to_bytes(), arrays(9)
    generator = np.random.default_rng(1)
    num_refused = num_read = 0
    for position in generator.integers(0, len(data), 300):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        try:
            found = Basis.from_bytes(bytes(damaged))
        except CorruptEntry:
            num_refused += 1
            continue
        assert found.to_bytes() == damaged
        codec = transform(found)
        decoded(codec, codec.encode_layers(given, "bfloat16", "keys", 0), given)
        num_read += 1
    assert num_refused > 50
    assert num_read > 50


def test_a_codec_needs_its_basis(basis):
    config = transform(basis).config()
    bare = codec_from_config(config)
    assert bare.config() == config
    assert bare.resource_digests() == (config["basis"],)
    with pytest.raises(UnknownCodec, match="resources"):
        bare.encode_layers(arrays(9), "bfloat16", "keys", 0)
    with pytest.raises(CorruptEntry, match="joins"):
        codec_from_config({**config, "joint_layers": 1}, lambda digest: basis.to_bytes())
    with pytest.raises(UnknownCodec, match="basis"):
        codec_from_config("transform")
    for wrong in ({"basis": "x"}, {"step": 0.5}, {"joint_layers": 0}, {"joint_layers": 65}, {"more": 1}):
        with pytest.raises(UnknownCodec):
            codec_from_config({**config, **wrong})


def layout_of(shape, tables, seed):
    """Components of all kinds, and every shift."""
    generator = np.random.default_rng(seed)
    levels = np.sort(generator.integers(0, 60, shape[1]))[::-1].astype(np.int32)
    numbers = symbols.table_numbers(levels, len(tables.frequencies)) + generator.integers(-8, 8, shape[1])
    shifts = generator.integers(-8, 8, shape[0]).astype(np.int32)
    return rans.Layout(numbers.astype(np.int32), symbols.low_bits(levels), shifts)


def decoders():
    """Every way to decode that this machine has."""
    found = {"reference": rans.decode_codes}
    if transform_loops.compiled() is not None:
        from cag_store.codecs.transform import compiled_loops

        found["lanes"], found["vectors"] = compiled_loops.decode_lanes, compiled_loops.decode_vectors
    return {name: decode for name, decode in found.items() if decode is not None}


def decode_with(name, stream, layout, tables, shape):
    buffer = np.zeros((shape[0], shape[1] + shape[1] % 2), np.int16)
    codes = buffer[:, : shape[1]]
    if name == "reference":
        rans.decode_codes(stream, layout, tables, codes)
        return codes
    shifts = np.append(layout.token_shifts, np.zeros(-shape[0] % rans.LANES, np.int32))
    facts = layout.table_numbers, layout.low, shifts, tables.slots, codes
    counted = stream.words, stream.num_words, stream.escapes, stream.num_escapes
    if not decoders()[name](stream.states.copy(), *counted, *facts):
        raise CorruptEntry("refused", where="stream")
    return codes


@pytest.mark.parametrize("name", ["reference", "lanes", "vectors"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 64), (100, 7), (33, 40)])
def test_codes_come_back_and_words_are_those_of_the_reference(shape, name):
    if name not in decoders():
        pytest.skip("this machine does not decode so")
    generator = np.random.default_rng(3)
    tables = rans.Tables.of(sample_basis((1,), (8,), 1).frequencies)
    layout = layout_of(shape, tables, 4)
    given = np.rint(generator.laplace(size=shape) * 3 * 2.0**layout.low).astype(np.int16)
    given[0, 0], given[-1, -1] = 32767, -32767
    states, words, escapes = rans.encode_reference(given, layout, tables)
    made = rans.encode_codes(given, layout, tables)
    assert np.array_equal(states, made.states)
    assert np.array_equal(words, made.words)
    assert np.array_equal(escapes, made.escapes)
    assert len(escapes) >= 1
    stream = rans.Stream.padded(states, words, escapes)
    assert np.array_equal(decode_with(name, stream, layout, tables, shape), given)
    for torn in (
        rans.Stream.padded(states, words[:-1], escapes),
        rans.Stream.padded(states, np.append(words, np.uint16(1)), escapes),
        rans.Stream.padded(states, words, escapes[:-1]),
        rans.Stream.padded(states, words, np.append(escapes, np.int16(1))),
        rans.Stream.padded(states + np.uint32(1 << 20), words, escapes),
    ):
        with pytest.raises(CorruptEntry):
            decode_with(name, torn, layout, tables, shape)


def test_every_decoder_makes_the_same_of_damaged_words():
    """What is no stream of a writer still decodes to the same codes, or is refused, everywhere."""
    shape, generator = (50, 31), np.random.default_rng(5)
    tables = rans.Tables.of(sample_basis((1,), (8,), 1).frequencies)
    layout = layout_of(shape, tables, 6)
    given = np.rint(generator.laplace(size=shape) * 5 * 2.0**layout.low).astype(np.int16)
    states, words, escapes = rans.encode_reference(given, layout, tables)
    for _ in range(20):
        damaged = words.copy()
        damaged[generator.integers(len(words))] ^= np.uint16(1 << generator.integers(16))
        stream, outcomes = rans.Stream.padded(states, damaged, escapes), set()
        for name in decoders():
            try:
                outcomes.add(decode_with(name, stream, layout, tables, shape).tobytes())
            except CorruptEntry:
                outcomes.add(b"refused")
        assert len(outcomes) == 1


def test_shifts_are_those_that_cost_least():
    generator = np.random.default_rng(7)
    tables = rans.Tables.of(sample_basis((1,), (8,), 1).frequencies)
    loud = 2.0 ** (generator.integers(-2, 3, 60) / 2)
    given = np.rint(generator.laplace(size=(60, 90)) * loud[:, None]).astype(np.int16)
    numbers, low = np.full(90, 8, np.int32), np.zeros(90, np.uint8)
    kinds = symbols.symbols_of(given, low)
    by_component, by_token = shifts.chosen_shifts(kinds, numbers, tables)
    assert np.corrcoef(by_token, np.log2(loud))[0, 1] > 0.9
    sizes = [
        len(rans.encode_codes(given, rans.Layout(numbers + one, low, other), tables).words)
        for one, other in ((0 * by_component, 0 * by_token.astype(np.int32)), (by_component, by_token.astype(np.int32)))
    ]
    assert sizes[1] < 0.95 * sizes[0]
    assert np.array_equal(shifts.unpack_shifts(memoryview(shifts.pack_shifts(by_token)), 60), by_token)
    assert len(shifts.pack_shifts(by_token[:7])) == shifts.packed_size(7) == 4


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 0, 16), (7, 65, 16), (70, 190, 40), (33, 128, 100)])
@pytest.mark.parametrize("largest", [100, 30000])
def test_every_product_gives_the_same_sums(shape, largest, monkeypatch):
    if transform_loops.compiled() is None:
        pytest.skip("numba is not installed")
    from cag_store.codecs.transform import compiled_product

    num_tokens, num_components, num_channels = shape
    generator = np.random.default_rng(8)
    rows = generator.integers(-32767, 32640, (num_components, num_channels)).astype(np.int16)
    buffer = code_buffer(num_tokens, num_components)
    codes = buffer[:num_tokens, :num_components]
    codes[:] = generator.integers(-largest, largest, codes.shape)
    expected = product_reference(codes, rows)
    for tiles in (compiled_product._tile_loop, None):
        monkeypatch.setattr(compiled_product, "_tile_loop", tiles)
        operand = compiled_product.Operand(buffer, num_tokens, num_components)
        assert (operand.digits is None) == (tiles is None)
        assert np.array_equal(compiled_product.integer_product(operand, compiled_product.PackedRows(rows)), expected)


def test_numbers_without_digits_are_multiplied_otherwise():
    if transform_loops.compiled() is None:
        pytest.skip("numba is not installed")
    from cag_store.codecs.transform import compiled_product

    buffer = code_buffer(2, 2)
    buffer[:2, :2] = [[32767, 1], [-32768, 2]]
    rows = np.array([[32767, 3], [4, 5]], np.int16)
    operand, packed = compiled_product.Operand(buffer, 2, 2), compiled_product.PackedRows(rows)
    assert operand.digits is None
    assert packed.digits is None
    assert np.array_equal(compiled_product.integer_product(operand, packed), product_reference(buffer[:2, :2], rows))


class TestInAStore:
    @pytest.fixture
    def config(self, store, basis):
        digest = store.put_blob(basis.to_bytes())
        return {"id": "transform", "basis": digest, "joint_layers": 2, "step": -256, "exact_tokens": 4}

    def build(self, store: Store, small, config, name="t"):
        cache = small(config, num_tokens=150, chunk_tokens=70)
        with store.build_lease():
            manifest = cache.put(store)
            blobs = store.blob_bytes(manifest.blob_digests)
            manifest = replace(manifest, blob_bytes=blobs)
            store.commit(name, manifest)
        return cache, manifest

    def test_layers_of_a_group_arrive_together(self, store, small, config):
        cache, manifest = self.build(store, small, config)
        with store.reader(manifest) as reader:
            buffers, seen = cache.buffers(), []
            reader.load(buffers, seen.append)
        assert seen == [0, 1, 2]
        for (keys, values), outs in zip(cache.layers, buffers, strict=True):
            for given, found in zip((keys, values), outs, strict=True):
                error = widen(given, "bfloat16") - widen(found[:, :150], "bfloat16")
                assert np.sqrt((error[:, 4:] ** 2).mean()) < 0.15
                assert np.array_equal(given[:, :4], found[:, :4])

    def test_the_basis_is_kept_counted_and_checked(self, store, small, config):
        _, manifest = self.build(store, small, config)
        assert config["basis"] in manifest.blob_digests
        report = store.verify("t")
        assert report.ok
        assert report.num_blobs == 3
        store.gc(grace_s=0)
        assert store.verify("t").ok
        store.remove("t")
        store.gc(grace_s=0)
        with pytest.raises(EntryNotFound):
            store.get_blob(config["basis"])

    def test_without_its_basis_a_cache_is_an_error(self, store, small, config):
        _, manifest = self.build(store, small, config)
        path = next(info.path for info in store.backend.list("blobs") if config["basis"] in info.path)
        store.backend.delete(path)
        again = Store(store.backend)
        with pytest.raises(EntryNotFound):
            again.reader(manifest)
        assert not again.verify("t").ok
        with pytest.raises(EntryNotFound):
            again.commit("other", manifest)

    def test_headers_name_groups(self, store, small, config):
        _, manifest = self.build(store, small, config)
        key = manifest.chunks[0].key
        header = store.backend.get(f"chunks/{key[:2]}/{key}", 1 << 20)[: manifest.chunks[0].header_bytes]
        for name in (b"layers.000-001.keys", b"layers.000-001.values", b"layers.002-002.keys"):
            assert name in header

    @pytest.mark.parametrize("joint", [0, 65, "2", 1.0, True, None])
    def test_a_wrong_number_of_joint_layers_is_refused(self, joint):
        with pytest.raises(UnknownCodec):
            codec_from_config({"id": "transform", "basis": "0" * 64, "joint_layers": joint, "step": 0})
