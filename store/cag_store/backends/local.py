"""A backend in a local directory: temporary file, fsync, link or rename, fsync of the directory.

Errors of the operating system are translated here: no space, quota or permission -> StoreFull;
missing -> EntryNotFound; no locks -> UnsupportedBackend.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cag_store.backends import flocks, page_cache
from cag_store.backends.base import Backend, Lease, ObjectInfo, Parts, checked_path, is_path
from cag_store.errors import CorruptEntry, EntryNotFound, StoreError, StoreFull, UnsupportedBackend, UnsupportedFormat

FORMAT_TEXT = "cag-store 1\n"

_TEMPORARY = "tmp"
_FOLDERS = ("chunks", "blobs", "manifests", "refs", "leases", "locks", _TEMPORARY)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}


class LocalBackend(Backend):
    """The directory `root`; made by the first write. Raises: UnsupportedFormat for a directory that holds something
    else."""

    tier = "disk"

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(self.root)
        self._ready = False
        self._check_format()

    def get(self, path: str, max_bytes: int) -> bytes:
        """See `Backend`."""
        with self._translated(path), self._descriptor(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > max_bytes:
                raise CorruptEntry(f"{self.root / path}: more than {max_bytes} bytes", where=path, expected=max_bytes)
            data = bytearray(size)
            self._fill(path, descriptor, 0, memoryview(data))
        return bytes(data)

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Backend`."""
        with self._translated(path), self._descriptor(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if offset + length > size:
                raise self._early(path, offset + length, size)
            data = bytearray(length)
            self._fill(path, descriptor, offset, memoryview(data))
        return bytes(data)

    def get_start(self, path: str, length: int) -> tuple[bytes, int]:
        """See `ReadableBackend`."""
        with self._translated(path), self._descriptor(path) as descriptor:
            size = os.fstat(descriptor).st_size
            data = bytearray(min(length, size))
            self._fill(path, descriptor, 0, memoryview(data))
        return bytes(data), size

    def get_range_into(self, path: str, offset: int, out: memoryview) -> str:
        """See `Backend`."""
        with self._translated(path), self._descriptor(path) as descriptor:
            self._fill(path, descriptor, offset, out)
        return self.tier

    def will_read(self, path: str, length: int) -> None:
        """See `ReadableBackend`."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self._descriptor(path) as descriptor:
                os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)

    def read_range(self, path: str, offset: int, length: int, scratch: memoryview) -> tuple[memoryview, str]:
        """See `ReadableBackend`. What is not in memory is read past the page cache, which spares the processor the copy
        and the cache's upkeep, and the machine a second copy of a cache that is resident."""
        before = offset % page_cache.DIRECT_ALIGNMENT
        around = -(-(before + length) // page_cache.DIRECT_ALIGNMENT) * page_cache.DIRECT_ALIGNMENT
        with self._translated(path):
            direct = page_cache.open_direct(f"{self.url}/{checked_path(path)}")
            if direct is not None:
                try:
                    if not page_cache.lies_in_memory(direct, offset, length):
                        self._fill(path, direct, offset - before, scratch[:around], before + length)
                        return scratch[before : before + length], self.tier
                finally:
                    os.close(direct)
        return super().read_range(path, offset, length, scratch)

    def descriptor(self, path: str, length: int) -> int | None:
        """See `ReadableBackend`."""
        name = f"{self.url}/{checked_path(path)}"
        with self._translated(path):
            direct = page_cache.open_direct(name)
            if direct is not None and not page_cache.lies_in_memory(direct, 0, length):
                return direct
            if direct is not None:
                os.close(direct)
            return os.open(name, page_cache.READING)

    def put_if_absent(self, path: str, parts: Parts) -> bool:
        """See `Backend`."""
        target = self._path(path)
        with self._translated(path):
            if target.exists():
                return False
            self._prepare()
            with self._written(parts) as temporary:
                self._make_parent(target)
                try:
                    os.link(temporary, target)
                except OSError as error:
                    if error.errno not in _NO_LINKS and not isinstance(error, FileExistsError):
                        raise
                    with self.locked("rename"):  # a file system without hard links, or a link to nothing has the name
                        if target.exists():
                            return False
                        temporary.rename(target)
            _sync_directory(target.parent)
        return True

    def replace(self, path: str, data: bytes) -> None:
        """See `Backend`."""
        target = self._path(path)
        with self._translated(path):
            self._prepare()
            with self._written([data]) as temporary:
                self._make_parent(target)
                temporary.replace(target)
            _sync_directory(target.parent)

    def delete(self, path: str) -> bool:
        """See `Backend`."""
        target = self._path(path)
        try:
            with self._translated(path):
                target.unlink()
                _sync_directory(target.parent)
        except EntryNotFound:
            return False
        return True

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Backend`. A folder that cannot be listed is an error: what it holds must not look as if it had gone."""
        with self._translated(prefix):
            for folder, folders, names in os.walk(self._path(prefix), onerror=_unless_missing):
                folders[:] = filter(is_path, folders)  # not into `lost+found`
                for name in names:
                    file = Path(folder, name)
                    path = file.relative_to(self.root).as_posix()
                    if is_path(path):
                        with contextlib.suppress(FileNotFoundError):
                            found = _stat(file)
                            yield ObjectInfo(path, found.st_size, found.st_mtime)

    def stat(self, path: str) -> ObjectInfo:
        """See `Backend`."""
        with self._translated(path):
            found = os.stat(f"{self.url}/{checked_path(path)}")  # noqa: PTH116  pathlib costs more than the call
        return ObjectInfo(path, found.st_size, found.st_mtime)

    def touch(self, path: str) -> None:
        """See `Backend`."""
        with self._translated(path):
            os.utime(self._path(path))

    def record_use(self, path: str) -> None:
        """See `Backend`; works on whichever version of the file lies there."""
        self.touch(path)

    @contextmanager
    def locked(self, name: str, shared: bool = False, timeout_s: float = 60.0) -> Iterator[None]:
        """See `Backend`."""
        with contextlib.ExitStack() as stack:
            with self._translated(f"locks/{name}"):
                self._prepare()
                stack.enter_context(flocks.held(self._path(f"locks/{name}"), shared, timeout_s))
            yield

    def acquire_lease(self, content: dict[str, Any]) -> Lease:
        """See `Backend`."""
        with self._translated("leases"):
            self._prepare()
            return flocks.FileLease(self.root / "leases", self.root / _TEMPORARY, content)

    def live_leases(self) -> Sequence[dict[str, Any]]:
        """See `Backend`."""
        with self._translated("leases"):
            return flocks.live_leases(self.root / "leases")

    def sweep_temporaries(self, dry_run: bool = False) -> Sequence[ObjectInfo]:
        """See `Backend`."""
        with self._translated(_TEMPORARY):
            removed = flocks.remove_unlocked(self.root / _TEMPORARY, dry_run)
        return [ObjectInfo(f"{_TEMPORARY}/{path.name}", found.st_size, found.st_mtime) for path, found in removed]

    def drop_page_cache(self, path: str) -> bool:
        """See `Backend`; True only when the kernel then says that no page is left."""
        with self._translated(path), self._descriptor(path) as descriptor:
            return page_cache.drop(descriptor)

    def _path(self, path: str) -> Path:
        return self.root / checked_path(path)

    @contextmanager
    def _descriptor(self, path: str) -> Iterator[int]:
        descriptor = os.open(f"{self.url}/{checked_path(path)}", page_cache.READING)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _fill(self, path: str, descriptor: int, offset: int, out: memoryview, needed: int | None = None) -> None:
        """Fill `out`, or as much of it as the file has if that is the first `needed` bytes."""
        filled, needed = 0, len(out) if needed is None else needed
        while filled < needed:
            count = os.preadv(descriptor, [out[filled:]], offset + filled)
            if not count:
                raise self._early(path, offset + needed, offset + filled)
            filled += count

    def _early(self, path: str, expected: int, found: int) -> CorruptEntry:
        where = str(self.root / path)
        message = f"{where}: expected at least {expected} bytes, found {found}: the file was cut; build the cache again"
        return CorruptEntry(message, where=where, expected=expected, found=found)

    @contextmanager
    def _written(self, parts: Parts) -> Iterator[Path]:
        """A whole, synced temporary file; it is gone at the end, whatever happens."""
        temporary, descriptor = flocks.locked_temporary(self.root / _TEMPORARY)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(descriptor)
                yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _make_parent(self, target: Path) -> None:
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync_directory(target.parent.parent)

    def _prepare(self) -> None:
        """Make the store's folders, once."""
        if self._ready:
            return
        try:
            (self.root / _TEMPORARY).mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # not of a part of a cache that was there
            raise StoreFull(
                f"no folder can be made at {self.root}: {error.strerror}; put the store elsewhere", path=str(self.root)
            ) from error
        self._check_format()
        if not (self.root / "format").exists():
            with self._written([FORMAT_TEXT.encode("ascii")]) as temporary:
                temporary.replace(self.root / "format")
        for folder in _FOLDERS:
            (self.root / folder).mkdir(exist_ok=True)
        _sync_directory(self.root)
        self._ready = True

    def _check_format(self) -> None:
        """Raises: UnsupportedFormat unless the directory is a store of this version, empty, or missing."""
        names = self._names()  # before the marker, which is the first file of a store
        marker = self.root / "format"
        try:
            found = self.get_start(marker.name, 64)[0].decode("ascii", "replace")
        except EntryNotFound:
            foreign = sorted(names - {_TEMPORARY})
            if foreign:
                raise UnsupportedFormat(
                    f"{self.root} is not a store: it holds {foreign[0]!r}, but no file 'format'; name an empty one",
                    expected=FORMAT_TEXT,
                    found=None,
                ) from None
            return
        if found != FORMAT_TEXT:
            raise UnsupportedFormat(
                f"{self.root} says {found!r}; this program reads {FORMAT_TEXT!r}: use the version that wrote it",
                expected=FORMAT_TEXT,
                found=found,
            )

    def _names(self) -> set[str]:
        """What is in the directory; nothing where it is none, or may be entered and not listed."""
        try:
            return {path.name for path in self.root.iterdir()}
        except OSError:  # whether this is a store is for its marker to say
            return set()

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Turn errors of the operating system into those of the store."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            raise _translate(error, str(self.root / path)) from error


def _unless_missing(error: OSError) -> None:
    """Raises: `error`, but for a folder that is not there."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        raise
    except OSError:  # a link to itself, which whoever reads it says
        return path.lstat()


def _translate(error: OSError, where: str) -> StoreError:
    if error.errno == errno.ENOENT:
        return EntryNotFound(f"there is no {where}", path=where)
    if error.errno in _NO_SPACE:
        return StoreFull(
            f"no space left to write {where}: {error.strerror}; free some, run gc, or put the store elsewhere",
            path=where,
        )
    if error.errno in _NO_PERMISSION:
        return StoreFull(
            f"no permission for {where}: {error.strerror}; change its owner or mode, or put the store elsewhere",
            path=where,
        )
    if error.errno in _NO_LOCKS:
        return UnsupportedBackend(
            f"the file system of {where} has no locks ({error.strerror}), so a store on it can only be read: write on "
            "a local disk, or mount it with locks",
            path=where,
        )
    return StoreError(f"{where}: {error.strerror or error}", path=where)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
