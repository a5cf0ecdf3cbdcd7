"""`cag bench quality`: what each codec makes of a cache, in bytes and in answers.

A loaded engine, corpora and codecs in; a row a corpus and codec, a table and a plot out. Each corpus is prefilled once:
every codec encodes the same exact keys and values into the store, and what was read back from there is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cag.building.builder import Build, BuiltCache, manifest_of
from cag.building.chunks import PrefixChunks
from cag.building.fidelity import Fidelity, FidelityProbe, same_bits
from cag.building.ladder import Trial
from cag.building.options import BuildOptions
from cag.building.probes import make_probes
from cag.building.rungs import codec_of
from cag.building.trials import CodecTrials
from cag.engine import Engine
from cag.errors import UsageError
from cag.forward.recurrent import States
from cag.prefill import BLOCK_TOKENS, prefill
from cag.residency.resident import ResidentPrefix
from cag_bench.codec_list import LADDER, codec_label, parse_codecs
from cag_bench.corpus import BenchCorpus
from cag_bench.plot import plot_quality, require_matplotlib
from cag_bench.provenance import commit, load_average, machine_facts, versions
from cag_bench.quality_corpus import CutCorpus, cut_corpus
from cag_bench.quality_table import corpus_names, fronts, markdown, notes
from cag_bench.rows import QUALITY_PLOT, SUMMARY, TABLE, ResultRows, write_json
from cag_store import ROOT, ChunkEntry, Manifest, codec_from_config, config_resources, object_paths
from cag_store.paths import manifest_path, ref_path

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class QualityOptions:
    """codecs: as `parse_codecs` gives them. num_tokens: at which corpora are cut. limits: of the mean KL divergence, in
    nats, for which the smallest codec is named."""

    codecs: Sequence[dict[str, Any]] = tuple(parse_codecs(LADDER))
    num_tokens: int = 6144
    limits: Sequence[float] = (0.001, 0.004, 0.02)

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not self.limits or not all(limit >= 0 for limit in self.limits):
            raise UsageError("tokens must be at least 1, limits at least 0.")


def run_quality(
    engine: Engine, corpora: Sequence[BenchCorpus], options: QualityOptions, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Measure every codec on every corpus and write the files; the object that `--json` prints.

    Raises: UsageError; UnknownCodec; StoreError.
    """
    require_matplotlib()
    origin = {"machine": machine_facts(engine.model), "commit": commit(), "versions": versions()}
    rows: list[dict[str, Any]] = []
    with ResultRows(directory, origin) as results, engine.store.build_lease():
        progress("prepare codecs", 0, 0)
        codecs, basis_s = ready_codecs(engine, options.codecs, progress)
        warm_up(engine)
        for name, corpus in zip(corpus_names([corpus.paths for corpus in corpora]), corpora, strict=True):
            cut = cut_corpus(engine.model, corpus.documents, min(options.num_tokens, _room(engine)))
            facts = corpus.cut_to(cut.documents).facts() | {"name": name}
            for row in MeasuredCorpus(engine, facts, cut, progress).rows(codecs):
                results.write_row("codec", row)
                rows.append(row)
        facts = {"model": _model_facts(engine), "basis_s": basis_s, "options": {"num_tokens": options.num_tokens}}
        results.write_run(facts | {"load_average": load_average()})
    summary = origin | facts | {"rows": rows, "fronts": fronts(rows, options.limits), "notes": notes(rows, basis_s)}
    write_json(directory / SUMMARY, summary)
    (directory / TABLE).write_text(markdown(summary), encoding="utf-8")
    plot_quality(rows, f"{engine.model.model_id}, probes computed in float32", directory / QUALITY_PLOT)
    return summary


class MeasuredCorpus:
    """One corpus, prefilled once. Its rows come codec by codec."""

    def __init__(self, engine: Engine, facts: dict[str, Any], cut: CutCorpus, progress: Progress) -> None:
        """facts: what the rows say of the corpus, its `name` and `sha256` among them."""
        self._model, self._store = engine.model, engine.store
        self._facts, self._cut, self._progress = facts, cut, progress
        token_ids = cut.layout.token_ids
        self._chunks = PrefixChunks(self._model, self._store, token_ids, self._model.new_state(capacity=len(token_ids)))
        self._name = f"quality-{facts['sha256'][:16]}"
        self._states: dict[int, States] = {}  # of recurrent layers, by place
        self._prefill_s = 0.0

    def rows(self, codecs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A row for each codec, as soon as it is measured."""
        chunks, model, store = self._chunks, self._model, self._store
        self._prefill()
        context = chunks.context(codec_from_config("lossless").config())
        begin = time.perf_counter()
        exact: list[ChunkEntry] = []
        for start in range(0, chunks.num_tokens, BLOCK_TOKENS):
            exact.append(chunks.put(context, exact[-1].key if exact else ROOT, start))
            chunks.snapshots.keep(self._states.get(start + exact[-1].num_tokens, {}), exact[-1])
        encode_s = time.perf_counter() - begin
        room = model.window_tokens - chunks.num_tokens
        branches = make_probes(model.tokenizer, self._cut.layout, self._cut.documents, room)
        following = [self._cut.following] if self._cut.following else []
        besides_bytes = store.blob_bytes([store.put_blob(document.text.encode()) for document in self._cut.documents])
        with CodecTrials(chunks, exact, context, branches, besides_bytes, None, self._report) as trials:
            lossless = trials.lossless()
            with FidelityProbe(model, self._documents(), following) as behind:
                for codec in codecs:
                    is_lossless = codec == lossless.codec
                    trial = lossless if is_lossless else trials(codec)
                    found = None
                    if following and trial.fidelity is not None:
                        found = same_bits(following) if is_lossless else behind.measure()
                    yield self._row(trial, found, encode_s if is_lossless else trial.encode_s)

    def _prefill(self) -> None:
        self._progress(f"prefill {self._facts['name']}", 0, 0)
        begin = time.perf_counter()
        self._chunks.compute(self._keep_states)
        self._prefill_s = time.perf_counter() - begin

    def _keep_states(self, start: int) -> None:
        place = min(start + BLOCK_TOKENS, self._chunks.num_tokens)
        if place in self._chunks.snapshots.places():
            self._states[place] = self._chunks.state.recurrent

    def _documents(self) -> ResidentPrefix:
        """The prefix up to the end of the documents. What recurrent layers know there, no block ended with: it is
        computed behind the last block that they are known behind."""
        model, end = self._model, self._cut.num_document_tokens
        if model.recurrent is None:
            return self._chunks.resident_start(end, {})
        first = max((place for place in self._states if place <= end), default=0)
        before = self._chunks.resident_start(first, self._states[first]) if first else None
        state = model.new_state(capacity=end - first, prefix=before)
        prefill(model, state, self._chunks.token_ids[first:end].tolist())
        return self._chunks.resident_start(end, state.recurrent)

    def _report(self, stage: str, done: int) -> None:
        self._progress(f"{stage} {self._facts['name']}, tokens", done, self._chunks.num_tokens)

    def _row(self, trial: Trial, following: Fidelity | None, encode_s: float) -> dict[str, Any]:
        row = {
            "corpus": self._facts | {"num_tokens": self._chunks.num_tokens},
            "codec": trial.codec,
            "label": codec_label(trial.codec),
            "outcome": "refused" if trial.fidelity is None else "measured",
            "raw_bytes": self._chunks.num_tokens * self._model.kv_bytes_per_token,
            "prefill_s": self._prefill_s,
            "encode_s": encode_s,
            "load_average": load_average(),
        }
        if trial.fidelity is None:
            return row
        manifest = self._manifest(trial)
        stored = self._stored_bytes(manifest)
        raw_bytes, apart = manifest.raw_bytes, stored["total"] - stored["basis"]
        return row | {
            "raw_bytes": raw_bytes,
            "stored_bytes": stored,
            "raw_over_stored": {"with_basis": raw_bytes / stored["total"], "without_basis": raw_bytes / apart},
            "fidelity": {"corpus": trial.fidelity.to_json(), "following": following and following.to_json()},
        }

    def _manifest(self, trial: Trial) -> Manifest:
        assert trial.fidelity is not None
        build = Build(self._chunks, self._cut.layout, self._cut.documents, BuildOptions(), None, time.perf_counter())
        exact = codec_from_config("lossless").config()
        states = self._chunks.snapshots.listed(exact, all_places=trial.codec == exact)
        return manifest_of(build, BuiltCache(trial.entries, trial.codec, trial.fidelity, None, states))

    def _stored_bytes(self, manifest: Manifest) -> dict[str, int]:
        """Every file of the cache as it lies in the store, for which it is committed."""
        digest = self._store.commit(self._name, manifest)
        sizes = {path: self._store.backend.stat(path).size_bytes for path in object_paths(manifest)}
        basis = self._store.blob_bytes(config_resources(manifest.codec))
        chunks = sum(entry.stored_bytes for entry in manifest.chunks)
        states = manifest.states.stored_bytes if manifest.states is not None else 0
        found = {
            "chunks": chunks,
            "states": states,
            "texts": sum(sizes.values()) - chunks - states - basis,
            "basis": basis,
            "manifest": self._store.backend.stat(manifest_path(digest)).size_bytes,
            "ref": self._store.backend.stat(ref_path(self._name)).size_bytes,
        }
        return found | {"total": sum(found.values())}


def ready_codecs(
    engine: Engine, codecs: Sequence[dict[str, Any]], progress: Progress
) -> tuple[list[dict[str, Any]], float]:
    """Full configurations, and the seconds that the model's basis took: to make it, or to find it made."""
    begin, base = time.perf_counter(), None
    found = []
    for codec in codecs:
        if codec["id"] == "transform" and "basis" not in codec:
            base = base or codec_of("transform", engine.model, engine.store, progress)
            found.append({**base, **codec})
        else:
            found.append(codec_of(codec, engine.model, engine.store))
    return found, time.perf_counter() - begin if base else 0.0


def warm_up(engine: Engine) -> None:
    """What is compiled or first touched, before any clock runs."""
    for thread in threading.enumerate():
        if thread.name == "cag-warm-up":
            thread.join()
    tokens = min(BLOCK_TOKENS, _room(engine))
    engine.model.forward([0] * tokens, engine.model.new_state(capacity=tokens))


def _room(engine: Engine) -> int:
    """Tokens of the window, less those that probes need behind the cache."""
    return max(1, engine.model.window_tokens - 256)


def _model_facts(engine: Engine) -> dict[str, Any]:
    prints = engine.model.fingerprints
    return {
        "id": engine.model.model_id,
        "fingerprint": prints.weights,
        "kv_bytes_per_token": engine.model.kv_bytes_per_token,
        "num_layers": len(engine.model.kv_shapes),
    }
