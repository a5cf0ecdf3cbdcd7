"""`cag show`, `verify`, `rm`, `pin`, `unpin`, `expire`: one cache of a store. No model is loaded here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cag.cli.opening import cache_in, missing_names_translated, store_at
from cag.cli.options import CacheBytesOption, JsonOption, NameArgument, StoreOption
from cag.cli.output import (
    bytes_text,
    codec_text,
    counted,
    error_facts,
    fidelity_text,
    note,
    note_left_out,
    one_line,
    print_facts,
    print_json,
    print_table,
)
from cag.cli.quantities import duration_s

if TYPE_CHECKING:
    from cag_store import Ref, Store, VerifyReport

NEVER = "never"


def show(
    name: NameArgument, store: StoreOption = None, cache_bytes: CacheBytesOption = None, as_json: JsonOption = False
) -> None:
    """Show all about a cache, with its documents."""
    from cag.describe import describe_cache

    cache = describe_cache(*cache_in(store_at(store, cache_bytes), name))
    if as_json:
        print_json(cache)
        return
    print_facts(_shown_facts(cache))
    print()
    left_out = print_table(
        ("document", "title", "tokens", "path"),
        [(d["doc_id"], d["title"], f"{d['end'] - d['start']:,}", d["path"]) for d in cache["documents"]],
        right=("tokens",),
        spare=("path", "title"),
    )
    note_left_out(left_out, "show")


def _shown_facts(cache: dict[str, Any]) -> dict[str, str]:
    choice = cache["codec_choice"]
    chosen = {"chosen": choice["reason"]} if choice is not None else {}
    return {
        "name": cache["name"],
        "digest": cache["digest"],
        "created": cache["created_at"],
        "model": f"{cache['model']['id']} ({cache['model']['fingerprint'][:12]})",
        "tokens": f"{cache['num_tokens']:,}",
        "documents": f"{cache['num_documents']:,}",
        "codec": codec_text(cache["codec"]),
        **chosen,
        "size": f"{bytes_text(cache['raw_bytes'])} -> {bytes_text(cache['stored_bytes'])} "
        f"({cache['raw_over_stored']:.2f}x)",
        **({"a session": f"{bytes_text(cache['state_bytes'])} of states"} if cache["state_bytes"] else {}),
        "fidelity": fidelity_text(cache["fidelity"]) if cache["fidelity"] else "not measured",
        **({"warning": "; ".join(cache["warnings"])} if cache["warnings"] else {}),
        "pinned": "yes" if cache["pinned"] else "no",
        "expires": cache["expires_at"] or NEVER,
    }


def verify(name: NameArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Read and check every byte of a cache."""
    from cag_store.errors import CorruptEntry

    with missing_names_translated():
        report = store_at(store).verify(name)
    damage = CorruptEntry(f"cache {name!r} is damaged: {counted(len(report.problems), 'problem')}; build it again")
    if as_json:
        print_json(_verified(report) if report.ok else _verified(report) | {"error": error_facts(damage)})
    else:
        for problem in report.problems:
            note(f"damage: {one_line(str(problem))}")
        print(
            f"{name}: {'whole' if report.ok else 'damaged'}; {bytes_text(report.bytes_read)} in "
            f"{counted(report.num_chunks, 'chunk')} and {counted(report.num_blobs, 'text')} read in "
            f"{report.seconds:.2f} s"
        )
    if not report.ok:
        raise typer.Exit(error_facts(damage)["exit_code"])


def _verified(report: VerifyReport) -> dict[str, Any]:
    return asdict(report) | {"ok": report.ok, "problems": [error_facts(problem) for problem in report.problems]}


def rm(
    name: NameArgument,
    force: Annotated[bool, typer.Option("--force", help="Also when it is pinned.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a cache; `cag gc` frees what only it held."""
    opened = store_at(store)
    freeable = _freeable_bytes(opened, name)
    with missing_names_translated():
        opened.remove(name, force=force)
    if as_json:
        print_json({"name": name, "removed": True, "freeable_bytes": freeable})
        return
    amount = "what only it held" if freeable is None else bytes_text(freeable)
    print(f"removed {name}; `cag gc` will free {amount} once that is older than its grace time")


def _freeable_bytes(store: Store, name: str) -> int | None:
    """Bytes that only the cache `name` holds; None when a damaged ref or manifest hides who holds what."""
    from cag_store.errors import StoreError

    try:
        manifests = {ref.name: store.manifest(ref.manifest) for ref in store.refs()}
        own = manifests.pop(name)
        held_chunks = {path for manifest in manifests.values() for path in manifest.chunk_sizes}
        held_blobs = {digest for manifest in manifests.values() for digest in manifest.blob_digests}
        chunk_bytes = sum(size for path, size in own.chunk_sizes.items() if path not in held_chunks)
        return chunk_bytes + store.blob_bytes(set(own.blob_digests) - held_blobs)
    except (StoreError, KeyError):
        return None


def pin(name: NameArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Keep a cache from expiry and from `cag rm`."""
    _change(store_at(store), name, lambda opened: opened.pin(name), as_json=as_json)


def unpin(name: NameArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Undo `cag pin`."""
    _change(store_at(store), name, lambda opened: opened.unpin(name), as_json=as_json)


def expire(
    name: NameArgument,
    after: Annotated[
        str, typer.Argument(metavar="DURATION", help="From now: 90s, 30m, 12h, 7d, 2w; or never.", show_default=False)
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a cache expire after a while, or never.

    One that has expired already comes back, as long as `cag gc` has not run.
    """
    ttl_s = None if after == NEVER else duration_s(after)
    _change(store_at(store), name, lambda opened: opened.set_ttl(name, ttl_s), as_json=as_json)


def _change(store: Store, name: str, change: Callable[[Store], Ref], *, as_json: bool) -> None:
    with missing_names_translated():
        ref = change(store)
    if as_json:
        print_json({"name": name, "digest": ref.manifest, "pinned": ref.pinned, "expires_at": ref.expires_at})
    else:
        pinned = "pinned" if ref.pinned else "not pinned"
        expires = f"expires at {ref.expires_at}" if ref.expires_at else "never expires"
        print(f"{name} is {pinned} and {expires}{', once it is unpinned' if ref.pinned and ref.expires_at else ''}")
