"""The command line: `cag`. Arguments in, calls of the engine, text or one JSON object and an exit code out.

Only what any interpreter has loaded is imported here, so that Ctrl-C finds `main` waiting for it from the start.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys

TYPE_CHECKING = False  # `typing` takes longer than all of this
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: run `arguments` (those of the process if None) and exit with the code of what happened."""
    try:
        _open_standard_streams()
        atexit.register(gc.freeze)  # the interpreter need not look for garbage in what is about to go
        code = _import_commands().run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:  # just before a command, or again while one says that it was interrupted
        code = INTERRUPTED
    sys.exit(code)


def _import_commands() -> ModuleType:
    """`cag.cli.commands`. Ctrl-C meanwhile ends the process without a word: nothing has begun, and an exception in the
    midst of an import may be lost, or be told as another one."""
    import signal

    is_heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a shell's background jobs
    if is_heeded:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from cag.cli import commands

    if is_heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return commands


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
