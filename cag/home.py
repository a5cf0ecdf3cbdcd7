"""Where the engine keeps what it downloads and builds, on this machine, and how a file of it is written."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import platformdirs

_ROOT = 0  # the user who may write everything


def cag_home() -> Path:
    """`$CAG_HOME`, or the platform's cache directory of the user. Read at each call; the folder may not exist yet."""
    configured = os.environ.get("CAG_HOME")
    if configured:
        return user_path(configured)
    return platformdirs.user_cache_path("cag", appauthor=False)


def user_path(text: str | Path) -> Path:
    """A path as the user wrote it, from the root on, with `~` for the home; a `~` of nobody's is a name like others."""
    path = Path(text)
    with suppress(RuntimeError):
        path = path.expanduser()
    return path.absolute()


def is_trusted(path: Path) -> bool:
    """Whether a file of the home was written by this user or root, and not everybody may write it: what others can have
    put there says nothing of a model. Raises: OSError."""
    status = path.stat()
    return not hasattr(os, "geteuid") or (status.st_uid in (os.geteuid(), _ROOT) and not status.st_mode & stat.S_IWOTH)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all, for readers at the same time and after a crash; makes its folder.

    Raises:
        OSError: it cannot be written; what was there before stays, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")  # with the usual permissions, unlike tempfile
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
