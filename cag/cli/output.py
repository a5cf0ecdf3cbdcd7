"""What commands print: JSON objects and tables on stdout, notes and errors on stderr. Knows no engine.

rich is imported where a table is drawn, so that the other commands start without it.
"""

from __future__ import annotations

import codecs
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from cag.cli import INTERRUPTED

BUG = "This is a bug: run it again as `cag --verbose COMMAND ...` for the traceback, and report it."
MISSING = "Install cag-engine anew, with all that it needs; `pip check` names what is missing or too old."
INTERNAL_ERROR = 1  # as `cag.errors.ERROR_TABLE` has it, which may lack the same package
PIPE_COLUMNS = 240  # width of tables where nobody looks at a terminal

_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def print_json(value: Mapping[str, Any]) -> None:
    """The one object of a command called with `--json`."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"  # text in memory has no encoding
    print(json.dumps(value, ensure_ascii=not is_utf8), flush=True)


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


class DimmedNote:
    """Text on stderr that comes in pieces, dim, and only at a terminal. `end` it before something else is printed."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._is_open = False

    def __enter__(self) -> DimmedNote:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def add(self, text: str) -> None:
        """The next piece."""
        text = printable(text) if self._is_open else printable(text).lstrip()
        if text and self._is_shown:
            print(text if self._is_open else f"\x1b[2m{text}", end="", file=sys.stderr, flush=True)
            self._is_open = True

    def end(self) -> None:
        """The next thing begins a line."""
        if self._is_open:
            print("\x1b[0m", file=sys.stderr, flush=True)
            self._is_open = False


def note_configuration(verbose: bool, **values: object) -> None:
    """With `--verbose`: the configuration that takes effect, a line each."""
    if verbose:
        for name, value in values.items():
            note(f"  {name} = {value}")


def printable(text: str) -> str:
    """`text` without control characters: what a model or a document says must not steer the terminal."""
    return text.translate(_CONTROL)


def one_line(text: str) -> str:
    """`text` for a terminal, runs of white space as one space."""
    return " ".join(printable(text).split())


def bytes_text(num_bytes: float) -> str:
    """A size in decimal units."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for power, unit in ((1e3, "kB"), (1e6, "MB")):
        if num_bytes < 1000 * power:
            return f"{num_bytes / power:.1f} {unit}"
    return f"{num_bytes / 1e9:,.1f} GB"


def counted(number: int, noun: str) -> str:
    """A number of things: `1 chunk`, `1,200 chunks`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def codec_text(codec: Mapping[str, Any]) -> str:
    """The id of a codec, then its configuration."""
    configuration = {key: value for key, value in codec.items() if key != "id"}
    return f"{codec['id']} {json.dumps(configuration) if configuration else ''}".strip()


def fidelity_text(fidelity: Mapping[str, Any]) -> str:
    """What was measured, in a line: as much of it as is there, since manifests of other versions may hold less."""
    shown = (
        ("mean_kl", "mean KL {:.6f} nats"),
        ("p95_kl", "p95 {:.6f}"),
        ("top1", "same top token {:.1%}"),
        ("num_probes", "{:,} probes"),
        ("nll_change", "NLL {:+.6f} nats"),
    )
    numbers = {name: value for name, value in fidelity.items() if isinstance(value, (int, float))}
    text = ", ".join(form.format(numbers[name]) for name, form in shown if name in numbers)
    error = numbers.get("mean_kl_se")
    return text.replace(" nats", f" (standard error {error:.6f}) nats", 1) if error and "mean_kl" in numbers else text


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> list[str]:
    """A table on stdout; the columns named in `right` are numbers. Returns those of `spare` that a terminal had no room
    for: empty ones went first, then the others in their order."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    left_out = _left_out(columns, rows, spare, console.width)
    rows = [[cell for column, cell in zip(columns, row, strict=True) if column not in left_out] for row in rows]
    columns = [column for column in columns if column not in left_out]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in right
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(table)
    return left_out


def note_left_out(columns: Sequence[str], command: str) -> None:
    """On stderr: what `print_table` had no room for, and where it is."""
    if columns:
        note(
            f"no room here for {', '.join(columns)}; `cag {command} --json` has {'it' if len(columns) == 1 else 'them'}"
        )


def _left_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], num_characters: int
) -> list[str]:
    from rich.cells import cell_len

    cells = {column: [one_line(row[place]) for row in rows] for place, column in enumerate(columns)}
    widths = {column: max(map(cell_len, (column, *cells[column]))) + 2 for column in columns}
    left_out: list[str] = []
    for column in sorted(spare, key=lambda column: any(cells[column])):
        if sum(widths.values()) - sum(widths[other] for other in left_out) - 2 > num_characters:
            left_out.append(column)
    return left_out


def print_facts(facts: Mapping[str, str]) -> None:
    """Names and values in two columns on stdout."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {one_line(value)}")


def report_error(error: BaseException, *, as_json: bool, verbose: bool) -> int:
    """Say what went wrong; returns the exit code.

    Errors of the engine and the store are said in their own words, those of the command line with its usage; of any
    other one line is said, and its traceback only when `verbose`.
    """
    facts = error_facts(error)
    if as_json:
        print_json({"error": facts})
    elif hasattr(error, "show"):
        error.show()
    else:
        if verbose and facts["code"] == "internal_error":
            traceback.print_exception(error)
        note(f"error: {printable(facts['message'])}")
        if facts["hint"]:
            note(f"hint: {printable(facts['hint'])}")
    return int(facts["exit_code"])


def error_facts(error: BaseException) -> dict[str, Any]:
    """An error as JSON has it: `code`, `message`, `hint`, `exit_code`."""
    if isinstance(error, KeyboardInterrupt):
        return _facts("interrupted", "interrupted.", "", INTERRUPTED)
    if hasattr(error, "format_message"):  # typer's own, whose class differs between its versions
        return _facts("invalid_request", error.format_message(), "", getattr(error, "exit_code", 2))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("cag"):
        return _facts("internal_error", f"the package {error.name!r} is not installed.", MISSING, INTERNAL_ERROR)

    from cag.errors import CagError, error_row
    from cag_store.errors import StoreError

    row = error_row(error)
    if isinstance(error, CagError):
        return _facts(row.code, error.message, error.hint, row.exit_code)
    if isinstance(error, StoreError):
        return _facts(row.code, error.message, "", row.exit_code)
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return _facts(row.code, message, BUG, row.exit_code)


def _facts(code: str, message: str, hint: str, exit_code: int) -> dict[str, Any]:
    return {"code": code, "message": message, "hint": hint, "exit_code": exit_code}
