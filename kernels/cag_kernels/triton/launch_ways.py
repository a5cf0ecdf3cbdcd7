"""Which of several ways a launch on a CUDA device takes where all of them compute the same: the one place to choose.

The defaults are the product's; `cag bench gpu` measures the others beside them. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class LaunchWays(NamedTuple):
    """touches: attention of few rows over codes asks for its next tile while it computes one.
    joins: attention of few rows joins its parts within the launch, where there is memory to count them by.
    overlaps: a launch is set up while the one before it ends (programmatic dependent launch, compute capability 9).
    ahead_bytes: of the next product's weights that the small step before it calls into the second-level cache.
    """

    touches: bool = True
    joins: bool = True
    overlaps: bool = True
    ahead_bytes: int = 8 << 20


_ways = LaunchWays()


def launch_ways() -> LaunchWays:
    """The ways of launches from now on."""
    return _ways


@contextmanager
def launching(ways: LaunchWays) -> Iterator[None]:
    """Launches of this process take these ways meanwhile; those of a recording keep the ways it was made with."""
    global _ways
    before, _ways = _ways, ways
    try:
        yield
    finally:
        _ways = before
