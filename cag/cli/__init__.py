"""The command line: `cag`. Arguments in, calls of the engine, text or one JSON object and an exit code out.

Commands import what they need when they run: `cag --help` must not wait for torch.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from cag.cli import ask, bench, build, caches, doctor, housekeeping, models, transfer
from cag.cli.output import INTERRUPTED, note, report_error
from cag.cli.serve import serve

NO_STDOUT = 1  # what typer, too, exits with

app = typer.Typer(
    name="cag",
    help="Cache-augmented generation: read a body of text once, answer questions right behind it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from cag.machine.versions import ENGINE, installed_version

        print(f"cag {installed_version(ENGINE)}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the effective configuration, and the traceback of a bug.")
    ] = False,
    version: Annotated[  # noqa: ARG001  (its callback prints and exits)
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if verbose and context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {"verbose": True}}


app.command()(models.pull)
app.command()(build.build)
app.command()(build.update)
app.command()(ask.ask)
app.command()(ask.chat)
app.command()(housekeeping.ls)
app.command()(caches.show)
app.command()(caches.verify)
app.command()(caches.rm)
app.command()(housekeeping.gc)
app.command()(caches.pin)
app.command()(caches.unpin)
app.command()(caches.expire)
app.command()(transfer.export)
app.command("import")(transfer.import_)
app.command()(serve)
app.command(context_settings=bench.PASS_ALL, add_help_option=False)(bench.bench)
app.command()(doctor.doctor)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: run `arguments` (those of the process if None) and exit with the code of what happened."""
    _open_standard_streams()
    atexit.register(gc.freeze)  # the interpreter need not look for garbage in what is about to go
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def _open_standard_streams() -> None:
    """What the caller has closed (`>&-`) becomes a file without end and bottom: another file that is opened later must
    not get its number, and with it what is printed. stdout gets a buffer where the environment asked for none: one
    keeps what could not be written, so that `run` can tell whose error it is. A character that its encoding lacks is
    written as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  (takes the lowest number; for good)
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stdout.buffer, io.RawIOBase):
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(sys.stdout.detach()), encoding, errors, line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def run(arguments: list[str]) -> int:
    """Run one command line and say what went wrong, if anything did.

    Returns:
        0; the exit code of the error's class in `cag.errors.ERROR_TABLE`; 130 for Ctrl-C; 1 when stdout takes no
        more, and not a word when that is because nobody reads it.
    """
    try:
        return _run(arguments)
    except OSError as error:  # only stdout's come here
        # The interpreter flushes once more at its end, and must not fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            note(f"error: cannot write to stdout: {error.strerror}.")
        return NO_STDOUT


def _run(arguments: list[str]) -> int:
    flags = arguments[: arguments.index("--")] if "--" in arguments else arguments
    said = {"as_json": "--json" in flags, "verbose": "--verbose" in flags}
    try:
        result = app(arguments or ["--help"], prog_name="cag", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except typer.Abort:
        result = INTERRUPTED
    except Exception as error:
        sys.stdout.flush()  # what stdout did not take the first time, it does not take now
        return report_error(error, **said)
    if result == INTERRUPTED:  # typer turns Ctrl-C into this number, or into Abort
        return report_error(KeyboardInterrupt(), **said)
    return result if isinstance(result, int) else 0
