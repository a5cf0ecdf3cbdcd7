"""The errors of the store.

StoreError
├── EntryNotFound (KeyError)          a ref, manifest, chunk or blob that is not there
├── CorruptEntry (ValueError)         bytes that are not what their address, checksum or header says
├── UnsupportedFormat (ValueError)    written by a newer or unknown format version
├── UnknownCodec (LookupError)        a codec id nobody registered, or a configuration it refuses
├── UnencodableArray (ValueError)     values, shape or type that a codec cannot keep within its promise
├── StoreFull (OSError)               no space, quota or permission to write
├── StoreBusy (RuntimeError)          a lock that another process holds for too long
├── EntryChanged (RuntimeError)       an object that was replaced while it was read
├── EntryConflict (ValueError)        the same address with other bytes than the ones to be stored
├── EntryPinned (RuntimeError)         a pinned cache that is to be removed without force
├── BackendUnavailable (OSError)      a server that cannot be reached, refuses, or keeps failing
├── UnsupportedBackend (ValueError)   a URL nobody serves, or a server or file system that cannot keep a store safe
└── InvalidName (ValueError)          a name or key the store does not accept

Every error says what was expected against what was found, where, and what to do.
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of all errors of the store. Facts are keyword attributes."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __str__(self) -> str:
        return self.message


class EntryNotFound(StoreError, KeyError):
    """A ref, manifest, chunk or blob that is not there."""


class CorruptEntry(StoreError, ValueError):
    """Bytes that are not what their address, checksum or header says. Facts: `where`, `expected`, `found`."""


class UnsupportedFormat(StoreError, ValueError):
    """Written by a newer or unknown format version. Facts: `expected`, `found`."""


class UnknownCodec(StoreError, LookupError):
    """A codec id nobody registered, or a configuration that the codec refuses."""


class UnencodableArray(StoreError, ValueError):
    """Values, a shape or a type that a codec cannot keep within its promise (for example NaN in a lossy one)."""


class StoreFull(StoreError, OSError):
    """No space, quota or permission to write."""


class StoreBusy(StoreError, RuntimeError):
    """A lock that another process holds for too long."""


class EntryChanged(StoreError, RuntimeError):
    """An object that was replaced while it was read. Opening the cache again reads the new one."""


class EntryConflict(StoreError, ValueError):
    """The same address with other bytes than the ones to be stored: computed on another machine."""


class EntryPinned(StoreError, RuntimeError):
    """A pinned cache that is to be removed without force. Fact: `name`."""


class BackendUnavailable(StoreError, OSError):
    """A server that cannot be reached, refuses access, or keeps failing after retries."""


class UnsupportedBackend(StoreError, ValueError):
    """A URL that no backend serves, or a server or file system that cannot keep a store safe."""


class InvalidName(StoreError, ValueError):
    """A name or key that the store does not accept."""
