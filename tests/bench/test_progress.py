from __future__ import annotations

import io

from rich.console import Console

from cag_bench.progress import ConsoleProgress


def shown(terminal: bool, calls) -> str:
    stream = io.StringIO()
    with ConsoleProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        for call in calls:
            progress(*call)
    return stream.getvalue()


def test_without_a_terminal_there_is_a_line_each_tenth():
    lines = shown(False, [("load model", 0, 0), *(("measure", done, 40) for done in range(41))]).splitlines()
    assert lines == ["load model", *(f"measure {done}/40" for done in range(0, 41, 4))]


def test_on_a_terminal_the_bar_ends_full():
    assert "40/40" in shown(True, [("measure", done, 40) for done in range(41)])
