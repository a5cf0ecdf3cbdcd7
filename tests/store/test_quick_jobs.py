"""Jobs that compiled calls read and decode: what they cannot do is done otherwise, and nothing is left behind."""

import gc
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cag_store import pipeline
from cag_store.codecs import Lossless
from cag_store.codecs.jobs import job_calls
from cag_store.errors import CorruptEntry
from cag_store.paths import chunk_path
from cag_store.quick_jobs import QuickJobs

pytestmark = pytest.mark.skipif(job_calls() is None, reason="no compiled loops, or not Linux")


@pytest.fixture(autouse=True)
def many_jobs(monkeypatch):
    monkeypatch.setattr(pipeline, "JOB_BYTES", 1)


@pytest.fixture
def states(monkeypatch):
    """The states that calls came back with."""
    found = []
    for name in ("read", "decode"):

        def noted(self, *arguments, call=getattr(QuickJobs, name)):
            number, piece, state = call(self, *arguments)
            found.append(state)
            return number, piece, state

        monkeypatch.setattr(QuickJobs, name, noted)
    return found


def open_files():
    """Without those that garbage of earlier tests holds."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def loaded(store, manifest, cache, **options):
    with store.reader(manifest, **options) as reader:
        buffers = cache.buffers()
        reader.load(buffers)
        return buffers, reader.timings


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_is_read_and_counted_once(store, small, states, workers, cold):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    if cold:
        for entry in manifest.chunks:
            store.backend.drop_page_cache(chunk_path(entry.key))
    before = open_files()
    buffers, timings = loaded(store, manifest, cache, workers=workers)
    cache.check(buffers)
    assert pipeline.WHOLE in states
    assert pipeline.UNREAD not in states
    segments = sum(entry.stored_bytes - entry.header_bytes - 4 * entry.num_tokens for entry in manifest.chunks)
    assert timings.bytes_read == segments
    assert timings.bytes_by_tier == {"disk": segments}
    assert timings.read_s > 0
    assert timings.decode_s > 0
    assert open_files() <= before  # fewer where something of an earlier test ended meanwhile


def test_what_a_call_cannot_read_is_read_otherwise(store, small, monkeypatch, states):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    monkeypatch.setattr(store.backend, "descriptor", lambda path, length: os.open(os.devnull, os.O_RDONLY))
    before = open_files()
    buffers, timings = loaded(store, manifest, cache)
    cache.check(buffers)
    assert pipeline.UNREAD in states
    assert timings.bytes_by_tier == {"disk": timings.bytes_read}
    assert open_files() <= before  # fewer where something of an earlier test ended meanwhile


def test_without_descriptors_nothing_is_done_by_calls(store, small, monkeypatch, states):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    descriptor, calls = store.backend.descriptor, []

    def second_has_none(path, length):
        calls.append(path)
        return descriptor(path, length) if len(calls) % 2 else None

    monkeypatch.setattr(store.backend, "descriptor", second_has_none)
    before = open_files()
    buffers, _ = loaded(store, manifest, cache)
    cache.check(buffers)
    assert not states
    assert open_files() <= before  # fewer where something of an earlier test ended meanwhile


def test_a_process_that_may_open_few_files(store, small, states):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    assert len(manifest.chunks) > 8
    loaded(store, manifest, cache)
    states.clear()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/proc/self/fd")))
    ninth = [number for number in range(limits[0]) if number not in used][8]
    before = open_files()
    with store.reader(manifest) as reader:
        resource.setrlimit(resource.RLIMIT_NOFILE, (ninth, limits[1]))
        try:
            buffers = cache.buffers()
            reader.load(buffers)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    cache.check(buffers)
    assert not states
    assert open_files() <= before  # fewer where something of an earlier test ended meanwhile


def test_other_bytes_than_those_of_the_file_are_noticed(store, small, monkeypatch):
    """A descriptor of another chunk's file: its hashes are not those of this chunk."""
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    first = chunk_path(manifest.chunks[0].key)
    descriptor = store.backend.descriptor
    monkeypatch.setattr(store.backend, "descriptor", lambda path, length: descriptor(first, length))
    with pytest.raises(CorruptEntry, match="checksum"):
        loaded(store, manifest, cache)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_a_file_that_was_cut_after_it_was_opened(store, small, share):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    path = store.backend.root / chunk_path(manifest.chunks[-1].key)
    before = open_files()
    with store.reader(manifest) as reader:
        path.chmod(0o644)
        os.truncate(path, int(path.stat().st_size * share))
        with pytest.raises(CorruptEntry):
            reader.load(cache.buffers())
    assert open_files() <= before  # fewer where something of an earlier test ended meanwhile
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cag-load")]


def test_reading_goes_on_while_the_workers_decode(store, small, monkeypatch):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    made, decode_segments, seen = [], Lossless.decode_segments, []
    monkeypatch.setattr(
        QuickJobs, "free", lambda self, piece, free=QuickJobs.free: (made.append(self), free(self, piece))
    )

    def decode(self, segments):
        deadline = time.monotonic() + 60
        while not (taken := made[0]._table.state[0]) > 4 and time.monotonic() < deadline:  # more than readers
            time.sleep(0.001)
        seen.append(taken)
        decode_segments(self, segments)

    monkeypatch.setattr(Lossless, "decode_segments", decode)
    cache.check(loaded(store, manifest, cache, workers=2)[0])
    assert min(seen) > 4


def test_signals_cut_no_load_short(store, small):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    received = []
    before = signal.signal(signal.SIGALRM, lambda *_: received.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(30):
            cache.check(loaded(store, manifest, cache)[0])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert received


def test_loads_beside_each_other(store, small):
    cache = small(num_tokens=300)
    manifest = cache.build(store)
    with ThreadPoolExecutor(6) as pool:
        for buffers, _ in pool.map(lambda _: loaded(store, manifest, cache), range(60)):
            cache.check(buffers)
