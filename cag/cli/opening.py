"""From options to an open store, a cache's manifest and a loaded engine. The store's part imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cag.cli.options import given
from cag.cli.output import note_configuration
from cag.cli.progress import shown_progress

if TYPE_CHECKING:
    from cag.engine import Engine
    from cag_store import Manifest, Ref, Store


@dataclass(frozen=True)
class ModelChoice:
    """What the options say of the model; None leaves it to the cache or to the engine's default."""

    model: str | None = None
    adapter: Path | None = None
    device: str | None = None
    dtype: str | None = None


def store_at(directory: Path | None) -> Store:
    """The store in `directory`, or the user's own. Raises: UnsupportedFormat."""
    from cag.home import cag_home
    from cag_store import Store

    return Store.open(directory.expanduser().absolute() if directory is not None else cag_home() / "store")


@contextmanager
def missing_names_translated() -> Iterator[None]:
    """Around calls of the store with a cache's name. Raises: CacheNotFound where the store raises EntryNotFound."""
    from cag.errors import CacheNotFound
    from cag_store.errors import EntryNotFound

    try:
        yield
    except EntryNotFound as error:
        raise CacheNotFound(f"{error}.", hint="`cag ls` lists caches, `cag build` makes one.") from error


def cache_in(store: Store, name: str) -> tuple[Ref, Manifest]:
    """What `name` means now. Raises: CacheNotFound, also for an expired one; CorruptEntry, InvalidName."""
    with missing_names_translated():
        return store.resolve(name)


def load_engine(store: Store, choice: ModelChoice, *, verbose: bool) -> Engine:
    """The engine of `choice` over `store`; a model that is not here yet is pulled, with its progress shown."""
    from cag.engine import Engine

    with shown_progress("bytes") as report:
        engine = Engine.load(
            store=store,
            progress=report,
            **given(
                model=portable_model(choice.model), adapter=choice.adapter, device=choice.device, dtype=choice.dtype
            ),
        )
    model = engine.model
    note_configuration(
        verbose,
        model=model.model_id,
        adapter=model.adapter,
        device=model.device,
        compute_dtype=model.compute_dtype,
        kv_dtype=model.kv_dtype,
        window_tokens=model.window_tokens,
        threads=f"{model.plan.threads_small} for a question, {model.plan.threads_large} for prefill",
        reason=model.plan.reason,
        store=store.backend.url,
    )
    return engine


def load_engine_of(store: Store, name: str, choice: ModelChoice, *, verbose: bool) -> Engine:
    """The engine that built the cache `name`, but for what `choice` says otherwise.

    Raises:
        CacheNotFound: no cache of that name, said before a model is loaded.
        ModelNotFound: the adapter that the cache was built with has gone.
    """
    from cag.errors import ModelNotFound

    manifest = cache_in(store, name)[1]
    built_adapter = manifest.build.get("adapter")
    adapter = choice.adapter or (Path(built_adapter) if built_adapter else None)
    if adapter is not None and not adapter.is_dir():
        raise ModelNotFound(
            f"cache {name!r} was built with the adapter in {adapter}, which is not there.",
            hint="Say with --adapter where it is now.",
        )
    whole = ModelChoice(choice.model or manifest.model.id, adapter, choice.device, choice.dtype)
    return load_engine(store, whole, verbose=verbose)


def portable_model(model: str | None) -> str | None:
    """A model directory as an absolute path, so that its caches can be asked from any folder; other names unchanged."""
    from cag.models import CATALOGUE

    if model is None or model in CATALOGUE or not Path(model).expanduser().is_dir():
        return model
    return str(Path(model).expanduser().absolute())
