"""Arguments of a load (files, folders, globs) to the files they name, in stable order.

Order: arguments as given; inside a folder or glob, natural order of the posix path relative to it (`natural_key`). The
order in which a file system lists its entries never shows.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from cag.corpus.folders import OnError, OnSkip, mode_of, portable_name, walk_files
from cag.corpus.loaders import unreadable
from cag.errors import UnreadableDocument, UsageError
from cag.home import user_path

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class FoundFile:
    """One file to read.

    path: absolute. relative: posix path below the argument, the document's id. root_name: name of the folder around it,
    for ids that collide. is_explicit: named by itself, so that an unknown type is read as text and not passed over.
    """

    path: Path
    relative: str
    root_name: str
    is_explicit: bool


def find_files(arguments: Sequence[str | Path], on_error: OnError, on_skip: OnSkip) -> list[FoundFile]:
    """The files that `arguments` name. An argument that names nothing goes to `on_error` as UnreadableDocument.

    A string that is no existing path and has one of `* ? [` is a glob: `**` crosses folders, hidden names never match,
    and only files are taken. An empty string is an argument that is not set, not the current folder.

    Raises: UsageError: an empty string, or what is no path.
    """
    files: list[FoundFile] = []
    if not isinstance(arguments, Iterable) or not all(isinstance(argument, str | Path) for argument in arguments):
        raise UsageError(f"the paths are {arguments!r}; they must be texts or `Path`s.")
    for argument in arguments:
        if argument == "":
            raise UsageError("a path is empty.", hint="Name a file or a folder; `.` is the current one.")
        try:
            files += _named(argument, on_error, on_skip)
        except UnreadableDocument as error:
            on_error(error)
    return files


def _named(argument: str | Path, on_error: OnError, on_skip: OnSkip) -> list[FoundFile]:
    """The files that one argument names. Raises: UnreadableDocument: it names none."""
    # Its links stay: `resolve` would replace them, and with them the names that the user knows.
    path = Path(os.path.normpath(user_path(argument)))
    mode = mode_of(path)
    if stat.S_ISDIR(mode):
        return [_below(path, file) for file in walk_files(path, on_error, on_skip)]
    if stat.S_ISREG(mode):
        return [FoundFile(path, portable_name(path.name), portable_name(path.parent.name), True)]
    if mode:
        raise unreadable(portable_name(path), "it is neither a file nor a folder")
    if isinstance(argument, str) and glob.has_magic(argument):
        return _glob(path, on_error, on_skip)
    raise unreadable(portable_name(path), "there is no such file or folder")


def _below(root: Path, file: Path, *, is_explicit: bool = False) -> FoundFile:
    return FoundFile(file, portable_name(file.relative_to(root)), portable_name(root.name), is_explicit)


def _glob(pattern: Path, on_error: OnError, on_skip: OnSkip) -> list[FoundFile]:
    """The files that a pattern names. Raises: UnreadableDocument: none."""
    first_magic = next(index for index, part in enumerate(pattern.parts) if _MAGIC.search(part))
    root, parts = Path(*pattern.parts[:first_magic]), pattern.parts[first_magic:]
    max_depth = None if "**" in parts else len(parts)
    files = walk_files(root, on_error, on_skip, max_depth=max_depth) if stat.S_ISDIR(mode_of(root)) else []
    matches = [file for file in files if _matches(file.relative_to(root).parts, parts)]
    if not matches:
        raise unreadable(portable_name(pattern), "no file matches this pattern")
    # `*.ext` asks for that type; `docs/*` does not ask for the pictures among the documents.
    is_explicit = bool(pattern.suffix) and not _MAGIC.search(pattern.suffix)
    return [_below(root, file, is_explicit=is_explicit) for file in matches]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        rest = patterns[1:] or ("*",)
        return any(_matches(names[start:], rest) for start in range(len(names))) if rest else True
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])
