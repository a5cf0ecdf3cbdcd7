"""Reads past the page cache give the same bytes, say the same errors, and leave the page cache alone."""

import fcntl
import mmap
import os

import pytest

from cag_store.backends import SCRATCH_BYTES, LocalBackend, page_cache
from cag_store.errors import CorruptEntry
from cag_store.scratch import Scratch

SIZE = 5 * 4096 + 123


@pytest.fixture
def content():
    return os.urandom(SIZE)


@pytest.fixture
def backend(tmp_path, content):
    backend = LocalBackend(tmp_path / "store")
    backend.put_if_absent("chunks/x", [content])
    return backend


@pytest.fixture(params=["cachestat", "mincore"])
def asked(request, monkeypatch):
    """How the kernel is asked what is in memory; one before Linux 6.5 only has the second way."""
    if request.param == "mincore":
        monkeypatch.setattr(page_cache, "_syscall", lambda: None)


def drop(backend):
    """Skips where the file system keeps everything in memory, or reads nothing past it."""
    if not backend.drop_page_cache("chunks/x"):
        pytest.skip("the page cache cannot be dropped here")
    direct = page_cache.open_direct(f"{backend.url}/chunks/x")
    if direct is None:
        pytest.skip("the file system has no direct reads")
    os.close(direct)


def read(backend, offset, length):
    return bytes(backend.read_range("chunks/x", offset, length, memoryview(mmap.mmap(-1, length + SCRATCH_BYTES)))[0])


def resident(backend):
    with (backend.root / "chunks/x").open("rb") as file:
        return page_cache.resident_pages(file.fileno())


RANGES = [
    (0, 1),
    (0, 4096),
    (1, 4096),
    (4095, 2),
    (4096, 4096),
    (8191, 5000),
    (0, SIZE),
    (17, SIZE - 17),
    (SIZE - 1, 1),
]


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.usefixtures("asked")
def test_what_is_not_in_memory_is_read_past_the_page_cache(backend, content, offset, length):
    drop(backend)
    assert read(backend, offset, length) == content[offset : offset + length]
    assert resident(backend) == 0


@pytest.mark.usefixtures("asked")
def test_what_is_in_memory_is_read_there(backend, content, monkeypatch):
    backend.get("chunks/x", SIZE)
    preadv = os.preadv

    def through_the_cache(descriptor, *rest):
        assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
        return preadv(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", through_the_cache)
    for offset, length in RANGES:
        assert read(backend, offset, length) == content[offset : offset + length]


@pytest.mark.usefixtures("asked")
def test_only_the_range_itself_must_be_in_memory(backend, content):
    drop(backend)
    with (backend.root / "chunks/x").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        os.pread(file.fileno(), 4096, 4096)
        assert page_cache.lies_in_memory(file.fileno(), 4096, 4096)
        assert page_cache.lies_in_memory(file.fileno(), 5000, 100)
        assert not page_cache.lies_in_memory(file.fileno(), 4000, 100)
        assert not page_cache.lies_in_memory(file.fileno(), 8000, 1000)
    assert read(backend, 4000, 9000) == content[4000:13000]


def test_a_file_system_without_direct_reads(backend, content, monkeypatch):
    drop(backend)
    monkeypatch.setattr(page_cache, "open_direct", lambda path: None)
    assert read(backend, 1, 9000) == content[1:9001]
    monkeypatch.undo()
    monkeypatch.setattr(page_cache, "_DIRECT", None)
    assert page_cache.open_direct(f"{backend.url}/chunks/x") is None


def test_a_kernel_that_does_not_say_what_is_in_memory(backend, content, monkeypatch):
    monkeypatch.setattr(page_cache, "_syscall", lambda: None)
    monkeypatch.setattr(page_cache, "_mincore", lambda: None)
    assert read(backend, 1, 9000) == content[1:9001]
    assert backend.drop_page_cache("chunks/x") is False


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE - 1, 2), (SIZE, 1), (SIZE + 9000, 1)])
@pytest.mark.usefixtures("asked")
def test_a_file_that_was_cut(backend, offset, length):
    drop(backend)
    with pytest.raises(CorruptEntry, match="the file was cut"):
        read(backend, offset, length)


def test_a_kernel_that_refuses_the_new_question_is_asked_the_old_one(backend, monkeypatch):
    with (backend.root / "chunks/x").open("rb") as file:
        known = page_cache.resident_pages(file.fileno())
        monkeypatch.setattr(page_cache, "_syscall", lambda: lambda *_: -1)
        assert page_cache.resident_pages(file.fileno()) == known


def test_scratch_is_used_again_and_by_one_at_a_time():
    scratch = Scratch(keep=1)
    with scratch.taken(100) as first, scratch.taken(100) as second:
        first[0], second[0] = 1, 2
        assert first[0] == 1
    with scratch.taken(1 << 20) as again:
        assert again[0] in (1, 2)  # one of them came back
    with scratch.taken(5 << 20) as larger:
        assert len(larger) >= 5 << 20
