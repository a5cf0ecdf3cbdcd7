"""sha256 of files, hashed once: the digest is kept under `cag_home()/fingerprints` beside the file's identity.

A file that was touched, replaced or swapped has another size, time or inode, and is hashed again; one that was renamed
is still the same file. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from cag.home import cag_home, is_trusted, write_atomically

# A file changed this shortly before it is hashed could change again under the same time stamp: its digest is not kept.
SETTLE_NS = 2_000_000_000


def file_sha256(path: Path) -> str:
    """Hex sha256 of every byte of `path`, from the digest cache when the file is the one hashed before.

    Raises: OSError when the file cannot be read or changes while it is read.
    """
    path = path.resolve()
    started_ns = time.time_ns()
    before = file_identity(path)
    record = _record_path(before)
    cached = _read_record(record, before)
    if cached is not None:
        return cached
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if file_identity(path) != before:
        raise OSError(f"{path} changed while it was read")
    if started_ns - max(before["mtime_ns"], before["ctime_ns"]) > SETTLE_NS:
        _write_record(record, {**before, "path": str(path), "sha256": digest})
    return digest


def file_identity(path: Path) -> dict[str, int]:
    """Size, times, inode and device of a file: the same as long as nobody touches it. Raises: OSError."""
    stat = path.stat()
    return {
        "num_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
        "device": stat.st_dev,
    }


def _record_path(identity: dict[str, int]) -> Path:
    return cag_home() / "fingerprints" / f"{identity['device']:x}-{identity['inode']:x}.json"


def _read_record(record: Path, identity: dict[str, int]) -> str | None:
    try:
        found = json.loads(record.read_text(encoding="utf-8")) if is_trusted(record) else None
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or any(found.get(key) != value for key, value in identity.items()):
        return None
    digest = found.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _write_record(record: Path, content: dict[str, object]) -> None:
    # The cache only saves time: a read-only or full home must not stop the caller.
    with suppress(OSError):
        write_atomically(record, json.dumps(content).encode())
