"""The engine: one model, one store, and the caches that are open. Straight lists of calls to the stages before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cag_store
from cag.building.builder import build_cache
from cag.building.options import BuildOptions, BuildProgress, BuildReport
from cag.building.updates import update_options
from cag.corpus import CorpusReport, Document, load_corpus
from cag.errors import InsufficientResources, UsageError
from cag.forward.recurrent import States
from cag.generation.answer import Answer
from cag.generation.generate import SamplingOptions
from cag.identity import check_fingerprints, check_prompt, check_tokens, check_weights
from cag.machine.memory_limits import total_memory_bytes
from cag.machine.runtime import choose_device, plan_runtime, usable_cores
from cag.model import LanguageModel, ModelOptions
from cag.models import DEFAULT_MODEL, fetch_model
from cag.open_caches import OpenCache, OpenCaches
from cag.prefix import Prefix
from cag.residency.host_copies import HostCopies
from cag.residency.load_plan import LoadPlan, plan_load
from cag.residency.recurrent import loaded_states
from cag.residency.resident import ResidentPrefix
from cag.short_model import with_rope
from cag.starts.begin import Beginning
from cag.stores import export_cache, find_cache, import_cache, known_documents, open_store, translated_lookup
from cag_kernels import warm_up_largest
from cag_store import CacheReader, CopyReport, Manifest, Ref, Store, check_states
from cag_store.codecs import warm_up
from cag_store.errors import CorruptEntry

HOST_SHARE = 4  # of the host's memory, the part that copies of caches may take beside a GPU


class Engine:
    """Builds caches and answers behind them with one loaded model.

    Attributes:
        model: the loaded model.
        store: where caches live.
        host_copies: caches that were loaded, in pinned memory beside a GPU: up to a quarter of the host's memory.
    """

    def __init__(self, model: LanguageModel, store: Store) -> None:
        self.model = model
        self.store = store
        self._open = OpenCaches()
        on_gpu = model.device.type != "cpu"
        self.host_copies = HostCopies(total_memory_bytes() // HOST_SHARE if on_gpu else 0)

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        store: Store | str | Path | None = None,
        adapter: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[..., None] | None = None,
        beginning: Beginning | None = None,
    ) -> Engine:
        """Load a model (pulling it when it is not here yet) and open a store.

        Args:
            model: a catalogue name, a hub id, or a local directory or GGUF file.
            store: a store, its directory or its URL; `<cag home>/store` if None.
            adapter: directory of a LoRA adapter (peft).
            device: "auto", "cpu" or "cuda".
            dtype: what to compute in; "auto" takes what the machine computes best with.
            progress: passed to `cag.models.fetch_model`.
            beginning: of this model with these options, by `cag.starts.begin.begin_model`: what was begun before torch
                was imported. Without one it is begun here.

        Raises:
            ModelError: see `LanguageModel.load` and `fetch_model`.
            UsageError: an argument of a wrong type, or a device or type that is not there.
        """
        if not isinstance(dtype, str) or not isinstance(adapter, str | Path | None):
            raise UsageError(f"dtype is {dtype!r} and adapter {adapter!r}; they must be a name and a directory.")
        files = fetch_model(model, progress=progress)
        plan_runtime(choose_device(device))  # measures, perhaps: before any work of our own takes a core
        threading.Thread(target=_warm_up, name="cag-warm-up").start()  # the end of a process waits for compilers
        options = ModelOptions(device, dtype, Path(adapter) if adapter is not None else None)
        loaded = LanguageModel.load(files.directory, model_id=files.name, options=options, beginning=beginning)
        return cls(loaded, open_store(store))

    def beside(self, store: Store) -> Engine:
        """An engine over another store with the same model. They share the copies of caches in the host's memory."""
        other = Engine(self.model, store)
        other.host_copies = self.host_copies
        return other

    def build(
        self,
        paths: Sequence[str | Path] | CorpusReport,
        *,
        name: str,
        codec: str | dict[str, Any] = "lossless",
        max_kl: float | None = None,
        force: bool = False,
        system_text: str | None = None,
        skip_errors: bool = False,
        on_progress: Callable[[BuildProgress], None] | None = None,
        ttl_s: float | None = None,
    ) -> BuildReport:
        """Read documents (or take those of a corpus that was read already) and build a cache called `name`.

        Args:
            paths: files, folders, globs; or a corpus.
            name: of the cache.
            codec: id or configuration; "auto" takes the smallest that stays within `max_kl`.
            max_kl: bound of the mean KL divergence from the uncompressed cache, in nats; see `BuildOptions`.
            force: keep a cache that misses its bound.
            system_text: in place of the engine's own.
            skip_errors: leave out files that cannot be read.
            on_progress: told how far the build is.
            ttl_s: seconds after which the cache expires.

        Raises: as `load_corpus` and `build_cache`.
        """
        cag_store.checked_name(name)
        options = BuildOptions(codec=codec, max_kl=max_kl, force=force)
        if system_text is not None:
            options = replace(options, system_text=system_text)
        corpus = _read(paths, skip_errors)
        report = build_cache(self.model, self.store, name, corpus.documents, options, on_progress, ttl_s)
        return _with_corpus(report, corpus)

    def update(
        self,
        name: str,
        paths: Sequence[str | Path] | CorpusReport,
        *,
        force: bool = False,
        skip_errors: bool = False,
        on_progress: Callable[[BuildProgress], None] | None = None,
        ttl_s: float | None = None,
    ) -> BuildReport:
        """Build `name` again over `paths`: known documents keep their order, new ones come last.

        Documents that `paths` no longer name go; of equal texts the known document stays (a corpus that was read
        already is taken as it is). Everything before the first changed document is taken from the store, where its
        exact chunks are there still (`BuildReport.recomputed_tokens`). Codec, bound and texts are the old ones, and the
        day that a chat template may name is that of the first build; a codec that was searched is kept while it stays
        within the bound, and searched again when it does not or the model is another one. The old expiry ends, `ttl_s`
        sets a new one. `force` keeps a cache that misses its bound.
        """
        manifest = self.find(name)[1]
        corpus = _read(paths, skip_errors, known_documents(manifest))
        places = {entry.doc_id: place for place, entry in enumerate(manifest.documents)}
        documents = sorted(corpus.documents, key=lambda document: places.get(document.doc_id, len(places)))
        options = update_options(manifest, self.model, force=force)
        report = build_cache(self.model, self.store, name, documents, options, on_progress, ttl_s)
        return _with_changes(_with_corpus(report, corpus), manifest, documents)

    def find(self, name: str) -> tuple[Ref, Manifest]:
        """Ref and manifest of a cache.

        Raises:
            CacheNotFound: no cache of that name, or one that has expired.
        """
        return find_cache(self.store, name)

    def export_cache(
        self,
        name: str,
        destination: Store | str | Path,
        *,
        new_name: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> CopyReport:
        """Copy a cache to another store: a directory or a URL. What is there already is not copied again.

        Raises: CacheNotFound; as `cag_store.copy_cache`.
        """
        return export_cache(self.store, name, destination, new_name=new_name, on_progress=on_progress)

    def import_cache(
        self,
        source: Store | str | Path,
        name: str | None = None,
        *,
        cache: str | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> CopyReport:
        """Copy a cache from another store, every byte of it verified, and call it `name`, or what it is called there.

        Args:
            source: a store, its directory or its URL.
            name: what to call it here.
            cache: which of several caches of the source; the only one if None.
            on_progress: called with bytes done and bytes in all.

        Raises: CacheNotFound; as `cag_store.copy_cache`. Then this store is as it was.
        """
        return import_cache(self.store, source, name, cache=cache, on_progress=on_progress)

    def open(
        self,
        name: str,
        *,
        share: bool = True,
        version: Manifest | None = None,
        make_room: Callable[[Manifest, int], None] | None = None,
    ) -> Prefix:
        """Open a cache; it loads in the background, and whoever asks first waits only for the layers it needs.

        Args:
            name: of the cache.
            share: use the resident copy when the same cache is open already.
            version: what to open instead of what the name means now; its files must be held against `gc`.
            make_room: told what is about to be opened and how many bytes it will take on the device, before it takes
                them; what it raises ends the opening. Not called where the resident copy is used.

        Raises:
            CacheNotFound: no cache of that name.
            ModelError: the files of the weights were written over since they were loaded.
            CacheMismatch: the cache belongs to another model, adapter, tokenizer or chat template, or its prompt has
                other tokens here.
            InsufficientResources: the cache takes more memory than is free.
            StoreError: a damaged manifest or chunk; chunk errors surface when the layer is needed.
        """
        check_weights(self.model)
        if share and self._open:
            digest = version.digest if version is not None else self.find(name)[0].manifest
            if (shared := self._shared(name, digest)) is not None:
                return shared
        with translated_lookup():
            manifest, reader = self._reader(name, version)
        with ExitStack() as unless_opened:
            unless_opened.callback(reader.close)
            plan, recurrent = self._planned(name, manifest, reader)
            if make_room is not None:
                make_room(manifest, plan.num_bytes + sum(state.nbytes for state in recurrent.values()))
            if share and (shared := self._shared(name, manifest.digest)) is not None:
                return shared  # somebody else has opened it meanwhile
            resident = self._resident(name, manifest.digest, plan)
            resident.recurrent = recurrent
            unless_opened.pop_all()
        opened = OpenCache(manifest, resident, reader)
        return self._handle(name, self._open.add(opened) if share else opened)

    def is_open(self, manifest: Manifest) -> bool:
        """Whether a resident copy of a cache is there, for others to share."""
        return manifest.digest in self._open

    def ask(self, name: str, question: str, options: SamplingOptions | None = None, **sampling: Any) -> Answer:
        """Open a cache, answer one question, close it; the first token's time counts from before the opening."""
        started_at = time.perf_counter()
        with self.open(name) as prefix:
            return prefix.ask(question, options, started_at=started_at, **sampling)

    def _reader(self, name: str, version: Manifest | None) -> tuple[Manifest, CacheReader]:
        if version is not None:
            return version, self.store.reader(version)
        _, manifest, reader = self.store.open_reader(name)
        return manifest, reader

    def _planned(self, name: str, manifest: Manifest, reader: CacheReader) -> tuple[LoadPlan, States]:
        """How a cache of this model will lie on the device, and what recurrent layers know behind it. Raises: as
        `open`."""
        check_fingerprints(name, manifest, self.model)
        model = with_rope(self.model, manifest.kv.rope)
        check_tokens(name, reader, model)
        check_prompt(name, manifest, reader, model, lambda: self._documents(manifest))
        plan = plan_load(
            reader,
            model.kv_shapes,
            model.kv_dtype,
            model.device,
            rules=model.rules,
            in_codes=model.attends_to_codes,
            in_streams=model.decodes_streams,
        )
        return plan, self._recurrent(manifest, reader)

    def _resident(self, name: str, digest: str, plan: LoadPlan) -> ResidentPrefix:
        """The cache on its way to the device, from the host's memory where that still holds it. Raises:
        InsufficientResources."""
        copy = self.host_copies.get(digest)
        overlap = self._has_cores_to_overlap() or plan.reader.tier == "object-store"  # that one waits, not computes
        try:
            if copy is not None:
                return ResidentPrefix.promote(copy, plan)
            return ResidentPrefix.load(plan, overlap=overlap, on_host_copy=partial(self.host_copies.put, digest))
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise InsufficientResources(
                f"the cache {name!r} takes more memory of the device {plan.device} than is free: {error}",
                hint="Close another one, or build it with a smaller codec.",
            ) from error

    def _shared(self, name: str, digest: str) -> Prefix | None:
        """A handle of the resident copy, if there is one."""
        opened = self._open.use(digest)
        return None if opened is None else self._handle(name, opened)

    def _recurrent(self, manifest: Manifest, reader: CacheReader) -> States:
        """What the model's recurrent layers know behind the cache. Raises: CacheMismatch, StoreError."""
        if self.model.recurrent is None or manifest.states is None:
            return {}
        check_states(manifest, reader.token_ids())
        stored = self.store.states(manifest.states.snapshots[-1])
        return loaded_states(stored, self.model.recurrent, self.model.device)

    def _has_cores_to_overlap(self) -> bool:
        """Whether loading and a question's forward can run beside each other without taking each other's cores."""
        on_gpu = self.model.device.type != "cpu"
        return on_gpu or usable_cores() >= self.model.plan.threads_small + self.store.workers

    def _handle(self, name: str, opened: OpenCache) -> Prefix:
        return Prefix(
            name,
            opened.manifest,
            opened.resident,
            with_rope(self.model, opened.manifest.kv.rope),
            load_documents=lambda: self._documents(opened.manifest),
            on_close=lambda: self._open.give_back(opened),
        )

    def _documents(self, manifest: Manifest) -> list[Document]:
        with translated_lookup():
            texts = [_text(self.store.get_blob(entry.sha256), entry.doc_id) for entry in manifest.documents]
        return [
            Document(entry.doc_id, entry.title, entry.path, text, entry.sha256)
            for entry, text in zip(manifest.documents, texts, strict=True)
        ]


def _warm_up() -> None:
    """Compile what loading and choosing need, while the model is read."""
    warm_up()
    warm_up_largest()


def _read(
    paths: Sequence[str | Path] | CorpusReport, skip_errors: bool, known: Collection[tuple[str, str]] = ()
) -> CorpusReport:
    return paths if isinstance(paths, CorpusReport) else load_corpus(paths, skip_errors=skip_errors, known=known)


def _text(content: bytes, doc_id: str) -> str:
    """Raises: CorruptEntry."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CorruptEntry(f"document {doc_id!r} is no text in UTF-8: build the cache again", where=doc_id) from error


def _with_corpus(report: BuildReport, corpus: CorpusReport) -> BuildReport:
    return replace(report, duplicates=corpus.duplicates, empty=corpus.empty, skipped=corpus.skipped)


def _with_changes(report: BuildReport, before: Manifest, documents: Sequence[Document]) -> BuildReport:
    old = {entry.doc_id: (entry.title, entry.sha256) for entry in before.documents}
    new = {document.doc_id: (document.title, document.sha256) for document in documents}
    return replace(
        report,
        added=tuple(doc_id for doc_id in new if doc_id not in old),
        changed=tuple(doc_id for doc_id in new if old.get(doc_id, new[doc_id]) != new[doc_id]),
        removed=tuple(doc_id for doc_id in old if doc_id not in new),
    )
