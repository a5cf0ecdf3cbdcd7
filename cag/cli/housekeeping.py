"""`cag ls` and `gc`: what a store holds, and what goes from it. No model is loaded here."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cag.cli.opening import store_at
from cag.cli.options import CacheBytesOption, JsonOption, MaxBytesOption, StoreOption, given
from cag.cli.output import (
    bytes_text,
    counted,
    error_facts,
    note,
    note_left_out,
    one_line,
    print_json,
    print_table,
)
from cag.cli.quantities import duration_text

if TYPE_CHECKING:
    from cag_store import CacheUsage, Eviction, GcReport, Store

LIST_COLUMNS = (
    "name", "tokens", "documents", "model", "codec", "stored", "own", "ratio", "created", "machine", "used", "pinned",
    "expires",
)  # fmt: skip
LIST_SPARE = ("machine", "created", "own", "ratio", "used", "documents", "pinned", "expires")  # goes first, ..., last
LIST_NUMBERS = ("tokens", "documents", "stored", "own", "ratio")


def ls(store: StoreOption = None, cache_bytes: CacheBytesOption = None, as_json: JsonOption = False) -> None:
    """List caches with sizes, origin and last use.

    Damaged and expired ones are listed too.
    """
    opened = store_at(store, cache_bytes)
    usage = opened.usage()
    caches = [_listed(opened, name, usage.caches.get(name)) for name in opened.names()]
    if as_json:
        totals = {"num_caches": len(caches), "held_bytes": usage.held_bytes, "total_bytes": usage.total_bytes}
        print_json({"store": opened.backend.url, "caches": caches, "totals": totals})
        return
    if caches:
        rows = [_list_row(cache) for cache in caches]
        left_out = print_table(LIST_COLUMNS, rows, right=LIST_NUMBERS, spare=LIST_SPARE)
        note_left_out(left_out, "ls")
        loose = usage.total_bytes - usage.held_bytes
        rest = f", {bytes_text(loose)} that no readable cache holds" if loose else ""
        note(f"{counted(len(caches), 'cache')} hold{'s' * (len(caches) == 1)} {bytes_text(usage.held_bytes)}{rest}")
    else:
        note(f"no caches in {opened.backend.url}; `cag build` makes one")
    for cache in caches:
        if cache["damaged"]:
            note(f"{cache['name']}: {one_line(cache['error']['message'])}")


def _listed(store: Store, name: str, usage: CacheUsage | None) -> dict[str, Any]:
    """One cache of the list; one that cannot be read has `error` in place of its facts."""
    from cag.describe import summarize_cache
    from cag_store import utc_now, utc_text
    from cag_store.errors import StoreError

    try:
        ref = store.ref(name)
        manifest = store.manifest(ref.manifest)
    except StoreError as error:
        return {"name": name, "damaged": True, "error": error_facts(error)}
    origin = {"machine": dict(manifest.machine)}
    use = {
        "own_bytes": usage and usage.own_bytes,
        "shared_bytes": usage and usage.shared_bytes,
        "last_used_at": usage and utc_text(usage.last_used_s),
    }
    return summarize_cache(ref, manifest) | origin | use | {"expired": ref.expired(utc_now()), "damaged": False}


def _list_row(cache: dict[str, Any]) -> tuple[str, ...]:
    if cache["damaged"]:
        return (cache["name"], "damaged", *[""] * (len(LIST_COLUMNS) - 2))
    expires = cache["expires_at"] or ""
    return (
        cache["name"],
        f"{cache['num_tokens']:,}",
        f"{cache['num_documents']:,}",
        cache["model"]["id"],
        cache["codec"]["id"],
        bytes_text(cache["stored_bytes"]),
        "" if cache["own_bytes"] is None else bytes_text(cache["own_bytes"]),
        f"{cache['raw_over_stored']:.2f}",
        cache["created_at"],
        str(cache["machine"].get("processor", "")),
        cache["last_used_at"] or "",
        "yes" if cache["pinned"] else "",
        f"{expires} (expired)" if cache["expired"] else expires,
    )


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    grace_seconds: Annotated[
        float | None,
        typer.Option("--grace-seconds", help="Keep what is younger than this.", show_default="3600", min=0.0),
    ] = None,
    max_bytes: MaxBytesOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Free what no cache, pin or open reader holds.

    With --max-bytes, caches of least worth are evicted until the store fits. The worth of a cache's byte: seconds to
    rebuild the cache, over its bytes, over the seconds since its last use. Caches that are pinned or being read stay.
    """
    report = store_at(store).gc(dry_run=dry_run, max_bytes=max_bytes, **given(grace_s=grace_seconds))
    if as_json:
        print_json(asdict(report))
        return
    for name in report.expired:
        print(f"expired {name}")
    for eviction in report.evicted:
        print(_eviction_text(eviction))
    for path in report.removed:
        print(path)
    files = counted(len(report.removed), "file")
    print(f"{'would free' if dry_run else 'freed'} {bytes_text(report.removed_bytes)} in {files}")
    if report.kept_unreferenced:
        why = "a build is running" if report.build_running else "younger than the grace time"
        print(f"kept {counted(report.kept_unreferenced, 'unreferenced file')}: {why}")
    _note_excess(report)


def keep_below(store: Store, max_bytes: int | None, name: str) -> None:
    """After a build of `name`: evict other caches until the store fits `max_bytes`, and say which on stderr."""
    from cag_store.errors import StoreError

    if max_bytes is None:
        return
    try:
        report = store.gc(max_bytes=max_bytes, keep=[name])
    except StoreError as error:  # the build itself has succeeded
        note(f"--max-bytes has no effect: {one_line(str(error))}")
        return
    for eviction in report.evicted:
        note(_eviction_text(eviction))
    _note_excess(report)


def _eviction_text(eviction: Eviction) -> str:
    return (
        f"evicted {eviction.name}: frees {bytes_text(eviction.freed_bytes)} of {bytes_text(eviction.total_bytes)}, "
        f"unused for {duration_text(eviction.idle_s)}, {duration_text(eviction.rebuild_s)} to rebuild"
    )


def _note_excess(report: GcReport) -> None:
    if report.over_bytes and report.max_bytes is not None:
        why = "a build is running" if report.build_running else "the rest is pinned, in use or new"
        note(
            f"the store holds {bytes_text(report.kept_bytes)}, {bytes_text(report.over_bytes)} more than "
            f"{bytes_text(report.max_bytes)}: {why}"
        )
