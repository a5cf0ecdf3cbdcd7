"""Disk and memory, asked for before the work starts. Knows byte counts, not models."""

from __future__ import annotations

import shutil
from pathlib import Path

from cag.errors import InsufficientResources
from cag.machine.memory_limits import available_memory_bytes


def require_disk(folder: Path, need_bytes: int, purpose: str) -> None:
    """Raises: InsufficientResources, with need against have, when the disk of `folder` has too little room."""
    have_bytes = free_disk_bytes(folder)
    if have_bytes < need_bytes:
        raise InsufficientResources(
            f"{purpose} needs {_gigabytes(need_bytes)} of disk, {folder} has {_gigabytes(have_bytes)} free.",
            hint="Free some space, or set CAG_HOME to a folder on a larger disk.",
            need_bytes=need_bytes,
            have_bytes=have_bytes,
            path=folder,
        )


def require_memory(need_bytes: int, purpose: str) -> None:
    """Raises: InsufficientResources, with need against have, when this machine has too little free memory."""
    have_bytes = available_memory_bytes()
    if have_bytes < need_bytes:
        raise InsufficientResources(
            f"{purpose} needs {_gigabytes(need_bytes)} of memory, {_gigabytes(have_bytes)} are available.",
            hint="Close other programs, or take a smaller model.",
            need_bytes=need_bytes,
            have_bytes=have_bytes,
        )


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, or will hold it once it exists."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
