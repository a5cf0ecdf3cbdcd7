"""How a load is cut into jobs, and what it promises while it runs."""

import threading

import pytest

from cag_store import pipeline
from cag_store.chunk_files import open_chunk
from cag_store.errors import EntryNotFound


def spans_of(store, manifest):
    chunks = [open_chunk(store.backend, entry) for entry in manifest.chunks]
    return list(pipeline._group_spans(chunks, len(manifest.kv.head_dim)))


def test_layers_are_read_together_but_the_first_alone(store, small, monkeypatch):
    manifest = small().build(store)
    assert spans_of(store, manifest) == [(0, 1), (1, 3)]
    monkeypatch.setattr(pipeline, "_JOB_BYTES", 1)
    assert spans_of(store, manifest) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("job_bytes", [1, 1 << 20])
@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_layers_arrive_whole_and_in_order(store, small, monkeypatch, job_bytes, workers, codec):
    monkeypatch.setattr(pipeline, "_JOB_BYTES", job_bytes)
    cache = small(codec, num_tokens=60)
    manifest = cache.build(store)
    with store.reader(manifest) as reader:
        buffers, expected, arrived = cache.buffers(), cache.buffers(), []
        reader.load(expected)

        def on_layer(layer):
            assert all((a == b).all() for a, b in zip(buffers[layer], expected[layer], strict=True))
            arrived.append(layer)

        with store.reader(manifest, workers) as again:
            again.load(buffers, on_layer)
            stored = sum(chunk.stored_bytes - chunk.header_bytes - 4 * chunk.num_tokens for chunk in manifest.chunks)
            assert again.timings.bytes_read == stored
    assert arrived == [0, 1, 2]
    if codec == "lossless":
        cache.check(buffers)


def test_no_thread_outlives_a_load_that_fails(store, small, monkeypatch):
    monkeypatch.setattr(pipeline, "_JOB_BYTES", 1)
    cache = small()
    manifest = cache.build(store)
    with store.reader(manifest) as reader:
        for callback in (None, lambda layer: 1 / 0):
            if callback is None:
                stored = reader._chunks[-1].path
                data = store.backend.get(stored, 1 << 30)
                store.backend.delete(stored)
            with pytest.raises(EntryNotFound if callback is None else ZeroDivisionError):
                reader.load(cache.buffers(), callback)
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("cag-load")]
            if callback is None:
                store.backend.put_if_absent(stored, [data])
        buffers = cache.buffers()
        reader.load(buffers)
        cache.check(buffers)
