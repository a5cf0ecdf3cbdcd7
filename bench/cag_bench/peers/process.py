"""A peer's process: requests in, answers out, one at a time, each with a limit of time.

Knows the framing of the protocol (`scripts/peer_loop.py`), not what requests and answers mean.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cag_bench.errors import PeerDied, PeerError, PeerNonsense, PeerRefused, PeerTimeout

READ_BYTES = 1 << 16
LOG_LINES = 5  # of the peer's own words in an error
ENDING_S = 10.0  # for a peer to end by itself
OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # would lead the peer's Python to our packages
IDLE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "12000"}  # as `cag` sets it for itself


class PeerProcess:
    """A running peer. A context manager: leaving it ends the process.

    Attributes:
        name: in errors and rows.
        log: file that holds what the peer prints.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, num_threads: int) -> None:
        """Start `command`. Raises: `PeerDied` if it cannot be started."""
        self.name = name
        self.log = log
        self._buffer = b""
        with log.open("wb") as messages:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    env=peer_environment(os.environ, num_threads),
                )
            except OSError as error:
                raise self._failed(PeerDied, f"cannot be started: {error}") from error

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def request(self, content: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to one request. Raises: `PeerError`, by what went wrong."""
        self.send(content)
        return self.receive(timeout_s)

    def send(self, content: Mapping[str, Any]) -> None:
        """Ask without waiting, so that several peers can work at once. Raises: `PeerDied`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to what was sent. Raises: `PeerError`."""
        line = self._line(time.monotonic() + timeout_s, timeout_s)
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise self.nonsense(f"answered no JSON: {line[:80]!r}") from error
        if not isinstance(answer, dict):
            raise self.nonsense(f"answered {line[:80]!r}, no object")
        if "error" in answer:
            raise self._failed(PeerRefused, f"answered: {answer['error']}")
        return answer

    def nonsense(self, what: str) -> PeerError:
        """The error for an answer that cannot be understood."""
        return self._failed(PeerNonsense, what)

    def close(self) -> None:
        """End the process: asked first, then killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):  # it was gone already
            self._process.stdin.close()
        try:
            self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _line(self, until: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._process.kill()
                raise self._failed(PeerTimeout, f"did not answer within {timeout_s:g} s")
            read = os.read(descriptor, READ_BYTES)
            if not read:
                raise self._died()
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _died(self) -> PeerError:
        try:
            code = self._process.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            return self._failed(PeerDied, "closed its output")
        return self._failed(PeerDied, f"ended with code {code}")

    def _failed(self, kind: type[PeerError], what: str) -> PeerError:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().split("\n") if self.log.exists() else []
        words = "\n".join(lines[-LOG_LINES:])
        hint = f"Its last words:\n{words}" if words else ""
        return kind(f"peer {self.name} {what}.", hint=hint, peer=self.name, log=str(self.log))


def peer_environment(environment: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """Ours without what leads to our packages, with as many threads as cores, which sleep soon when they are idle."""
    kept = {name: value for name, value in environment.items() if name not in OURS}
    return kept | IDLE | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
