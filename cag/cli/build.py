"""`cag build` and `cag update`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

import typer

from cag.cli.housekeeping import keep_below
from cag.cli.opening import ModelChoice, load_engine, load_engine_of, store_at
from cag.cli.options import (
    AdapterOption,
    BuildersModelOption,
    CodecOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    MaxBytesOption,
    NameArgument,
    PathsArgument,
    SkipErrorsOption,
    StoreOption,
    TtlOption,
    VerboseOption,
    given,
)
from cag.cli.output import (
    bytes_text,
    codec_text,
    counted,
    fidelity_text,
    note,
    note_configuration,
    one_line,
    print_json,
)
from cag.cli.progress import Report, shown_progress

if TYPE_CHECKING:
    from cag.building.options import BuildProgress, BuildReport
    from cag.corpus import CorpusReport


def build(
    paths: PathsArgument,
    name: Annotated[str, typer.Option("--name", help="What to call the cache; an older one of that name is replaced.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Catalogue name, hub id, or path of a model directory or GGUF file.",
            show_default="qwen2.5-coder-1.5b-instruct",
        ),
    ] = None,
    codec: CodecOption = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            help="Refuse a cache whose answers diverge more from the uncompressed one's: mean KL in nats.",
            show_default="0.005 for auto",
            min=0.0,
        ),
    ] = None,
    force: ForceOption = False,
    system: Annotated[
        str | None, typer.Option("--system", help="Instruction above the documents.", show_default="the engine's")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    ttl: TtlOption = None,
    max_bytes: MaxBytesOption = None,
    skip_errors: SkipErrorsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Read documents, prefill, compress, store."""
    import cag_store

    cag_store.checked_name(name)
    if codec is not None:
        from cag.building.options import check_codec

        check_codec(codec)
    corpus = _corpus_of(paths, skip_errors)
    engine = load_engine(store_at(store), ModelChoice(model, adapter, device, dtype), verbose=verbose)
    options = given(codec=codec, max_kl=max_kl, force=force or None, system_text=system, ttl_s=ttl)
    note_configuration(verbose, skip_errors=skip_errors, **options)
    with shown_progress("tokens") as report:
        built = engine.build(
            corpus,
            name=name,
            on_progress=lambda progress: _tell(report, progress),
            **options,
        )
    keep_below(engine.store, max_bytes, name)
    _print_report(built, as_json=as_json)


def update(
    name: NameArgument,
    paths: PathsArgument,
    model: BuildersModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    ttl: TtlOption = None,
    max_bytes: MaxBytesOption = None,
    force: ForceOption = False,
    skip_errors: SkipErrorsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Rebuild a cache from the first changed document on.

    PATHs are all of its documents: those that they no longer name go.
    """
    from cag.stores import find_cache, known_documents

    opened = store_at(store)
    known = known_documents(find_cache(opened, name)[1])
    corpus = _corpus_of(paths, skip_errors, known)
    engine = load_engine_of(opened, name, ModelChoice(model, adapter, device, dtype), verbose=verbose)
    options = given(ttl_s=ttl, force=force or None)
    with shown_progress("tokens") as report:
        built = engine.update(name, corpus, on_progress=lambda progress: _tell(report, progress), **options)
    keep_below(engine.store, max_bytes, name)
    _print_report(built, as_json=as_json)


def _corpus_of(paths: list[str], skip_errors: bool, known: Collection[tuple[str, str]] = ()) -> CorpusReport:
    """The documents. Raises: as `load_corpus`, with what this command can do about it."""
    from cag.corpus import load_corpus
    from cag.errors import UnreadableDocument

    try:
        return load_corpus(paths, skip_errors=skip_errors, known=known)
    except UnreadableDocument as error:
        hint = f"{error.hint} --skip-errors goes on without it, and says so.".strip()
        raise UnreadableDocument(error.message, hint=hint, **error.facts) from error


def _tell(report: Report, progress: BuildProgress) -> None:
    unmeasured = progress.stage == "calibrate"  # a model's basis may have to be made: minutes, not tokens
    report(progress.stage, progress.done_tokens, 0 if unmeasured else progress.total_tokens)


def _print_report(report: BuildReport, *, as_json: bool) -> None:
    """What was done on stdout; what was left out of the corpus on stderr."""
    for path, first in report.duplicates:
        note(f"duplicate: {one_line(path)} has the text of {one_line(first)}")
    for path in report.empty:
        note(f"empty: {one_line(path)}")
    for path, reason in report.skipped:
        note(f"skipped: {one_line(path)}: {one_line(reason)}")
    for change in ("added", "changed", "removed"):
        for doc_id in getattr(report, change):
            note(f"{change}: {one_line(doc_id)}")
    for warning in report.fidelity.warnings:
        note(f"warning: {warning}")
    if as_json:
        print_json(report.to_json())
        return
    ratio = report.raw_bytes / report.stored_bytes
    rate = f", {report.computed_tokens / report.prefill_s:,.0f} tokens/s" if report.computed_tokens else ""
    print(f"{report.name}: {report.num_tokens:,} tokens of {counted(report.num_documents, 'document')}")
    print(f"  tokens    {report.reused_tokens:,} reused, {report.computed_tokens:,} computed")
    if report.recomputed_tokens:
        print(
            f"            {report.recomputed_tokens:,} were computed again: of these only lossy chunks were left, and "
            "nothing is computed behind those"
        )
    print(f"  codec     {codec_text(report.codec)}")
    if report.codec_choice is not None:
        print(f"            {one_line(report.codec_choice['reason'])}")
    print(f"  size      {bytes_text(report.raw_bytes)} -> {bytes_text(report.stored_bytes)} ({ratio:.2f}x)")
    print(f"  fidelity  {fidelity_text(report.fidelity.to_json())}")
    search = f"; search {report.search_s:.1f} s" if report.codec_choice is not None else ""
    print(
        f"  time      {report.total_s:.1f} s (prefill {report.prefill_s:.1f} s{rate}; encode {report.encode_s:.1f} s; "
        f"fidelity {report.measure_s:.1f} s{search})"
    )
    print(f"  digest    {report.digest}")
