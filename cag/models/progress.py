"""How work on a model says how far it is: a callable, and a watcher for work whose bytes appear in a folder.

Stages of a pull, in order: `wait` (another process pulls the same model), `download`, `assemble`, `convert`, `record`;
a calibration has one, `basis`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)` in bytes, of a calibration in tokens; may be called from a second thread; total 0 is
unknown."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """The progress of callers that asked for none."""


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; files that vanish meanwhile count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total


@contextmanager
def watching(folder: Path, report: Callable[[int], None], interval_s: float = 0.5) -> Iterator[None]:
    """Calls `report(bytes in folder)` every `interval_s` from a second thread while the body runs."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            report(folder_bytes(folder))

    thread = threading.Thread(target=watch, name="cag-pull-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
