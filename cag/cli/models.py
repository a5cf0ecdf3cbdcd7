"""`cag pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from cag.cli.opening import portable_model
from cag.cli.options import JsonOption, VerboseOption
from cag.cli.output import bytes_text, note_configuration, print_json
from cag.cli.progress import shown_progress


def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Catalogue name, hub id, or path of a model directory or GGUF file.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Pull again, even when the model is here.")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Fetch a model: a catalogue name, a hub id, or a local path."""
    from cag.home import cag_home
    from cag.models import fetch_model
    from cag.models.progress import folder_bytes

    note_configuration(verbose, model=model, home=cag_home())
    with shown_progress("bytes") as report:
        files = fetch_model(portable_model(model), progress=report, force=force)
    num_bytes = folder_bytes(files.directory)
    if as_json:
        print_json(
            {"name": files.name, "directory": str(files.directory), "source": files.source, "num_bytes": num_bytes}
        )
    else:
        print(f"{files.name} ({files.source}, {bytes_text(num_bytes)}) is in {files.directory}")
