"""Where a run builds: the store that was named, or one that lasts as long as the run. Knows no engine."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def store_folder(store: Path | None, beside: Path) -> Iterator[Path]:
    """`store`, or a folder in `beside` that goes when the run ends, be it by SIGTERM, as `timeout` sends it."""
    if store is not None:
        yield store
        return
    beside.mkdir(parents=True, exist_ok=True)
    with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="store-", dir=beside) as temporary:
        yield Path(temporary)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves by an exception, with the exit code that it has anyway. Only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
