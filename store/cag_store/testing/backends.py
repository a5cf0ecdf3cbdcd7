"""What every backend must hold. Subclass `BackendConformance` with a fixture-free `make_backend`."""
# ruff: noqa: D102  the names of the tests are their documentation

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest

from cag_store.backends import SCRATCH_BYTES, Backend
from cag_store.errors import CorruptEntry, EntryNotFound, InvalidName, StoreBusy


def _scratch(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, length + SCRATCH_BYTES))


class BackendConformance:
    """The promise of `cag_store.backends.Backend`, as tests."""

    def make_backend(self, folder: Path) -> Backend:
        """A new, empty backend; `folder` is empty and its own."""
        raise NotImplementedError

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Backend:
        """The backend under test."""
        return self.make_backend(tmp_path / "store")

    def test_what_was_put_is_found(self, backend: Backend) -> None:
        assert backend.put_if_absent("chunks/ab/c", [b"hello ", memoryview(b"world")])
        assert backend.get("chunks/ab/c", 100) == b"hello world"
        assert backend.get_range("chunks/ab/c", 6, 5) == b"world"
        assert [backend.get_range("chunks/ab/c", *span) for span in ((0, 2), (3, 0))] == [b"he", b""]
        out = bytearray(4)
        backend.get_range_into("chunks/ab/c", 1, memoryview(out))
        assert out == b"ello"
        backend.will_read("chunks/ab/c", 100)
        data, tier = backend.read_range("chunks/ab/c", 1, 4, _scratch(4))
        assert (bytes(data), tier) == (b"ello", backend.tier)
        assert backend.stat("chunks/ab/c").size_bytes == 11

    def test_objects_are_written_once(self, backend: Backend) -> None:
        assert backend.put_if_absent("blobs/a", [b"first"])
        assert not backend.put_if_absent("blobs/a", [b"second"])
        assert backend.get("blobs/a", 100) == b"first"

    def test_replace(self, backend: Backend) -> None:
        backend.replace("refs/a", b"first")
        backend.replace("refs/a", b"2")
        assert backend.get("refs/a", 100) == b"2"

    def test_recording_a_use_changes_nothing_but_the_time(self, backend: Backend) -> None:
        backend.replace("refs/a", b"first")
        before = backend.stat("refs/a")
        backend.record_use("refs/a")
        assert backend.get("refs/a", 100) == b"first"
        assert backend.stat("refs/a").modified_s >= before.modified_s

    def test_missing_objects(self, backend: Backend) -> None:
        for call in (
            lambda: backend.get("chunks/x", 1),
            lambda: backend.get_range("chunks/x", 0, 1),
            lambda: backend.stat("chunks/x"),
            lambda: backend.touch("chunks/x"),
            lambda: backend.get_range_into("chunks/x", 0, memoryview(bytearray(1))),
            lambda: backend.read_range("chunks/x", 0, 1, _scratch(1)),
        ):
            with pytest.raises(EntryNotFound):
                call()
        backend.will_read("chunks/x", 1)
        assert not backend.delete("chunks/x")
        assert list(backend.list("chunks")) == []

    def test_delete(self, backend: Backend) -> None:
        backend.put_if_absent("chunks/x", [b"1"])
        assert backend.delete("chunks/x")
        assert not backend.delete("chunks/x")
        assert backend.put_if_absent("chunks/x", [b"2"])

    def test_ranges_and_limits_beyond_the_end(self, backend: Backend) -> None:
        backend.put_if_absent("chunks/x", [b"12345"])
        for offset, length in ((0, 6), (5, 1), (100, 1), (0, 1 << 60), (1 << 60, 1)):
            with pytest.raises(CorruptEntry):
                backend.get_range("chunks/x", offset, length)
        with pytest.raises(CorruptEntry):
            backend.get_range_into("chunks/x", 4, memoryview(bytearray(2)))
        for offset, length in ((4, 2), (5, 1), (100, 1), (0, 10_000)):
            with pytest.raises(CorruptEntry):
                backend.read_range("chunks/x", offset, length, _scratch(length))
        with pytest.raises(CorruptEntry):
            backend.get("chunks/x", 4)
        assert backend.get("chunks/x", 5) == b"12345"

    def test_list(self, backend: Backend) -> None:
        for path in ("chunks/aa/1", "chunks/ab/2", "blobs/3"):
            backend.put_if_absent(path, [b"123"])
        found = {info.path: info.size_bytes for info in backend.list("chunks")}
        assert found == {"chunks/aa/1": 3, "chunks/ab/2": 3}

    @pytest.mark.parametrize(
        "path", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a\0b", "a b", "a/.."]
    )
    def test_paths_cannot_escape(self, backend: Backend, path: str) -> None:
        with pytest.raises(InvalidName):
            backend.put_if_absent(path, [b"1"])

    def test_one_of_many_writers_wins(self, backend: Backend) -> None:
        won: list[int] = []
        start = threading.Barrier(8)

        def write(number: int) -> None:
            start.wait()
            if backend.put_if_absent("chunks/x", [bytes([number])] * 1000):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert backend.get("chunks/x", 1000) == bytes(won) * 1000

    def test_locks_exclude(self, backend: Backend) -> None:
        with backend.locked("gc"):
            with pytest.raises(StoreBusy), backend.locked("gc", timeout_s=0.05):
                pass
            with backend.locked("refs", timeout_s=0.05):
                pass
        with backend.locked("gc", timeout_s=0.05):
            pass

    def test_leases_live_until_they_are_released(self, backend: Backend) -> None:
        first = backend.acquire_lease({"kind": "reader", "manifests": ["a"]})
        with backend.acquire_lease({"kind": "build"}):
            assert len(backend.live_leases()) == 2
        assert list(backend.live_leases()) == [{"kind": "reader", "manifests": ["a"]}]
        first.release()
        first.release()
        assert list(backend.live_leases()) == []
