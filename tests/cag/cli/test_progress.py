"""Progress: a line every tenth of the way in pipes, a bar on a terminal."""

import io
import sys

import pytest

from cag.cli.output import bytes_text, one_line, printable
from cag.cli.progress import BarProgress, LineProgress, shown_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_come_at_stages_and_tenths(capsys):
    report = LineProgress("tokens")
    for done in range(0, 2001, 10):
        report("prefill", done, 2000)
    report("commit", 2000, 2000)
    first, *tenths, last = capsys.readouterr().err.splitlines()
    assert first == "reading: 2,000 tokens, 0 % done"
    assert [line.split(" %")[0].strip() for line in tenths] == [str(percent) for percent in range(10, 101, 10)]
    assert all("tokens/s" in line and line.endswith("s left") for line in tenths)
    assert last == "storing"


def test_a_stage_that_begins_in_the_middle_counts_its_speed_from_there(capsys):
    report = LineProgress("bytes")
    report("download", 900_000_000, 1_000_000_000)
    report("download", 900_000_000, 1_000_000_000)
    assert capsys.readouterr().err == "downloading: 1.0 GB, 90 % done\n"


def test_work_of_unknown_length_is_said_once(capsys):
    report = LineProgress("bytes")
    for _ in range(3):
        report("wait", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["waiting for another pull of this model"]


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with shown_progress("tokens") as report:
        assert isinstance(report, BarProgress)
        report("prefill", 512, 2048)
        report("prefill", 1024, 2048)
        report.bar.refresh()
        (task,) = report.bar.tasks
        assert (task.completed, task.total) == (1024, 2048)
        report("measure", 2048, 2048)
        (task,) = report.bar.tasks
        assert task.total is None
    assert "1,024/2,048 tokens" in terminal.getvalue()
    assert " 50%" in terminal.getvalue()


def test_work_that_reports_nothing_shows_nothing_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with shown_progress("bytes"):
        pass
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_117_320_768, "1.1 GB"), (2.5e12, "2,500.0 GB")],
)
def test_sizes(num_bytes, text):
    assert bytes_text(num_bytes) == text


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\tc\nd\x07\x9b1m") == "a[2Jb\tc\nd1m"
    assert one_line(" a\n\n b\x1b ") == "a b"
