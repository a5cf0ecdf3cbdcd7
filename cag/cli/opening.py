"""From options to an open store, a cache's manifest and a loaded engine. The store's part imports no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cag.cli.options import given
from cag.cli.output import note_configuration
from cag.cli.progress import shown_progress
from cag.home import user_path

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


def store_at(location: str | None, cache_bytes: int | None = None) -> Store:
    """`cag.stores.open_store`, imported when it is needed."""
    from cag.stores import open_store

    return open_store(location, cache_bytes=cache_bytes)


def missing_names_translated() -> AbstractContextManager[None]:
    """`cag.stores.translated_lookup`, imported when it is needed."""
    from cag.stores import translated_lookup

    return translated_lookup()


def cache_in(store: Store, name: str) -> tuple[Ref, Manifest]:
    """`cag.stores.find_cache`, imported when it is needed."""
    from cag.stores import find_cache

    return find_cache(store, name)


def load_engine(store: Store, choice: ModelChoice, *, verbose: bool) -> Engine:
    """The engine of `choice` over `store`; a model that is not here yet is pulled, with its progress shown.

    What an earlier start of the model left is read while torch is imported.
    """
    with nothing_collected():
        engine = _loaded(store, choice)
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
        rows_stay_apart=model.rows_stay_apart,
        store=store.backend.url,
    )
    return engine


def _loaded(store: Store, choice: ModelChoice) -> Engine:
    from cag.models import DEFAULT_MODEL
    from cag.starts.begin import begin_model

    options = given(adapter=choice.adapter, device=choice.device, dtype=choice.dtype)
    name = DEFAULT_MODEL if choice.model is None else portable_model(choice.model)
    beginning = begin_model(name, **{"adapter": None, "device": "auto", "dtype": "auto"} | options)
    from cag.engine import Engine  # imports torch

    with shown_progress("bytes") as report:
        return Engine.load(name, store=store, progress=report, beginning=beginning, **options)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Nothing is looked through for garbage inside, and what is there at the end never again: libraries leave half a
    million objects behind, none of which is any. For a process that is a command's alone."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load_engine_of(store: Store, name: str, choice: ModelChoice, *, verbose: bool) -> Engine:
    """The engine that built the cache `name`, but for what `choice` says otherwise.

    Raises:
        CacheNotFound: no cache of that name, said before a model is loaded.
        ModelNotFound: the model's folder or the adapter that the cache was built with has gone.
    """
    from cag.errors import ModelNotFound

    manifest = cache_in(store, name)[1]
    built_adapter = manifest.build.get("adapter")
    adapter = choice.adapter or (Path(built_adapter) if built_adapter and isinstance(built_adapter, str) else None)
    if adapter is not None and not adapter.is_dir():
        raise ModelNotFound(
            f"cache {name!r} was built with the adapter in {adapter}, which is not there.",
            hint="Say with --adapter where it is now.",
        )
    model = choice.model or manifest.model.id
    if not choice.model and Path(model).is_absolute() and not Path(model).is_dir():
        raise ModelNotFound(
            f"cache {name!r} was built with the model in {model}, which is not there.",
            hint="Say with --model where it is now.",
        )
    whole = ModelChoice(model, adapter, choice.device, choice.dtype)
    return load_engine(store, whole, verbose=verbose)


def portable_model(model: str) -> str:
    """A model directory as an absolute path, so that its caches can be asked from any folder; other names unchanged."""
    from cag.models import CATALOGUE

    if not model or model in CATALOGUE or not user_path(model).is_dir():
        return model
    return str(user_path(model))
