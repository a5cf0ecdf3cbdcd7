"""Backends: where a store's objects lie, and which of them serves a path or URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cag_store.backends.base import SCRATCH_BYTES, Backend, Lease, ObjectInfo, ReadableBackend
from cag_store.backends.local import LocalBackend
from cag_store.backends.memory import MemoryBackend
from cag_store.errors import UnsupportedBackend

__all__ = [
    "SCRATCH_BYTES",
    "Backend",
    "Lease",
    "LocalBackend",
    "MemoryBackend",
    "ObjectInfo",
    "ReadableBackend",
    "is_url",
    "open_backend",
]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
OBJECT_SCHEMES = ("s3", "gs", "az", "memory")


def is_url(location: str | os.PathLike[str]) -> bool:
    """Whether `location` is a URL rather than a path."""
    return _URL.match(os.fspath(location)) is not None


def open_backend(location: str | os.PathLike[str]) -> Backend:
    """The backend of a directory, a `file://` URL (the same), or a URL of an object store.

    Raises: UnsupportedBackend for other URLs, and for ones with a user, password or query; UnsupportedFormat;
    BackendUnavailable.
    """
    text = os.fspath(location)
    if not is_url(text):
        return LocalBackend(Path(text))
    parts = urlsplit(text)
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise UnsupportedBackend(
            f"a {parts.scheme}:// URL of a store has no user, password or query: credentials come from the environment"
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UnsupportedBackend(f"{text}: a file URL has no host: file:///path")
        return LocalBackend(Path(unquote(parts.path)))
    if parts.scheme not in OBJECT_SCHEMES or not (parts.netloc or parts.scheme == "memory"):
        served = ", ".join(f"{scheme}://bucket/prefix" for scheme in OBJECT_SCHEMES[:-1])
        raise UnsupportedBackend(f"{text} is no URL of a store: give a directory, file:///path, {served}", found=text)
    from cag_store.backends.object import ObjectBackend  # its compiled client is only loaded for such stores

    return ObjectBackend(text)
