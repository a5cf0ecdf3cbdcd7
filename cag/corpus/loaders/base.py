"""The contract of a loader: the bytes of one file in, one or more texts out.

A loader is a module of this package with a function `load(source) -> list[Extract]`. It need not normalise, hash, or
name documents, and may let errors of its library pass: `load_source` turns them into `UnreadableDocument`.
It must bound what it unpacks by `source.limits`, open no other file and no network address, and print nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cag.errors import UnreadableDocument

MIB = 1 << 20
# The reason of a file that is well-formed, but of another purpose; folders may hold such files.
NOT_DOCUMENTS = "its first line is not a document (an object with a text field)"


@dataclass(frozen=True, slots=True)
class CorpusLimits:
    """Bounds for one file, in bytes; what exceeds them is an `UnreadableDocument`.

    max_file_bytes: size on disk, and all that an office document unpacks to, pictures included.
    max_text_bytes: text after unpacking, in UTF-8.
    """

    max_file_bytes: int = 256 * MIB
    max_text_bytes: int = 64 * MIB


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read. `name` is its path as shown to the user, `content` all of its bytes."""

    name: str
    content: bytes
    limits: CorpusLimits


@dataclass(frozen=True, slots=True)
class Extract:
    """One text out of a file; `title` is "" where the file has none.

    In files of many texts, `doc_id` is the id that the file gives, or else `fragment` names the place in the file.
    """

    text: str
    title: str = ""
    doc_id: str = ""
    fragment: str = ""


class Loader(Protocol):
    """Reads one format.

    Raises: UnreadableDocument, or any error of the library behind it, when the bytes are not of that format.
    """

    def __call__(self, source: Source) -> list[Extract]:
        """The texts of `source`, in its own order; a text may be blank."""


def unreadable(name: str, reason: str, hint: str = "") -> UnreadableDocument:
    """The error for a file that cannot be read. Facts: `path`, `reason`."""
    return UnreadableDocument(f"cannot read {name}: {reason}.", hint=hint, path=name, reason=reason)


def check_text_size(source: Source, num_bytes: int) -> None:
    """Refuse a text of more than `max_text_bytes`.

    Raises: UnreadableDocument.
    """
    limit = source.limits.max_text_bytes
    if num_bytes > limit:
        hint = "Split the file, or raise CorpusLimits.max_text_bytes."
        raise unreadable(source.name, f"more than {limit} bytes of text", hint)
