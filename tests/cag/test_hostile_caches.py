"""Caches that no build gives, whole as far as the store can see: refused by name, before anything is made of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cag.engine import Engine
from cag.errors import CacheMismatch, InsufficientResources
from cag.residency.resident import ResidentPrefix
from cag_store.chunk import ChunkHeader
from cag_store.errors import CorruptEntry
from cag_store.keys import ROOT, chunk_key
from tiny import tiny_config, write_tiny_model


@pytest.fixture
def built(tiny_engine, corpus_dir):
    """An engine with a cache, and its manifest."""
    tiny_engine.build([corpus_dir], name="good")
    return tiny_engine, tiny_engine.find("good")[1]


def commit(engine, manifest, **changes):
    """Let `bad` be the cache with other parts."""
    changed = replace(manifest, **changes)
    vars(changed).pop("digest", None)
    engine.store.commit("bad", changed)


def template(**changes):
    return lambda layout: layout | {"template": layout["template"] | changes}


LAYOUTS = {
    "nothing": lambda layout: {},
    "no template": lambda layout: {key: value for key, value in layout.items() if key != "template"},
    "a list": lambda layout: layout | {"template": []},
    "a field more": template(extra="x"),
    "a number": template(after=5),
    "null": template(between=None),
    "no stop strings": template(stop_strings=None),
    "numbers to stop at": template(stop_strings=[1]),
    "no system text": lambda layout: layout | {"system_text": None},
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_that_nobody_writes(built, corpus_dir, kind):
    engine, manifest = built
    commit(engine, manifest, layout=LAYOUTS[kind](dict(manifest.layout)))
    with pytest.raises(CacheMismatch, match="layout"):
        engine.open("bad")
    with pytest.raises(CacheMismatch, match="layout"):
        engine.update("bad", [corpus_dir])
    assert not engine._open
    assert not engine.store.backend.live_leases()


def test_token_ids_beyond_the_vocabulary(built):
    """Drafts are copied from the prefix: such an id would be looked up in the embedding."""
    engine, manifest = built
    with engine.open("good") as prefix:
        ids = np.array(prefix.token_ids)
        layers = [[side.numpy().copy() for side in prefix.keys_values(layer)] for layer in range(2)]
    ids[7], parent, entries = 258, ROOT, []
    for chunk in manifest.chunks:
        part = slice(chunk.start, chunk.start + chunk.num_tokens)
        key = chunk_key(parent, ids[part], manifest.context)
        shape = manifest.kv.num_kv_heads, manifest.kv.head_dim, manifest.context
        header = ChunkHeader(key, parent, chunk.start, chunk.num_tokens, *shape)
        sides = [tuple(side[:, part] for side in both) for both in layers]
        entries.append(engine.store.put_chunk(header, sides, ids[part]))
        parent = key
    commit(engine, manifest, chunks=tuple(entries))
    with pytest.raises(CacheMismatch, match="token id of 258"):
        engine.open("bad")


def test_more_tokens_than_the_model_takes(built, monkeypatch):
    engine, manifest = built
    monkeypatch.setattr(type(engine.model), "window_tokens", manifest.num_tokens - 1)
    with pytest.raises(CacheMismatch, match="number of tokens"):
        engine.open("good")


def test_another_number_of_layers(built, tmp_path, corpus_dir):
    engine, _ = built
    larger = write_tiny_model(tmp_path / "larger", config=tiny_config(num_hidden_layers=3))
    other = Engine.load(str(larger), store=engine.store, device="cpu")
    other.build([corpus_dir], name="large")
    large = other.find("large")[1]
    assert len(large.kv.num_kv_heads) == 3
    engine.model.fingerprints = replace(engine.model.fingerprints, weights=large.model.fingerprint)
    with pytest.raises(CacheMismatch, match="shape"):
        engine.open("large")


def test_a_document_that_is_no_text(built):
    engine, manifest = built
    first, *others = manifest.documents
    documents = (replace(first, sha256=engine.store.put_blob(b"\xff\xfe no text")), *others)
    size = engine.store.blob_bytes([document.sha256 for document in documents])
    commit(engine, manifest, documents=documents, blob_bytes=size)
    with engine.open("bad") as prefix, pytest.raises(CorruptEntry, match="UTF-8"):
        prefix.ask("What?", max_tokens=2)


def test_a_cache_that_the_device_has_no_memory_for(built, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 10 GiB")

    engine, _ = built
    monkeypatch.setattr(ResidentPrefix, "load", full)
    with pytest.raises(InsufficientResources, match=r"'good' .* 10 GiB"):
        engine.open("good")
    assert not engine.store.backend.live_leases()


def test_a_cache_for_which_there_is_no_memory(built, monkeypatch):
    """Said before memory is taken, and nothing stays open."""
    from cag.residency import buffers

    engine, _ = built
    monkeypatch.setattr(buffers, "_memory", buffers._Memory())
    monkeypatch.setattr(buffers, "available_memory_bytes", lambda: 1000)
    with pytest.raises(InsufficientResources, match="memory"):
        engine.open("good")
    assert not engine.store.backend.live_leases()
