"""A bounded cache on the local disk of what is read from an object store, so that a second opening reads locally.

What is kept are the very pieces that were asked for (a chunk's header, a few of its layers, a text), each in a file of
its own: 16 bytes xxh3 of what follows, 8 bytes size of the whole object, the piece. A piece is checked when it is read
back, and one that does not fit is as good as none. Files are written, counted and removed under one flock, so the sum
of their sizes never exceeds the bound, whatever processes share the folder; the least recently used go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import xxhash

from cag_store.backends.base import ReadableBackend

DEFAULT_CACHE_BYTES = 10_000_000_000
CACHED = ("chunks/", "blobs/", "manifests/")
_KEPT_SHARE = 0.9  # of the bound, after room was made: not to list the folder for each new piece
_CHECKSUM_BYTES, _SIZE_BYTES = 16, 8
_HEAD_BYTES = _CHECKSUM_BYTES + _SIZE_BYTES


class PieceCache:
    """Pieces of objects in `directory`, at most `max_bytes` in all. Safe with several threads and processes."""

    def __init__(self, directory: str | Path, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        self._guard = threading.Lock()

    def find(self, object_name: str, piece: str, length: int) -> tuple[bytes, int] | None:
        """The piece of at most `length` bytes and the size of its object, or None. What is damaged is removed."""
        with contextlib.suppress(OSError), self._path(object_name, piece).open("rb") as file:
            found = os.fstat(file.fileno()).st_size - _HEAD_BYTES
            if found <= length:
                out = bytearray(max(found, 0))
                object_bytes = self._read(file, memoryview(out))
                return None if object_bytes is None else (bytes(out), object_bytes)
        return None

    def find_into(self, object_name: str, piece: str, out: memoryview) -> bool:
        """Fill `out` with the piece of just that length; whether it was there. Otherwise `out` is undefined."""
        with contextlib.suppress(OSError), self._path(object_name, piece).open("rb") as file:
            return self._read(file, out) is not None
        return False

    def keep(self, object_name: str, piece: str, data: bytes | memoryview, object_bytes: int) -> None:
        """Keep a piece. One that is larger than the bound, or a folder that cannot be written, is no error."""
        if _HEAD_BYTES + len(data) > self.max_bytes:
            return
        size = object_bytes.to_bytes(_SIZE_BYTES, "little")
        checksum = xxhash.xxh3_128(size)
        checksum.update(data)
        with contextlib.suppress(OSError), self._locked() as total_file:
            self._write(self._path(object_name, piece), [checksum.digest(), size, data], total_file)

    def forget(self, object_name: str) -> bool:
        """Remove all pieces of an object; whether there was one."""
        removed = False
        for path in self._folder(object_name).glob("*"):
            with contextlib.suppress(OSError):
                path.unlink()
                removed = True
        return removed

    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(size for _, size, _ in self._files())

    def _read(self, file: BinaryIO, out: memoryview) -> int | None:
        """Fill `out` from a file of just its length; returns the size of the object. What is damaged is removed."""
        head = file.read(_HEAD_BYTES)
        filled = file.readinto(out)  # type: ignore[attr-defined]
        checksum = xxhash.xxh3_128(head[_CHECKSUM_BYTES:])
        checksum.update(out)
        if filled != len(out) or file.read(1) or checksum.digest() != head[:_CHECKSUM_BYTES]:
            Path(file.name).unlink(missing_ok=True)
            return None
        os.utime(file.fileno())
        return int.from_bytes(head[_CHECKSUM_BYTES:], "little")

    def _write(self, path: Path, parts: list[bytes | memoryview], total_file: int) -> None:
        """Write a file; the lock is held. The total is written first: a process that dies has counted too much."""
        num_bytes = sum(map(len, parts))
        total = self._total(total_file)
        if total is None or total + num_bytes > self.max_bytes:
            total = self._make_room(num_bytes)
        _write_total(total_file, total + num_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part)
            replaced = path.stat().st_size if path.exists() else 0
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if replaced:
            _write_total(total_file, total + num_bytes - replaced)

    def _make_room(self, num_bytes: int) -> int:
        """Remove the least recently used files until `num_bytes` fit; returns the size of those that stay."""
        files = self._files()
        total = sum(size for _, size, _ in files)
        limit = min(self.max_bytes - num_bytes, int(_KEPT_SHARE * self.max_bytes))
        for _, size, path in sorted(files):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, size, path) of every piece, and of leftovers of writers that died."""
        found = []
        for path in self.directory.glob("??/*/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _total(self, total_file: int) -> int | None:
        """The sum that the last writer left, or None."""
        text = os.pread(total_file, 32, 0)
        return int(text) if text.isdigit() else None

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The lock over all processes; gives the descriptor of the file that holds the sum."""
        with self._guard:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.directory / "total", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield descriptor
            finally:
                os.close(descriptor)

    def _folder(self, object_name: str) -> Path:
        digest = hashlib.sha256(object_name.encode("utf-8")).hexdigest()
        return self.directory / digest[:2] / digest

    def _path(self, object_name: str, piece: str) -> Path:
        return self._folder(object_name) / piece


class CachedReads(ReadableBackend):
    """Reads of `remote`, of which immutable objects are kept in `pieces`."""

    def __init__(self, remote: ReadableBackend, pieces: PieceCache) -> None:
        self.url = remote.url
        self.tier = remote.tier
        self.parallel_reads, self.read_bytes = remote.parallel_reads, remote.read_bytes
        self.remote = remote
        self.pieces = pieces

    def get(self, path: str, max_bytes: int) -> bytes:
        """See `ReadableBackend`."""
        if not path.startswith(CACHED):
            return self.remote.get(path, max_bytes)
        found = self.pieces.find(self._name(path), "whole", max_bytes)
        if found is not None:
            return found[0]
        data = self.remote.get(path, max_bytes)
        self.pieces.keep(self._name(path), "whole", data, len(data))
        return data

    def get_start(self, path: str, length: int) -> tuple[bytes, int]:
        """See `ReadableBackend`."""
        found = self.pieces.find(self._name(path), f"start-{length}", length)
        if found is not None:
            return found
        data, object_bytes = self.remote.get_start(path, length)
        self.pieces.keep(self._name(path), f"start-{length}", data, object_bytes)
        return data, object_bytes

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """See `ReadableBackend`."""
        piece = f"{offset}-{length}"
        found = self.pieces.find(self._name(path), piece, length)
        if found is not None and len(found[0]) == length:
            return found[0]
        data = self.remote.get_range(path, offset, length)
        self.pieces.keep(self._name(path), piece, data, 0)
        return data

    def get_range_into(self, path: str, offset: int, out: memoryview) -> str:
        """See `ReadableBackend`."""
        piece = f"{offset}-{len(out)}"
        if self.pieces.find_into(self._name(path), piece, out):
            return "disk"
        tier = self.remote.get_range_into(path, offset, out)
        self.pieces.keep(self._name(path), piece, out, 0)
        return tier

    def forget(self, path: str) -> bool:
        """See `ReadableBackend`."""
        return self.pieces.forget(self._name(path))

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}"


def _write_total(total_file: int, total: int) -> None:
    os.pwrite(total_file, b"%032d" % total, 0)
