"""Disk and memory, asked for before the work starts. Knows byte counts, not models."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from cag.errors import InsufficientResources

CGROUP_FOLDER = Path("/sys/fs/cgroup")


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


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or what is left of this container's limit."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((CGROUP_FOLDER / "memory.max").read_text())
        used = int((CGROUP_FOLDER / "memory.current").read_text())
        cached = _cgroup_file_bytes()
    except (OSError, ValueError):
        return available  # no cgroup version 2, or no limit ("max")
    return min(available, max(0, limit - used + cached))


def _cgroup_file_bytes() -> int:
    # Page cache counts as used in a container, though the kernel drops it when memory is asked for.
    for line in (CGROUP_FOLDER / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
