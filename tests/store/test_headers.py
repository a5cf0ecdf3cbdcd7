"""A header behind another one is read by what it leaves open, and only where reading it whole gives the same."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cag_store import Store, chunk_files
from cag_store.chunk import index_behind, parse_index
from cag_store.errors import CorruptEntry, UnsupportedFormat
from cag_store.paths import chunk_path
from cag_store.testing.bases import sample_basis
from tests.store.conftest import DIMS, HEADS
from tests.store.test_damage import HOSTILE_SEGMENTS, with_chunk

ODD_ROPE = {"%s": 'a "quoted" \\ %d', "segments": [[1, 2]], "é": "\x01ü"}


def two_chunks(cache, store=None):
    """Header of the first chunk, and header bytes and entry of the second."""
    store = store or Store.in_memory()
    entries = cache.put_chunks(store)[:2]
    first, second = (store.backend.get_range(chunk_path(entry.key), 0, entry.header_bytes) for entry in entries)
    return parse_index(first, entries[0].stored_bytes, "first").header, second, entries[1]


@pytest.fixture(params=["lossless", "int8", "int4", "transform", "odd context"])
def chunks(request, small):
    store, codec = Store.in_memory(), "lossless" if request.param == "odd context" else request.param
    if codec == "transform":
        digest = store.put_blob(sample_basis(HEADS, DIMS, 2, kept=7).to_bytes())
        codec = {"id": "transform", "basis": digest, "joint_layers": 2, "step": -256, "exact_tokens": 4}
    cache = small(codec, num_tokens=60, chunk_tokens=32)
    if request.param == "odd context":
        cache.context = replace(cache.context, rope=ODD_ROPE)
    return two_chunks(cache, store)


def test_a_header_is_known_by_what_it_leaves_open(chunks):
    before, header, entry = chunks
    found = index_behind(header, entry, before)
    assert found == parse_index(header, entry.stored_bytes, "second")
    assert found is not None


def test_another_place_or_geometry_is_not_known(chunks):
    before, header, entry = chunks
    for other in (
        replace(entry, key="0" * 64),
        replace(entry, start=entry.start + 1),
        replace(entry, num_tokens=entry.num_tokens - 1),
        replace(entry, stored_bytes=entry.stored_bytes + 1),
    ):
        assert index_behind(header, other, before) is None
    for known in (
        replace(before, key="0" * 64),
        replace(before, num_tokens=entry.num_tokens - 1),  # larger sides than were found to be allowed
        replace(before, head_dim=before.head_dim[::-1]),
        replace(before, context=replace(before.context, compute_dtype="other")),
    ):
        assert index_behind(header, entry, known) is None


def test_no_other_byte_is_taken_for_the_same_header(chunks):
    """Every byte changed, cut and doubled: what is known is what reading it whole finds, too."""
    before, header, entry = chunks
    known = 0
    for place in range(len(header)):
        for other in (
            header[:place] + bytes([header[place] ^ 1]) + header[place + 1 :],
            header[:place] + header[place + 1 :],
            header[: place + 1] + header[place:],
        ):
            found = index_behind(other, entry, before)
            if found is not None:
                known += 1
                assert found == parse_index(other, entry.stored_bytes, "second")
    assert known == 0  # sizes, checksums and offsets that changed do not fit the checksum of the facts


@pytest.mark.parametrize(
    "row", [*HOSTILE_SEGMENTS, ["lossless", 256, "010", "0" * 32], ["lossless", 256, 10, "é" * 32]]
)
def test_a_hostile_table_is_left_to_be_refused(small, row):
    """Under a right checksum of the facts."""
    before, header, entry = two_chunks(small())
    outer = json.loads(header[8:])
    value = json.loads(outer.pop("__metadata__")["chunk"])
    value["segments"][0] = row
    forged = with_chunk(value, tensors=outer)
    assert index_behind(forged, entry, before) is None
    with pytest.raises(CorruptEntry):
        parse_index(forged, entry.stored_bytes, "second")


@settings(max_examples=500)
@given(st.data())
def test_fuzzed_headers_behind_another(small_chunks, data):
    """Runs of bytes replaced by anything, or by a piece of the header itself."""
    before, header, entry = small_chunks
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(header))] * 2)))
    source = data.draw(st.integers(0, len(header)))
    piece = data.draw(st.binary(max_size=40) | st.just(header[source : source + end - begin]))
    other = header[:begin] + piece + header[end:]
    found = index_behind(other, entry, before)
    assert (found is not None) == (other == header)
    if other != header:
        with pytest.raises((CorruptEntry, UnsupportedFormat)):
            parse_index(other, entry.stored_bytes, "second")


@pytest.fixture(scope="module")
def small_chunks(small_class):
    return two_chunks(small_class())


def test_only_the_first_header_of_a_cache_is_read_whole(store, small, monkeypatch):
    manifest, whole = small(num_tokens=30).build(store), []
    parse = chunk_files.parse_index
    monkeypatch.setattr(chunk_files, "parse_index", lambda *args: whole.append(args[2]) or parse(*args))
    with store.reader(manifest) as reader:
        assert reader.num_tokens == 30
    assert len(whole) == 1
    assert manifest.chunks[0].key in whole[0]
