"""Building a cache: documents -> prefix -> keys and values, chunk by chunk -> codec -> store.

A straight walk: lay out the prefix, take over the exact chunks that the store has already (an earlier build of a common
beginning, or one that was interrupted), compute the others, encode what was asked for or search it, measure what it
loses, commit. Keys and values are always computed behind exact ones, and stored losslessly as soon as they are there;
a lossy codec encodes what is exact. Nothing else of the store changes before the commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import cag_store
from cag.building.chunks import PrefixChunks
from cag.building.fidelity import Fidelity
from cag.building.ladder import CodecChoice, Rung, Trial, choose, describe_codec, smallest_finer
from cag.building.options import BuildOptions, BuildProgress, BuildReport, BuildSeconds
from cag.building.probes import NUM_PROBES, make_probes
from cag.building.requirements import (
    RESERVED_TOKENS,
    check_codec_of,
    check_ids,
    check_memory,
    check_ttl,
    check_window,
    laid_out,
)
from cag.building.rungs import REFINED, codec_of, ladder_of
from cag.building.trials import CodecTrials
from cag.corpus import Document
from cag.errors import BuildInterrupted, FidelityMissed
from cag.identity import TOKENIZER, tokenizer_digest
from cag.machine.allocator import large_blocks_apart
from cag.machine.runtime import processor_name, usable_cores
from cag.machine.versions import installed_versions
from cag.model import LanguageModel
from cag.prompt import PrefixLayout
from cag.short_model import for_length
from cag_store import (
    ROOT,
    CacheStates,
    ChunkContext,
    ChunkEntry,
    DocumentEntry,
    KVGeometry,
    Manifest,
    ModelIdentity,
    Store,
    codec_from_config,
)
from cag_store.errors import StoreError

_VERSIONED = ("cag-engine", "torch", "transformers", "tokenizers", "numpy", "zstandard")
EXACT = "lossless"  # what keys and values are computed behind


@dataclass(frozen=True)
class BuiltCache:
    """What a commit needs to know of a cache: its chunks, what they lose, and why they are in this codec."""

    entries: tuple[ChunkEntry, ...]
    codec: dict[str, Any]
    fidelity: Fidelity
    choice: dict[str, Any] | None
    states: CacheStates | None = None


@dataclass
class Build:
    """One build in progress. Use `build_cache`."""

    chunks: PrefixChunks
    layout: PrefixLayout
    documents: Sequence[Document]
    options: BuildOptions
    on_progress: Callable[[BuildProgress], None] | None
    started_at: float
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    rungs: list[Rung] = field(default_factory=list)
    seconds: BuildSeconds = field(default_factory=BuildSeconds)

    @property
    def store(self) -> Store:
        """Where the cache goes."""
        return self.chunks.store

    @cached_property
    def blobs(self) -> list[str]:
        """The addresses of the documents' texts, which are stored when this is first asked for."""
        return [self.store.put_blob(document.text.encode()) for document in self.documents]

    def report(self, stage: str, done_tokens: int, total_tokens: int | None = None) -> None:
        """Tell how far the build is; without `total_tokens` of those of the prefix."""
        if self.on_progress is not None:
            total = self.chunks.num_tokens if total_tokens is None else total_tokens
            self.on_progress(BuildProgress(stage, done_tokens, total, time.perf_counter() - self.started_at))

    def named_codec(self) -> dict[str, Any] | None:
        """The codec's configuration; None when it is to be searched, for which the ladder is set up now.

        Before anything is computed, since a basis may have to be made, which takes memory of its own. Raises: as
        `check_codec_of`.
        """
        self.report("calibrate", 0)
        begin = time.perf_counter()
        codec = None
        if not self.options.chooses:
            codec = codec_of(self.options.keep or self.options.codec, self.chunks.model, self.store, self.report)
            check_codec_of(self.chunks.model, self.store, codec)
        elif self.options.keep is None:
            self.rungs = self._ladder()
        self.seconds = replace(self.seconds, search_s=time.perf_counter() - begin)
        return codec

    def _ladder(self) -> list[Rung]:
        raw_bytes = self.chunks.num_tokens * self.chunks.model.kv_bytes_per_token
        return ladder_of(self.chunks.model, self.store, raw_bytes, self.report)

    def run(self, codec: dict[str, Any] | None, previous: Manifest | None) -> BuiltCache:
        """All but the commit. `codec` is None when it is to be searched; `previous` is what the name meant before."""
        if previous is not None and (codec or self.options.keep) and (unchanged := self._unchanged(codec, previous)):
            return unchanged
        is_lossless = codec is not None and codec_from_config(codec).lossless
        exact_context = self.chunks.context(codec if codec and is_lossless else codec_from_config(EXACT).config())
        there = self.chunks.stored(exact_context)
        exact = self.chunks.snapshots.resumable(there)
        if sum(entry.num_tokens for entry in exact) < self.chunks.num_tokens:
            if previous is not None and (unchanged := self._unchanged(codec, previous)):
                return unchanged
            self._count_lossy_chunks(codec, exact)
        self._compute(exact, exact_context)
        if sum(entry.num_tokens for entry in there) > self.reused_tokens:  # computed once more for the states alone
            self.chunks.load(exact, exact_context)
        return self._encode(codec, exact, exact_context)

    def _compute(self, exact: list[ChunkEntry], context: ChunkContext) -> None:
        """Load the chunks `exact`, and compute and add the others."""
        self.chunks.take_over(exact, context)
        self.reused_tokens = self.chunks.state.num_tail
        if exact:
            self.report("reuse", self.reused_tokens)
        self.report("prefill", self.reused_tokens)
        encode_s = 0.0

        def store_chunk(start: int) -> None:
            nonlocal encode_s
            begin = time.perf_counter()
            exact.append(self.chunks.put(context, exact[-1].key if exact else ROOT, start))
            self.chunks.snapshots.keep(self.chunks.state.recurrent, exact[-1])
            encode_s += time.perf_counter() - begin
            self.report("prefill", self.chunks.state.num_tail)

        if self.chunks.num_tokens > self.reused_tokens:
            _ = self.chunks.model.network  # read here, which is no part of the rate
        begin = time.perf_counter()
        self.chunks.compute(store_chunk)
        self.seconds = replace(
            self.seconds, prefill_s=time.perf_counter() - begin - encode_s, encode_s=self.seconds.encode_s + encode_s
        )

    def _encode(self, codec: dict[str, Any] | None, exact: list[ChunkEntry], context: ChunkContext) -> BuiltCache:
        """The cache in its codec, with what was measured. Raises: FidelityMissed."""
        model, bound = self.chunks.model, self.options.bound
        room = model.window_tokens - self.chunks.num_tokens
        branches = make_probes(model.tokenizer, self.layout, self.documents, room)
        begin = time.perf_counter()
        states = self.chunks.snapshots.listed(context.codec, all_places=True)
        besides_bytes = self.store.blob_bytes(self.blobs)
        if states is not None:
            besides_bytes += states.snapshots[-1].stored_bytes
        with (
            large_blocks_apart(),
            CodecTrials(self.chunks, exact, context, branches, besides_bytes, bound, self.report) as trials,
        ):
            trial = lossless = trials.lossless()
            choice = self._search(trials, lossless, bound) if codec is None and bound is not None else None
            if choice is not None:
                trial = choice.trial
            elif codec is not None and codec != lossless.codec:
                trial = self._named(trials, lossless, codec)
        encode_s = self.seconds.encode_s + trial.encode_s
        measure_s = trials.exact_s + trial.measure_s
        search_s = self.seconds.search_s + time.perf_counter() - begin - trial.encode_s - measure_s
        self.seconds = replace(self.seconds, encode_s=encode_s, measure_s=measure_s, search_s=search_s)
        assert trial.fidelity is not None, "what is kept was measured"
        self._check_bound(trial, trial.fidelity)
        states = self.chunks.snapshots.listed(context.codec, all_places=trial.codec == context.codec)
        return BuiltCache(trial.entries, trial.codec, trial.fidelity, choice.to_json() if choice else None, states)

    def _search(self, trials: CodecTrials, lossless: Trial, bound: float) -> CodecChoice:
        keep, probes = self.options.keep, lossless.fidelity
        if probes is not None and probes.num_probes < NUM_PROBES:
            return CodecChoice(lossless, bound, (lossless,), few_probes=probes.num_probes)
        if keep is not None:
            kept = lossless if keep == lossless.codec else trials(keep, lossless.stored_bytes)
            if kept.outcome == "within":
                return CodecChoice(kept, bound, (kept,), kept=True)
            self.rungs = self._ladder()
        return choose(trials, self.rungs, lossless, bound, trials.finer)

    def _named(self, trials: CodecTrials, lossless: Trial, codec: dict[str, Any]) -> Trial:
        """The codec that was named, or kept; where `int4` misses the bound, with the keys of some layers in 8 bits."""
        first, bound = trials(codec), self.options.bound
        if bound is None or first.outcome == "within" or self.options.force or self.options.codec not in REFINED:
            return first
        alone = codec_of(self.options.codec, self.chunks.model, self.store)
        return smallest_finer(trials, trials.finer(alone), lossless, bound) or first

    def _check_bound(self, trial: Trial, fidelity: Fidelity) -> None:
        bound = self.options.bound
        if bound is None or fidelity.mean_kl <= bound or self.options.force:
            return
        raise FidelityMissed(
            f"codec {describe_codec(trial.codec)} has a mean KL divergence of {fidelity.mean_kl:.3g} nats from the "
            f"uncompressed cache, more than the bound of {bound:g}. The store is as it was.",
            hint="Take `--codec auto` or lossless, allow more, or keep it all the same with --force.",
            mean_kl=fidelity.mean_kl,
            max_kl=bound,
            codec=trial.codec,
        )

    def _unchanged(self, codec: dict[str, Any] | None, previous: Manifest) -> BuiltCache | None:
        """The cache as it was, when it is the one to be built: same tokens, model, codec and bound, every chunk whole.

        Its fidelity was measured on these very bytes, so nothing has to be computed. Where that was at too few probes,
        the cache is made anew, which costs little with so short a text.
        """
        bound, choice = self.options.bound, previous.build.get("codec_choice")
        fidelity = Fidelity.from_json(dict(previous.fidelity or {}))
        config = dict(previous.codec)
        same = config == codec if codec is not None else bool(choice) and previous.build.get("max_kl") == bound
        if not same or fidelity is None or not fidelity.is_judged:
            return None
        if not (bound is None or fidelity.mean_kl <= bound or self.options.force):
            return None
        context = self.chunks.context(config)
        same = context == previous.context and self.chunks.keys(context) == [chunk.key for chunk in previous.chunks]
        if not same or tuple(self.chunks.stored(context)) != previous.chunks:
            return None
        if not self.chunks.snapshots.are_stored(previous.states):
            return None
        self.reused_tokens = self.chunks.num_tokens
        return BuiltCache(previous.chunks, config, fidelity, choice if codec is None else None, previous.states)

    def _count_lossy_chunks(self, codec: dict[str, Any] | None, exact: Sequence[ChunkEntry]) -> None:
        """Note what has to be computed although its chunks in the codec are here."""
        codec = codec or self.options.keep
        if codec is None:
            return
        keys = self.chunks.keys(self.chunks.context(codec))
        here = next((index for index, key in enumerate(keys) if not self.store.has_chunk(key)), len(keys))
        size = self.chunks.context(codec).chunk_tokens
        self.recomputed_tokens = max(0, min(here * size, self.chunks.num_tokens) - len(exact) * size)


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
        UsageError: an expiry that is not ahead, or beyond the calendar; two documents of one id; a codec with layers
            that the model does not have.
        EmptyCorpus: no documents.
        CorpusTooLarge: more tokens than the model's window holds beside question and answer.
        InsufficientResources: too little memory for one copy of the cache, said before anything is computed.
        FidelityMissed: the cache misses the bound that was given; the name still refers to what it referred to.
        UnencodableArray: the codec that was named cannot hold the values.
        UnknownCodec, EntryNotFound, CorruptEntry: a codec of no such configuration, or one whose basis is not in the
            store whole.
        StoreError: the store cannot take the cache; the same holds.
        BuildInterrupted: Ctrl-C; chunks that are whole are kept, and the next build goes on behind them.
    """
    started_at = time.perf_counter()
    if isinstance(options.codec, dict):
        codec_from_config(options.codec)
    if ttl_s is not None:
        check_ttl(ttl_s)
    check_ids(documents)
    layout = laid_out(model, documents, options)
    model = for_length(model, len(layout.token_ids) + RESERVED_TOKENS)
    check_window(model, layout)
    check_memory(model, layout)
    with store.build_lease():
        try:
            chunks = PrefixChunks(model, store, layout.token_ids, model.new_state(capacity=len(layout.token_ids)))
            build = Build(chunks, layout, documents, options, on_progress, started_at)
            cache = build.run(build.named_codec(), _previous(store, name))
            build.report("commit", build.chunks.num_tokens)
            manifest = manifest_of(build, cache)
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
        num_tokens=chunks.num_tokens,
        reused_tokens=build.reused_tokens,
        computed_tokens=chunks.num_tokens - build.reused_tokens,
        recomputed_tokens=build.recomputed_tokens,
        raw_bytes=manifest.raw_bytes,
        stored_bytes=manifest.stored_bytes,
        codec=cache.codec,
        codec_choice=cache.choice,
        max_kl=options.bound,
        fidelity=cache.fidelity,
        **vars(build.seconds),
        total_s=time.perf_counter() - started_at,
    )


def _previous(store: Store, name: str) -> Manifest | None:
    """What `name` means; None when it means nothing that can be read."""
    try:
        return store.resolve(name)[1]
    except StoreError:
        return None


def manifest_of(build: Build, cache: BuiltCache) -> Manifest:
    """What is committed of a build that ended in `cache`."""
    model, store = build.chunks.model, build.store
    context = build.chunks.context(cache.codec)
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
            dtype=context.dtype,
            compute_dtype=context.compute_dtype,
            rope=model.rope,
            chunk_tokens=context.chunk_tokens,
            sides=context.sides,
        ),
        codec=cache.codec,
        chunks=cache.entries,
        documents=tuple(
            DocumentEntry(d.doc_id, d.title, d.path, digest, span.start, span.end)
            for d, digest, span in zip(build.documents, build.blobs, build.layout.spans, strict=True)
        ),
        layout=build.layout.to_json() | {TOKENIZER: tokenizer_digest(model.tokenizer)},
        blob_bytes=store.blob_bytes([*build.blobs, *cag_store.config_resources(cache.codec)]),
        fidelity=cache.fidelity.to_json(),
        versions=installed_versions(_VERSIONED),
        machine={"processor": processor_name(), "cores": usable_cores(), "device": str(model.device)},
        build=_build_facts(build, cache),
        states=cache.states,
    )


def _build_facts(build: Build, cache: BuiltCache) -> dict[str, Any]:
    """How the cache came about; opaque to the store."""
    adapter, asked = build.chunks.model.adapter, build.options.codec
    return {
        **{name: round(seconds, 4) for name, seconds in vars(build.seconds).items()},
        "reused_tokens": build.reused_tokens,
        "computed_tokens": build.chunks.num_tokens - build.reused_tokens,
        "adapter": str(adapter) if adapter else None,
        "max_kl": build.options.bound,
        "forced": build.options.force,
        "codec_choice": cache.choice,
        "named_codec": asked if isinstance(asked, str) and not build.options.chooses else None,
    }
