"""How far a run is, on standard error: a bar on a terminal, a line each tenth of the way elsewhere."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ConsoleProgress:
    """Callable as `progress(stage, done, total)`, from any thread; total 0 means unknown. A context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TimeRemainingColumn(), console=self._console)
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> ConsoleProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage are done."""
        with self._lock:
            if self._console.is_terminal:
                self._show_bar(stage, done, total)
            else:
                self._show_line(stage, done, total)

    def _show_bar(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)

    def _show_line(self, stage: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        if self._tenths.get(stage) != tenth:
            self._tenths[stage] = tenth
            self._console.print(f"{stage} {done}/{total}" if total else stage, markup=False, highlight=False)
