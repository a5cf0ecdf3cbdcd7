"""How a load is cut into jobs, and what it promises while it runs."""

import threading
import time
from itertools import count
from types import SimpleNamespace

import pytest

from cag_store import load_jobs, pipeline
from cag_store.chunk_files import open_chunk
from cag_store.codecs import Lossless
from cag_store.errors import EntryNotFound


def spans_of(store, manifest, first_layer_soon=True):
    chunks = [open_chunk(store.backend, entry) for entry in manifest.chunks]
    return list(load_jobs.group_spans(chunks, len(manifest.kv.head_dim), pipeline.JOB_BYTES, first_layer_soon))


def test_layers_are_read_together_but_the_first_alone(store, small, monkeypatch):
    manifest = small().build(store)
    assert spans_of(store, manifest) == [(0, 1), (1, 3)]
    assert spans_of(store, manifest, first_layer_soon=False) == [(0, 3)]
    monkeypatch.setattr(pipeline, "JOB_BYTES", 1)
    assert spans_of(store, manifest) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("first_layer_soon", [True, False])
def test_jobs_have_about_equal_bytes(first_layer_soon):
    """No rest of a layer or two, which is a small read for each chunk."""
    sizes = [100, 130, 90, 110, 120, 80, 100, 100, 105, 95]  # of each layer's keys, as of its values
    bounds = [1000]
    for size in sizes:
        bounds += [bounds[-1] + size, bounds[-1] + 2 * size]
    small = [1000 + (bound - 1000) // 3 for bound in bounds]
    index = SimpleNamespace(header=SimpleNamespace(sides=2))
    chunks = [SimpleNamespace(offsets=offsets, index=index) for offsets in (small, bounds)]
    for job_bytes in (1, 150, 500, 690, 3000):
        spans = list(load_jobs.group_spans(chunks, len(sizes), job_bytes, first_layer_soon))
        assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
        assert spans[-1][1] == len(sizes)
        rest = spans[1:] if first_layer_soon else spans
        assert not first_layer_soon or spans[0] == (0, 1)
        found = [bounds[2 * last] - bounds[2 * first] for first, last in rest]
        assert max(found) <= min(found) + 2 * 2 * max(sizes)
        assert abs(len(found) - max(sum(found) / job_bytes, 1)) <= 0.5 or job_bytes < 2 * max(sizes)


def test_jobs_are_spans_of_chunks_but_for_what_no_layer_keeps(store, small):
    manifest = small(num_tokens=30).build(store)
    chunks = [open_chunk(store.backend, entry) for entry in manifest.chunks]

    def jobs(firsts, job_bytes):
        plan = load_jobs.plan_load(chunks, firsts, job_bytes, False)
        assert sum(plan.jobs_left) == len(plan.jobs)
        return [(chunks.index(job.chunk), job.first, job.last) for job in plan.jobs]

    assert jobs([0, 0, 0], 1 << 20) == [(chunk, 0, 3) for chunk in range(4)]
    assert jobs([0, 0, 0], 1) == [(chunk, layer, layer + 1) for layer in range(3) for chunk in range(4)]
    assert jobs([8, 24, 0], 1 << 20) == [(0, 2, 3), (1, 0, 1), (1, 2, 3), (2, 0, 1), (2, 2, 3), (3, 0, 3)]
    assert jobs([16, 16, 24], 1 << 20) == [(2, 0, 2), (3, 0, 3)]


@pytest.mark.parametrize("first_layer_soon", [True, False])
@pytest.mark.parametrize("job_bytes", [1, 1 << 20])
@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize("codec", ["lossless", "int8", {"id": "int4", "recent_tokens": 1, "wide_key_layers": [1]}])
def test_layers_arrive_whole_and_in_order(store, small, monkeypatch, job_bytes, workers, codec, first_layer_soon):
    monkeypatch.setattr(pipeline, "JOB_BYTES", job_bytes)
    cache = small(codec, num_tokens=60)
    manifest = cache.build(store)
    with store.reader(manifest) as reader:
        buffers, expected, arrived = cache.buffers(), cache.buffers(), []
        reader.load(expected)

        def on_layer(layer):
            assert all((a == b).all() for a, b in zip(buffers[layer], expected[layer], strict=True))
            arrived.append(layer)

        with store.reader(manifest, workers) as again:
            again.load(buffers, on_layer, first_layer_soon=first_layer_soon)
            stored = sum(chunk.stored_bytes - chunk.header_bytes - 4 * chunk.num_tokens for chunk in manifest.chunks)
            assert again.timings.bytes_read == stored
    assert arrived == [0, 1, 2]
    if codec == "lossless":
        cache.check(buffers)


class Inside:
    """A context manager that knows how many threads are in it, and were at most."""

    def __init__(self):
        self.guard, self.now, self.most = threading.Lock(), 0, 0

    def __enter__(self):
        with self.guard:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *exception):
        with self.guard:
            self.now -= 1


@pytest.mark.parametrize(("parallel_reads", "num_reads"), [(1, 3), (8, 8)])
def test_many_threads_read_but_only_the_workers_decode(store, small, monkeypatch, parallel_reads, num_reads):
    monkeypatch.setattr(pipeline, "job_calls", lambda: None)  # which read by themselves
    monkeypatch.setattr(pipeline, "JOB_BYTES", 1)
    cache = small(num_tokens=80)
    manifest = cache.build(store)
    monkeypatch.setattr(store.backend, "parallel_reads", parallel_reads)
    all_there, calls, reading, decoding = threading.Barrier(num_reads), count(), Inside(), Inside()
    get_range_into, decode_segments = store.backend.get_range_into, Lossless.decode_segments

    def get(*arguments):
        with reading:
            if next(calls) < num_reads:
                all_there.wait(60)  # as many as that read at the same time
            return get_range_into(*arguments)

    def decode(self, segments):
        with decoding:
            time.sleep(0.01)
            decode_segments(self, segments)

    monkeypatch.setattr(store.backend, "get_range_into", get)
    monkeypatch.setattr(Lossless, "decode_segments", decode)
    with store.reader(manifest, workers=2) as reader:
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)
    assert reading.most == num_reads
    assert decoding.most <= 2


def test_reading_goes_on_while_the_workers_decode(store, small, monkeypatch):
    monkeypatch.setattr(pipeline, "job_calls", lambda: None)  # which read by themselves
    monkeypatch.setattr(pipeline, "JOB_BYTES", 1)
    cache = small(num_tokens=80)
    manifest = cache.build(store)
    calls, later, original = count(), threading.Event(), store.backend.get_range_into
    decode_segments = Lossless.decode_segments

    def get(*arguments):
        if next(calls) == 4:  # more than are read at the same time
            later.set()
        return original(*arguments)

    def decode(self, segments):
        assert later.wait(60)
        decode_segments(self, segments)

    monkeypatch.setattr(store.backend, "get_range_into", get)
    monkeypatch.setattr(Lossless, "decode_segments", decode)
    with store.reader(manifest, workers=2) as reader:
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)


def test_buffers_that_no_step_can_be_made_for_end_the_load(store, small, monkeypatch):
    cache = small()
    manifest = cache.build(store)

    def refuse(self, buffers, first_tokens):
        raise RuntimeError("no such buffers")

    monkeypatch.setattr(Lossless, "bulk_decoder", refuse)
    with store.reader(manifest) as reader, pytest.raises(RuntimeError, match="no such buffers"):
        reader.load(cache.buffers())


def test_threads_that_could_not_be_started_end_the_load(store, small, monkeypatch):
    cache = small()
    manifest = cache.build(store)
    start, started = threading.Thread.start, []

    def third_time(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with store.reader(manifest, workers=2) as reader, monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", third_time)
        with pytest.raises(RuntimeError, match="new thread"):
            reader.load(cache.buffers())
    assert [thread.is_alive() for thread in started] == [False, False]


def test_a_job_is_as_large_as_the_backend_wants(store, small, monkeypatch):
    manifest = small().build(store)
    monkeypatch.setattr(pipeline, "job_calls", lambda: None)  # which read by themselves
    monkeypatch.setattr(pipeline, "JOB_BYTES", 1)
    monkeypatch.setattr(store.backend, "read_bytes", 1 << 20)
    lengths, get_range_into = [], store.backend.get_range_into

    def get(path, offset, out):
        lengths.append(len(out))
        return get_range_into(path, offset, out)

    monkeypatch.setattr(store.backend, "get_range_into", get)
    with store.reader(manifest) as reader:
        reader.load(small().buffers())
    assert len(lengths) == 2 * len(manifest.chunks)


def test_no_thread_outlives_a_load_that_fails(store, small, monkeypatch):
    monkeypatch.setattr(pipeline, "JOB_BYTES", 1)
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
