"""How far a long piece of work is, on stderr: a bar on a terminal, a line every tenth of the way elsewhere.

Work that reports nothing, such as loading a model that is here already, shows nothing and waits for no library.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cag.cli.output import bytes_text, note

if TYPE_CHECKING:
    from rich.progress import Progress, Task
    from rich.text import Text

Report = Callable[[str, int, int], None]
"""`report(stage, done, total)`; may be called from a second thread; total 0 means unknown."""

Unit = Literal["tokens", "bytes"]

STAGES = {
    "reuse": "taking over stored chunks",
    "prefill": "reading",
    "calibrate": "preparing codecs",
    "basis": "calibrating the model, once",
    "encode": "encoding",
    "measure": "measuring fidelity",
    "commit": "storing",
    "wait": "waiting for another pull of this model",
    "download": "downloading",
    "assemble": "joining",
    "convert": "converting",
    "record": "checking",
    "copy": "copying",
}


@contextmanager
def shown_progress(unit: Unit) -> Iterator[Report]:
    """Show what is reported inside of the block. Amounts are of `unit`."""
    if not sys.stderr.isatty():
        yield LineProgress(unit)
        return
    report = BarProgress(unit)
    try:
        yield report
    finally:
        report.close()


@dataclass
class LineProgress:
    """A line when a stage begins, and one for each tenth of it; for logs and pipes."""

    unit: Unit
    stage: str = ""
    first_done: int = 0
    started_at: float = 0.0
    tenth: int = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `Report`."""
        if stage != self.stage:
            self.stage, self.first_done, self.started_at = stage, done, time.perf_counter()
            self.tenth = 10 * done // total if total else 0
            note(f"{STAGES.get(stage, stage)}{self._amounts(done, total)}")
        elif total and 10 * done // total > self.tenth:
            self.tenth = 10 * done // total
            note(f"  {100 * done // total} %{self._speed(done, total)}")

    def _amounts(self, done: int, total: int) -> str:
        if done >= total:
            return ""
        return f": {amount_text(total, self.unit)}, {100 * done // total} % done"

    def _speed(self, done: int, total: int) -> str:
        seconds = time.perf_counter() - self.started_at
        rate = (done - self.first_done) / seconds if seconds else 0.0
        if not rate:
            return ""
        return f", {amount_text(rate, self.unit)}/s, {(total - done) / rate:.0f} s left"


@dataclass
class BarProgress:
    """The stage in progress as a bar of rich, from the first report on; a stage that begins at its end has no measure
    and pulses."""

    unit: Unit
    stage: str = ""
    bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `Report`."""
        if self.bar is None:
            self.bar = _bar(self.unit)
            self.bar.start()
        if stage != self.stage:
            self.stage = stage
            for task_id in self.bar.task_ids:
                self.bar.remove_task(task_id)
            known = total if done < total else None
            self.bar.add_task(STAGES.get(stage, stage), total=known, completed=done)
        for task in self.bar.tasks:
            if task.total is not None:
                self.bar.update(task.id, completed=done, total=total)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.stop()


def amount_text(amount: float, unit: Unit) -> str:
    """An amount in its unit."""
    return bytes_text(amount) if unit == "bytes" else f"{amount:,.0f} tokens"


def _bar(unit: Unit) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class AmountColumn(ProgressColumn):
        """Done, of how much, at what speed."""

        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text("")
            done = amount_text(task.completed, unit).removesuffix(" tokens") + f"/{amount_text(task.total, unit)}"
            return Text(f"{done}, {amount_text(task.speed, unit)}/s" if task.speed else done, no_wrap=True)

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        AmountColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=120,
    )
