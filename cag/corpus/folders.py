"""Files below a folder, in natural order, without hidden files, version control, virtual environments and stores.

A link to a folder is followed once, and only when its target lies neither inside nor above the folder being walked:
what is inside is met under its own path, and what is above would lead back. So loops end, and no name is by chance.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from cag.corpus.loaders import unreadable
from cag.errors import UnreadableDocument

OnError = Callable[[UnreadableDocument], None]
OnSkip = Callable[[Path, str], None]

_EXCLUDED_FOLDERS = frozenset(("node_modules", "__pycache__", "venv", "CVS", "_darcs"))
_VENV_MARK = "pyvenv.cfg"
_STORE_MARK = b"cag-store "
_HIDDEN = (".", "~$")  # the second: what Word keeps beside a document that is open
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def portable_name(path: PurePath | str) -> str:
    """A path as posix text in NFC; bytes of a file name that are not UTF-8 become U+FFFD."""
    text = path.as_posix() if isinstance(path, PurePath) else path
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "replace"))


def natural_key(relative: PurePath) -> tuple[object, ...]:
    """Sort key of a relative path: part by part, numbers by value, letter case only between otherwise equal names."""
    return (*(_part_key(part) for part in relative.parts), relative.as_posix())


def _part_key(part: str) -> tuple[tuple[int, int, str], ...]:
    pieces = re.split(r"([0-9]+)", part.casefold())
    return tuple((0, int(piece), "") if index % 2 else (1, 0, piece) for index, piece in enumerate(pieces))


def walk_files(root: Path, on_error: OnError, on_skip: OnSkip, *, max_depth: int | None = None) -> list[Path]:
    """Files below `root`, sorted by `natural_key` of their path relative to it.

    max_depth: number of path parts below `root` to look at; None for all.
    on_error:  gets folders that cannot be listed; on_skip: gets links that are not followed, special files and stores.
    """
    seen: set[tuple[int, int]] = set()
    files: list[Path] = []
    pending = [root]
    while pending:
        folder = pending.pop()
        if not _is_new(folder, root, seen, on_skip):
            continue
        depth = len(folder.relative_to(root).parts)
        entries = [] if max_depth is not None and depth >= max_depth else _entries(folder, on_error)
        for entry in entries:
            try:
                mode = mode_of(entry)
            except UnreadableDocument as error:
                on_error(error)
                continue
            if stat.S_ISDIR(mode):
                if _is_store(entry):
                    on_skip(entry, "a store of caches")
                elif not _is_excluded(entry):
                    pending.append(entry)
            elif stat.S_ISREG(mode):
                files.append(entry)
            else:
                on_skip(entry, "not a regular file" if mode else "broken link")
    return sorted(files, key=lambda path: natural_key(path.relative_to(root)))


def mode_of(path: Path) -> int:
    """`st_mode` of what a path leads to; 0 where it leads nowhere.

    Raises: UnreadableDocument: the system does not say which.
    """
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in _NOWHERE:
            return 0
        raise unreadable(portable_name(path), f"the system refuses it ({error.strerror})") from error
    except ValueError as error:
        raise unreadable(portable_name(path), f"it is no path ({error})") from error


def _entries(folder: Path, on_error: OnError) -> Iterator[Path]:
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(_HIDDEN)]
    except OSError as error:
        on_error(unreadable(portable_name(folder), f"the folder cannot be listed ({error.strerror})"))
        return
    yield from sorted(entries, key=lambda path: natural_key(PurePath(path.name)), reverse=True)


def _is_excluded(folder: Path) -> bool:
    try:
        return folder.name in _EXCLUDED_FOLDERS or bool(mode_of(folder / _VENV_MARK))
    except UnreadableDocument:
        return False  # nor will it be listed, which is when that is said


def _is_store(folder: Path) -> bool:
    """Whether a folder holds caches, whose manifests are no documents (docs/format.md, section 1)."""
    marker = folder / "format"
    try:
        if not stat.S_ISREG(mode_of(marker)):
            return False
        with marker.open("rb") as stream:
            return stream.read(len(_STORE_MARK)) == _STORE_MARK
    except (OSError, UnreadableDocument):
        return False


def _is_new(folder: Path, root: Path, seen: set[tuple[int, int]], on_skip: OnSkip) -> bool:
    if folder.is_symlink() and folder != root:
        target, real_root = folder.resolve(), root.resolve()
        if target.is_relative_to(real_root) or real_root.is_relative_to(target):
            on_skip(folder, "link into or above the folder that is read")
            return False
    identity = _identity(folder)
    if identity in seen:
        on_skip(folder, "link to a folder that is read already")
        return False
    seen.add(identity)
    return True


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
