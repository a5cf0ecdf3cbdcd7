"""Backends: where a store's objects lie."""

from cag_store.backends.base import Backend, Lease, ObjectInfo
from cag_store.backends.local import LocalBackend
from cag_store.backends.memory import MemoryBackend

__all__ = ["Backend", "Lease", "LocalBackend", "MemoryBackend", "ObjectInfo"]
