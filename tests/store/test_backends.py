import errno
import os
import signal
import subprocess
import sys

import pytest

from cag_store import Store
from cag_store.backends import LocalBackend, MemoryBackend
from cag_store.errors import StoreError, StoreFull, UnsupportedBackend, UnsupportedFormat
from cag_store.testing import BackendConformance
from torture import in_child


class TestMemory(BackendConformance):
    def make_backend(self, folder):
        return MemoryBackend()


class TestLocal(BackendConformance):
    def make_backend(self, folder):
        return LocalBackend(folder)


def test_the_store_is_made_by_the_first_write(tmp_path):
    backend = LocalBackend(tmp_path / "a" / "b")
    assert list(backend.list("refs")) == []
    assert not (tmp_path / "a").exists()
    backend.replace("refs/x.json", b"1")
    assert (tmp_path / "a" / "b" / "format").read_text() == "cag-store 1\n"
    assert not list((tmp_path / "a" / "b" / "tmp").iterdir())


def test_other_directories_and_versions_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("my life's work")
    with pytest.raises(UnsupportedFormat, match=r"thesis\.tex"):
        LocalBackend(tmp_path)
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "format").write_text("cag-store 2\n")
    with pytest.raises(UnsupportedFormat, match="cag-store 2"):
        LocalBackend(newer)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StoreError):
        LocalBackend(file)


def test_a_folder_that_may_not_be_entered(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # the superuser may enter everything
    try:
        with pytest.raises(StoreFull, match="no permission"):
            LocalBackend(tmp_path / "closed" / "store")
    finally:
        os.seteuid(user)


def parts_then(error):
    yield b"some bytes"
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError()])
def test_temporary_files_are_removed_whatever_happens(tmp_path, error):
    backend = LocalBackend(tmp_path / "store")
    with pytest.raises(type(error)):
        backend.put_if_absent("chunks/x", parts_then(error))
    assert not list((tmp_path / "store" / "tmp").iterdir())
    assert backend.put_if_absent("chunks/x", [b"1"])


FILE_LIMIT = """
import resource, sys
from cag_store.backends import LocalBackend
from cag_store.errors import StoreFull
backend = LocalBackend(sys.argv[1])
backend.put_if_absent("chunks/small", [b"1"])
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    backend.put_if_absent("chunks/large", [bytes(1 << 17)])
except StoreFull as error:
    assert "gc" in str(error), error
    print([p.name for p in (backend.root / "tmp").iterdir()], backend.get("chunks/small", 9))
"""


def test_a_file_that_the_system_cuts_off_is_a_full_store(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FILE_LIMIT, str(tmp_path / "s")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] b'1'"


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small file system needs root on Linux"
)
def test_a_full_disk_and_a_read_only_one(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount is not permitted here")
    try:
        backend = LocalBackend(folder / "store")
        backend.put_if_absent("chunks/small", [b"1"])
        with pytest.raises(StoreFull, match="gc"):
            backend.put_if_absent("chunks/large", [bytes(1 << 20)])
        assert not list((folder / "store" / "tmp").iterdir())
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(StoreFull, match="permission"):
            backend.put_if_absent("chunks/other", [b"1"])
        assert backend.get("chunks/small", 10) == b"1"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


HOLD_LEASE = """
import sys, time
from cag_store.backends import LocalBackend
lease = LocalBackend(sys.argv[1]).acquire_lease({"kind": "build"})
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_process_holds_no_lease(tmp_path):
    command = [sys.executable, "-c", HOLD_LEASE, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        backend = LocalBackend(tmp_path / "store")
        assert list(backend.live_leases()) == [{"kind": "build"}]
        process.kill()
    assert list(backend.live_leases()) == []
    assert not list((tmp_path / "store" / "leases").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_neither_keeps_a_lock_nor_ends_a_lease(tmp_path):
    backend, other = (LocalBackend(tmp_path / "store") for _ in range(2))
    lease = backend.acquire_lease({"kind": "build"})
    reading, writing = os.pipe()
    with backend.locked("gc"):
        child = in_child(lambda: (lease.release(), os.write(writing, b"released"), signal.pause()))
    try:
        assert os.read(reading, 8) == b"released"
        assert list(other.live_leases()) == [{"kind": "build"}]
        with other.locked("gc", timeout_s=0):
            lease.release()
        assert list(other.live_leases()) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_store_on_a_file_system_without_locks_is_read_and_not_written(tmp_path, small, monkeypatch):
    small().build(Store.open(tmp_path / "store"))

    def flock(_descriptor, _kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    store = Store.open(tmp_path / "store")
    with store.open_reader("small")[2] as reader:
        buffers = small().buffers()
        reader.load(buffers)
        small().check(buffers)
    assert store.verify("small").ok
    for change in (store.gc, lambda: store.pin("small"), lambda: small(seed=1).build(store, "other")):
        with pytest.raises(UnsupportedBackend, match="has no locks"):
            change()
    assert store.names() == ["small"]


@pytest.mark.skipif(sys.platform == "win32", reason="flock is there on POSIX only")
@pytest.mark.parametrize("missing", ["leases", "tmp"])
def test_a_lease_that_cannot_be_made_closes_nothing_when_it_goes(tmp_path, missing):
    from cag_store.backends.flocks import FileLease

    for folder in {"leases", "tmp"} - {missing}:
        (tmp_path / folder).mkdir()
    lease = FileLease.__new__(FileLease)
    with pytest.raises(OSError, match="No such file"):
        lease.__init__(tmp_path / "leases", tmp_path / "tmp", {})
    with (tmp_path / "other").open("w") as other:  # may have the descriptor that the lease had
        lease.release()
        assert os.fstat(other.fileno()).st_size == 0


def test_leftovers_of_dead_writers_are_swept_and_living_ones_are_not(tmp_path):
    backend = LocalBackend(tmp_path / "store")
    leftover = tmp_path / "store" / "tmp" / "dead.json"
    seen = []

    def parts():
        leftover.write_bytes(b"123")
        seen.append([info.path for info in backend.sweep_temporaries(dry_run=True)])
        assert leftover.exists()
        seen.append([info.path for info in backend.sweep_temporaries()])
        yield b"1"

    assert backend.put_if_absent("chunks/x", parts())
    assert seen == [["tmp/dead.json"], ["tmp/dead.json"]]
    assert not leftover.exists()
    assert backend.get("chunks/x", 1) == b"1"
