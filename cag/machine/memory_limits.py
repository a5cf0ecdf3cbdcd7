"""How much memory this process may take: the machine's, or a container's where that is less.

Byte counts only: knows neither what is loaded nor what the C library keeps (`cag.machine.allocator`).
"""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_FOLDER = Path("/sys/fs/cgroup")


def total_memory_bytes() -> int:
    """All memory of the machine, or the limit of this container."""
    total = int(psutil.virtual_memory().total)
    limit = _cgroup_number("memory.max")
    return total if limit is None else min(total, limit)


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or what is left of this container's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is None or used is None:
        return available
    return min(available, max(0, limit - used + _cgroup_file_bytes()))


def _cgroup_number(name: str) -> int | None:
    """What a file of the container's cgroup says; None without cgroup version 2, and where there is no limit."""
    try:
        return int((CGROUP_FOLDER / name).read_text())
    except (OSError, ValueError):  # `memory.max` says "max"
        return None


def _cgroup_file_bytes() -> int:
    # Page cache counts as used in a container, though the kernel drops it when memory is asked for.
    try:
        lines = (CGROUP_FOLDER / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
