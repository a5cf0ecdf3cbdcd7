"""Building a cache: documents -> prefix -> keys and values, chunk by chunk -> store.

A straight walk: lay out the prefix, take over the chunks that the store has already (an earlier build of a common
beginning, or one that was interrupted), compute the others, measure what the codec loses, commit. Chunks are stored as
soon as they are computed; nothing else of the store changes before the commit.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

import cag_store
from cag.corpus import Document
from cag.errors import BuildInterrupted, CorpusTooLarge, InsufficientResources
from cag.fidelity import Fidelity, compare, probe_logits
from cag.model import LanguageModel
from cag.prefill import BLOCK_TOKENS, prefill
from cag.prompt import CLOSING_TEXT, SYSTEM_TEXT, PrefixLayout, lay_out
from cag.resident import HostBuffers, ResidentPrefix, storage_view
from cag.runtime import processor_name, usable_cores
from cag.state import SequenceState
from cag_store import ChunkContext, ChunkEntry, ChunkHeader, DocumentEntry, KVGeometry, Manifest, ModelIdentity, Store
from cag_store.errors import CorruptEntry, EntryNotFound

RESERVED_TOKENS = 512  # of the window, kept for question and answer


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is. `stage` is "reuse", "prefill", "measure" or "commit"; the tokens are of the prefix."""

    stage: str
    done_tokens: int
    total_tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class BuildOptions:
    """What decides a cache besides model and documents."""

    codec: str | dict[str, Any] = "lossless"
    system_text: str = SYSTEM_TEXT
    closing_text: str = CLOSING_TEXT


@dataclass(frozen=True)
class BuildReport:
    """What a build did. `reused_tokens` were taken from the store, `computed_tokens` were prefilled."""

    name: str
    digest: str
    num_documents: int
    num_tokens: int
    reused_tokens: int
    computed_tokens: int
    raw_bytes: int
    stored_bytes: int
    fidelity: Fidelity
    prefill_s: float
    encode_s: float
    total_s: float
    duplicates: tuple[tuple[str, str], ...] = ()
    empty: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `cag build --json` prints."""
        ratio = self.raw_bytes / self.stored_bytes
        rate = self.computed_tokens / self.prefill_s if self.prefill_s else None
        return {**asdict(self), "raw_over_stored": round(ratio, 4), "prefill_tokens_per_s": rate}


@dataclass
class Build:
    """One build in progress. Use `build_cache`."""

    model: LanguageModel
    store: Store
    layout: PrefixLayout
    context: ChunkContext
    state: SequenceState
    on_progress: Callable[[BuildProgress], None] | None
    started_at: float
    entries: list[ChunkEntry] = field(default_factory=list)
    reused_tokens: int = 0
    encode_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prefix."""
        return len(self.layout.token_ids)

    def report(self, stage: str) -> None:
        """Tell how far the build is."""
        if self.on_progress is not None:
            elapsed = time.perf_counter() - self.started_at
            self.on_progress(BuildProgress(stage, self.state.num_tail, self.num_tokens, elapsed))

    def reuse_stored_chunks(self) -> None:
        """Load chunks from the beginning on, as far as the store has them whole."""
        while self.reused_tokens < self.num_tokens:
            try:
                entry = self.store.chunk_entry(self._header(self.reused_tokens).key)
            except (EntryNotFound, CorruptEntry):  # a damaged chunk was removed by the store: compute it again
                break
            self.entries.append(entry)
            self.reused_tokens += entry.num_tokens
        if self.entries:
            self._load_entries()
            self.state.finish(self.reused_tokens)
            self.report("reuse")

    def compute_missing_chunks(self) -> None:
        """Prefill what is not there yet; each block is stored as a chunk as soon as it is computed."""
        first = self.state.num_tail
        rest = self.layout.token_ids[first:].tolist()
        self.report("prefill")
        start = time.perf_counter()
        if rest:
            prefill(self.model, self.state, rest, on_block=lambda a, b: self._store_chunk(first + a, first + b))
        self.prefill_s = time.perf_counter() - start - self.encode_s

    def measure_fidelity(self, codec_is_lossless: bool) -> Fidelity:
        """Compare answers behind what was computed with answers behind what the store gives back.

        Afterwards the buffers hold what the store gives back. A lossless cache is compared too: the comparison shows
        that it is.
        """
        resident = ResidentPrefix.from_tail(self.state.tail, self.layout.token_ids)
        exact = probe_logits(self.model, resident)
        self.report("measure")
        if not codec_is_lossless:
            self._load_entries()
        return compare(exact, probe_logits(self.model, resident))

    def _store_chunk(self, start: int, end: int) -> None:
        begin = time.perf_counter()
        header = self._header(start)
        assert header.start + header.num_tokens == end
        entry = self.store.put_chunk(header, self._views(start, end), self.layout.token_ids[start:end])
        self.entries.append(entry)
        self.encode_s += time.perf_counter() - begin
        self.report("prefill")

    def _header(self, start: int) -> ChunkHeader:
        end = min(start + self.context.chunk_tokens, self.num_tokens)
        index = start // self.context.chunk_tokens
        parent = self.entries[index - 1].key if index else cag_store.ROOT
        return ChunkHeader(
            key=cag_store.chunk_key(parent, self.layout.token_ids[start:end], self.context),
            parent=parent,
            start=start,
            num_tokens=end - start,
            num_kv_heads=tuple(shape.num_kv_heads for shape in self.model.kv_shapes),
            head_dim=tuple(shape.head_dim for shape in self.model.kv_shapes),
            context=self.context,
        )

    def _load_entries(self) -> None:
        """Decode all chunks so far into the buffers of the sequence."""
        tail = self.state.tail
        with self.store.chunk_reader(self.entries, self.context) as reader:
            host = HostBuffers(tail.keys, tail.values)
            reader.load(host.views(), host.arrived)

    def _views(self, start: int, end: int) -> Iterator[tuple[Any, Any]]:
        """Host views of tokens `[start, end)` of each layer's buffers, one layer at a time."""
        for keys, values in zip(self.state.tail.keys, self.state.tail.values, strict=True):
            yield storage_view(keys[:, start:end].cpu()), storage_view(values[:, start:end].cpu())


def build_cache(
    model: LanguageModel,
    store: Store,
    name: str,
    documents: Sequence[Document],
    options: BuildOptions,
    on_progress: Callable[[BuildProgress], None] | None = None,
    ttl_s: float | None = None,
) -> BuildReport:
    """Build a cache over `documents` in their order, and let `name` refer to it, for `ttl_s` seconds or for good.

    Raises:
        CorpusTooLarge: more tokens than the model's window holds beside question and answer.
        InsufficientResources: too little memory for one copy of the cache, said before anything is computed.
        StoreError: the store cannot take the cache; the name still refers to what it referred to.
        BuildInterrupted: Ctrl-C; chunks that are whole are kept, and the next build goes on behind them.
    """
    started_at = time.perf_counter()
    codec = cag_store.codec_from_config(options.codec)
    layout = lay_out(
        model.tokenizer, model.template, documents, system_text=options.system_text, closing_text=options.closing_text
    )
    _check_window(model, layout)
    _check_memory(model, layout)
    with store.build_lease():
        try:
            build = Build(
                model,
                store,
                layout,
                _chunk_context(model, codec.config()),
                model.new_state(capacity=len(layout.token_ids)),
                on_progress,
                started_at,
            )
            build.reuse_stored_chunks()
            build.compute_missing_chunks()
            fidelity = build.measure_fidelity(codec.lossless)
            build.report("commit")
            manifest = _manifest(build, documents, codec.config(), fidelity)
            digest = store.commit(name, manifest, cag_store.utc_after(ttl_s))
        except KeyboardInterrupt as interrupt:
            raise BuildInterrupted(
                f"build of {name!r} was interrupted; the store is as it was.",
                hint="Whole chunks are kept for an hour: the same command goes on behind them.",
            ) from interrupt
    return BuildReport(
        name=name,
        digest=digest,
        num_documents=len(documents),
        num_tokens=build.num_tokens,
        reused_tokens=build.reused_tokens,
        computed_tokens=build.num_tokens - build.reused_tokens,
        raw_bytes=manifest.raw_bytes,
        stored_bytes=manifest.stored_bytes,
        fidelity=fidelity,
        prefill_s=build.prefill_s,
        encode_s=build.encode_s,
        total_s=time.perf_counter() - started_at,
    )


def _check_window(model: LanguageModel, layout: PrefixLayout) -> None:
    limit = model.window_tokens - RESERVED_TOKENS
    found = len(layout.token_ids)
    if found > limit:
        raise CorpusTooLarge(
            f"the corpus has {found} tokens with its prompt, {found - limit} more than fit: {model.model_id} has a "
            f"window of {model.window_tokens}, of which {RESERVED_TOKENS} are kept for question and answer.",
            hint="Leave documents out, split the corpus into several caches, or take a model with a longer window.",
            num_tokens=found,
            window_tokens=model.window_tokens,
        )


def _check_memory(model: LanguageModel, layout: PrefixLayout) -> None:
    needed = len(layout.token_ids) * model.kv_bytes_per_token
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise InsufficientResources(
            f"the cache needs {needed / 1e9:.2f} GB of memory for {len(layout.token_ids)} tokens, "
            f"and {free / 1e9:.2f} GB are free.",
            hint="Free memory, or use fewer documents or a smaller model.",
        )


def _chunk_context(model: LanguageModel, codec: dict[str, Any]) -> ChunkContext:
    return ChunkContext(
        model_fingerprint=model.fingerprints.weights,
        adapter_fingerprint=model.fingerprints.adapter,
        rope=model.rope,
        dtype=_name(model.kv_dtype),
        compute_dtype=_name(model.compute_dtype),
        codec=codec,
        chunk_tokens=BLOCK_TOKENS,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _manifest(build: Build, documents: Sequence[Document], codec: dict[str, Any], fidelity: Fidelity) -> Manifest:
    model = build.model
    spans = build.layout.spans
    blobs = [build.store.put_blob(document.text.encode()) for document in documents]
    return Manifest(
        model=ModelIdentity(
            model.model_id,
            model.fingerprints.weights,
            model.fingerprints.tokenizer,
            model.fingerprints.template,
            model.fingerprints.adapter,
        ),
        kv=KVGeometry(
            num_kv_heads=tuple(shape.num_kv_heads for shape in model.kv_shapes),
            head_dim=tuple(shape.head_dim for shape in model.kv_shapes),
            dtype=_name(model.kv_dtype),
            compute_dtype=_name(model.compute_dtype),
            rope=model.rope,
            chunk_tokens=BLOCK_TOKENS,
        ),
        codec=codec,
        chunks=tuple(build.entries),
        documents=tuple(
            DocumentEntry(d.doc_id, d.title, d.path, d.sha256, span.start, span.end)
            for d, span in zip(documents, spans, strict=True)
        ),
        layout=build.layout.to_json(),
        blob_bytes=build.store.blob_bytes([*blobs, *cag_store.config_resources(codec)]),
        fidelity=fidelity.to_json(),
        versions=_versions(),
        machine={"processor": processor_name(), "cores": usable_cores(), "device": str(model.device)},
        build={
            "prefill_s": round(build.prefill_s, 4),
            "encode_s": round(build.encode_s, 4),
            "reused_tokens": build.reused_tokens,
            "computed_tokens": build.num_tokens - build.reused_tokens,
            "adapter": str(model.adapter) if model.adapter else None,
        },
    )


def _versions() -> dict[str, str]:
    names = ("cag-engine", "torch", "transformers", "tokenizers", "numpy", "zstandard")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
