"""`cag export` and `cag import`: caches between stores. No model is loaded here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cag.cli.opening import store_at
from cag.cli.options import JsonOption, NameArgument, StoreOption
from cag.cli.output import bytes_text, counted, print_json
from cag.cli.progress import shown_progress

if TYPE_CHECKING:
    from cag_store import CopyReport

RenameOption = Annotated[
    str | None, typer.Option("--name", help="What to call it there.", show_default="what it is called")
]


def export(
    name: NameArgument,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="Directory or URL (s3://, gs://, az://, file://) of the other store.")
    ],
    new_name: RenameOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache to another store, to be asked there or imported."""
    from cag.stores import export_cache

    with shown_progress("bytes") as report:
        copied = export_cache(
            store_at(store), name, destination, new_name=new_name, on_progress=lambda *amounts: report("copy", *amounts)
        )
    _print_report(copied, as_json=as_json)


def import_(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Directory or URL (s3://, gs://, az://, file://) of the other store.")
    ],
    new_name: Annotated[
        str | None, typer.Option("--name", help="What to call it here.", show_default="what it is called there")
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="Which of several caches.", show_default="the only one")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a cache from another store, every byte of it verified."""
    from cag.stores import import_cache

    with shown_progress("bytes") as report:
        copied = import_cache(
            store_at(store), source, new_name, cache=cache, on_progress=lambda *amounts: report("copy", *amounts)
        )
    _print_report(copied, as_json=as_json)


def _print_report(report: CopyReport, *, as_json: bool) -> None:
    rate = report.copied_bytes / report.seconds if report.seconds else 0.0
    if as_json:
        print_json(asdict(report) | {"bytes_per_s": round(rate)})
        return
    print(
        f"{report.name} is in {report.destination}: {counted(report.num_chunks, 'chunk')}, "
        f"{counted(report.num_documents, 'document')}"
    )
    print(
        f"  copied {bytes_text(report.copied_bytes)} in {report.seconds:.1f} s ({bytes_text(rate)}/s), "
        f"{bytes_text(report.reused_bytes)} were there already"
    )
    print(f"  digest {report.digest}")
