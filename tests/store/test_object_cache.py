"""The cache of pieces: bounded whatever happens, checked when read back, shared by processes."""

import os
import threading

import pytest

from cag_store import PieceCache, Store
from cag_store.backends.object_cache import CachedReads


def files_bytes(folder):
    return PieceCache(folder).num_bytes()


def test_what_was_kept_is_found_and_nothing_else(tmp_path):
    pieces = PieceCache(tmp_path)
    assert pieces.find("a", "0-5", 5) is None
    pieces.keep("a", "0-5", b"hello", 11)
    assert pieces.find("a", "0-5", 5) == (b"hello", 11)
    assert pieces.find("a", "0-5", 4) is None
    assert pieces.find("b", "0-5", 5) is None
    out = bytearray(5)
    assert pieces.find_into("a", "0-5", memoryview(out))
    assert out == b"hello"
    assert not pieces.find_into("a", "0-6", memoryview(bytearray(6)))
    assert pieces.forget("a")
    assert not pieces.forget("a")
    assert pieces.find("a", "0-5", 5) is None


@pytest.mark.parametrize("position", [0, 15, 16, 23, 24, 28])
@pytest.mark.parametrize("change", ["flip", "cut", "grow"])
def test_a_damaged_piece_is_as_good_as_none(tmp_path, position, change):
    pieces = PieceCache(tmp_path)
    for way in ("find", "find_into"):
        pieces.keep("a", "0-5", b"hello", 11)
        (path,) = tmp_path.glob("??/*/*")
        data = bytearray(path.read_bytes())
        if change == "flip":
            data[position] ^= 1
        path.write_bytes({"flip": data, "cut": data[:position], "grow": data + b"x"}[change])
        found = pieces.find("a", "0-5", 6) if way == "find" else pieces.find_into("a", "0-5", memoryview(bytearray(5)))
        assert not found
        assert not path.exists()


def test_the_least_recently_used_goes_first_and_the_bound_holds(tmp_path):
    pieces = PieceCache(tmp_path, max_bytes=1000)
    for number in range(9):
        pieces.keep(f"o{number}", "x", bytes(76), 0)
        os.utime(pieces._path(f"o{number}", "x"), (number, number))
    assert pieces.num_bytes() == 900
    assert pieces.find("o0", "x", 76) is not None  # used now
    pieces.keep("big", "x", bytes(276), 0)
    assert pieces.num_bytes() <= 1000
    assert pieces.find("o0", "x", 76) is not None
    assert pieces.find("o1", "x", 76) is None
    assert pieces.find("big", "x", 276) is not None
    pieces.keep("too big", "x", bytes(977), 0)
    assert pieces.find("too big", "x", 977) is None


def test_threads_and_processes_never_exceed_the_bound(tmp_path):
    bound, seen, stop = 20_000, [], threading.Event()

    def watch():
        pieces = PieceCache(tmp_path, bound)
        while not stop.is_set():
            with pieces._locked():  # a sum is only one while nobody writes
                seen.append(files_bytes(tmp_path))

    watcher = threading.Thread(target=watch)

    def fill(seed):
        pieces = PieceCache(tmp_path, bound)
        for number in range(150):
            name = f"o{(seed * 31 + number * 7) % 60}"
            length = 100 + 37 * (number % 40)
            found = pieces.find(name, f"0-{length}", length)
            assert found in (None, (bytes([number % 40]) * length, length))
            pieces.keep(name, f"0-{length}", bytes([number % 40]) * length, length)

    children = []
    for seed in range(2):
        child = os.fork()
        if not child:
            try:
                fill(seed)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    watcher.start()
    threads = [threading.Thread(target=fill, args=(seed,)) for seed in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = [os.waitpid(child, 0)[1] for child in children]
    stop.set()
    watcher.join()
    assert ended == [0, 0]
    assert max(seen) <= bound
    assert 0 < files_bytes(tmp_path) <= bound


def test_leftovers_of_a_killed_writer_are_counted_and_go(tmp_path):
    pieces = PieceCache(tmp_path, 1000)
    pieces.keep("a", "x", bytes(100), 0)
    (path,) = tmp_path.glob("??/*/*")
    path.with_suffix(".new").write_bytes(bytes(700))
    os.utime(path.with_suffix(".new"), (1, 1))
    (tmp_path / "total").write_bytes(b"nonsense")
    pieces.keep("b", "x", bytes(500), 0)
    assert pieces.num_bytes() <= 1000
    assert pieces.find("b", "x", 500) is not None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("x")
    pieces = PieceCache(tmp_path / "file")
    pieces.keep("a", "x", b"1", 0)
    assert pieces.find("a", "x", 1) is None


def load(store, cache):
    with store.open_reader("small")[2] as reader:
        buffers = cache.buffers()
        reader.load(buffers)
        cache.check(buffers)
        return reader


def chunk_reads(proxy):
    return [request for request in proxy.requests if request.method == "GET" and "/chunks/" in request.path]


def test_the_second_opening_reads_locally(s3_url, proxy, small, tmp_path):
    cache = small(num_tokens=24)
    cache.build(Store.open(s3_url))
    pieces = PieceCache(tmp_path)
    first = load(Store.open(s3_url, pieces=pieces), cache)
    assert first.tier == "object-store"
    proxy.requests.clear()
    second = load(Store.open(s3_url, pieces=pieces), cache)
    assert second.tier == "disk"
    assert second.timings.bytes_by_tier == {"disk": second.timings.bytes_read}
    assert chunk_reads(proxy) == []
    assert Store.open(s3_url, pieces=pieces).verify("small").ok
    assert len(chunk_reads(proxy)) > 3  # verify looks at the server, not at copies


@pytest.mark.parametrize("what", ["flip", "other"])
def test_wrong_copies_are_fetched_again(s3_url, small, tmp_path, what):
    """A copy that is damaged, and one that is whole but of another object, as after a rebuild of a damaged chunk."""
    cache = small(num_tokens=24)
    cache.build(Store.open(s3_url))
    pieces = PieceCache(tmp_path)
    load(Store.open(s3_url, pieces=pieces), cache)
    store = Store.open(s3_url, pieces=pieces)
    paths = [path for path in tmp_path.glob("??/*/*") if path.name != "whole"]
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        if what == "flip":
            path.write_bytes(data)
    if what == "other":
        for chunk in store.resolve("small")[1].chunks:
            name = f"{s3_url}/chunks/{chunk.key[:2]}/{chunk.key}"
            for path in pieces._folder(name).iterdir():
                data = path.read_bytes()[24:]
                size = int.from_bytes(path.read_bytes()[16:24], "little")
                pieces.keep(name, path.name, data[:-1] + bytes([data[-1] ^ 1]), size)
    assert load(store, cache).tier == "object-store"
    assert load(store, cache).tier == "disk"


def test_only_what_never_changes_is_kept(s3_url, small, tmp_path):
    store = Store.open(s3_url, pieces=PieceCache(tmp_path))
    assert isinstance(store.nearby, CachedReads)
    small(seed=1).build(store)
    old = store.resolve("small")[1]
    small(seed=2).build(Store.open(s3_url))
    assert store.resolve("small")[1] != old
    load(store, small(seed=2))
    assert Store.open(tmp_path / "local", pieces=PieceCache(tmp_path)).nearby.tier == "disk"
