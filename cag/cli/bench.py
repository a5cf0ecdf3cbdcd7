"""`cag bench`: hands its arguments to `cag_bench.cli`, which is imported only then: `cag --help` stays quick."""

from __future__ import annotations

import typer

PASS_ALL = {"allow_extra_args": True, "ignore_unknown_options": True}


def bench(context: typer.Context) -> None:
    """The benchmark suite: speed, beside the quality of the same run."""
    from cag_bench.cli import app

    result = app(context.args, prog_name=context.command_path, standalone_mode=False)
    if isinstance(result, int):
        raise typer.Exit(result)
