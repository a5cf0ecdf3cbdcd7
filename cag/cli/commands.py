"""All commands of the command line, and running one of them.

Commands import what they need when they run: `cag --help` must not wait for torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cag.cli import INTERRUPTED, ask, bench, build, caches, doctor, housekeeping, models, transfer
from cag.cli.output import note, report_error
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
