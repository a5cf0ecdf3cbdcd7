"""Where the engine keeps what it downloads and builds, on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cag_home() -> Path:
    """`$CAG_HOME`, or the platform's cache directory of the user. Read at each call; the folder may not exist yet."""
    configured = os.environ.get("CAG_HOME")
    if configured:
        return Path(configured).expanduser().absolute()
    return platformdirs.user_cache_path("cag", appauthor=False)
