"""The errors of the benchmark; everything else that goes wrong raises the engine's own.

BenchError (cag.errors.CagError)
├── KernelWrong (ArithmeticError)       a kernel's result is not its reference's, so it was not timed
├── PeerError                           another engine that was to be compared with
│   ├── PeerDied (RuntimeError)         its process ended, or never started
│   ├── PeerRefused (RuntimeError)      it answered with an error of its own
│   ├── PeerTimeout (TimeoutError)      it did not answer in time
│   └── PeerNonsense (ValueError)       it answered what the protocol does not know
├── PrefixRecomputed (RuntimeError)     an arm that stands for a cache computed tokens that the cache should have served
└── WrongValues (RuntimeError)          a load gave back other keys and values than decoding in memory
"""

from __future__ import annotations

from cag.errors import CagError


class BenchError(CagError):
    """A run whose figures would not mean what they say."""


class PrefixRecomputed(BenchError, RuntimeError):
    """A cached arm computed prefix tokens, or its counts do not add up. Facts: `arm`, `expected`, `found`."""


class KernelWrong(BenchError, ArithmeticError):
    """A kernel is off by more than its arithmetic explains."""


class WrongValues(BenchError, RuntimeError):
    """A load is not what was decoded from memory. Facts: `codec`, `layer`."""


class PeerError(BenchError):
    """Another engine failed in the comparison. Facts: `peer`, and `log`: the file with what it printed."""


class PeerDied(PeerError, RuntimeError):
    """The peer's process ended, or never started."""


class PeerRefused(PeerError, RuntimeError):
    """The peer answered with an error of its own."""


class PeerTimeout(PeerError, TimeoutError):
    """The peer did not answer in time, and was ended."""


class PeerNonsense(PeerError, ValueError):
    """The peer answered what the protocol does not know."""
