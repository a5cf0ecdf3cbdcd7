"""The first-token benchmark: a cache against reading everything again and against RAG, in one run on one model.

A straight walk: build the cache, index the passages, warm up, measure question by question, write the results. A
loaded engine, a corpus and questions go in; files and the summary come out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cag.engine import Engine
from cag.errors import UsageError
from cag.generation.generate import SamplingOptions
from cag.prompt import PrefixLayout, lay_out
from cag.retrieval import Retriever
from cag_bench.arm_names import DEFAULT_ARMS, FULL_PREFILL, ArmSpec, parse_arms
from cag_bench.arms import ArmContext, open_arms
from cag_bench.cache import BenchCache, build_bench_cache
from cag_bench.corpus import BenchCorpus
from cag_bench.exact_prefix import cut_corpus
from cag_bench.measure import MeasurePlan, Refused, Sample, measure, num_samples, warm_up
from cag_bench.notes import busy_notes, run_notes
from cag_bench.plot import plot_ttft, require_matplotlib
from cag_bench.provenance import commit, load_average, machine_facts, versions
from cag_bench.questions import Question
from cag_bench.retrieval import build_retrievers, load_embedder, needs_embedder, questions_with_gold, retrieval_quality
from cag_bench.rows import PLOT, SUMMARY, TABLE, ResultRows, write_json
from cag_bench.summary import arm_details, arm_figures, break_even, by_arm, loading_ratio, ratios
from cag_bench.table import markdown_table

Progress = Callable[[str, int, int], None]
PRINTED = ("machine", "commit", "versions", "arms", "ratios", "notes")


@dataclass(frozen=True)
class TtftOptions:
    """How a run goes. `n` takes the first questions of the file, all if None; `full_n` the first of those for
    `full-prefill`. `prefix_tokens` cuts the corpus to exactly as many tokens with its prompt."""

    arms: tuple[ArmSpec, ...] = parse_arms(DEFAULT_ARMS)
    n: int | None = None
    full_n: int | None = None
    max_tokens: int = 32
    seed: int = 0
    codec: str = "lossless"
    prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("n", "full_n", "prefix_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} is {value}; it must be at least 1.")
        self.sampling()

    def sampling(self) -> SamplingOptions:
        """The same for every arm: greedy. Raises: `UsageError` for a `max_tokens` below 1."""
        return SamplingOptions(max_tokens=self.max_tokens, speculate=False)  # no arm has drafts, or all would need them

    def to_json(self) -> dict[str, Any]:
        """As the row of the run keeps it."""
        return asdict(self) | {"arms": [spec.name for spec in self.arms]}


@dataclass(frozen=True)
class TtftResult:
    """What was measured: the content of `summary.json`, and every sample."""

    summary: dict[str, Any]
    samples: list[Sample]

    def printed(self) -> dict[str, Any]:
        """The object that `cag bench ttft --json` prints."""
        extra = arm_details([]).keys()
        arms = {
            name: {key: value for key, value in arm.items() if key not in extra}
            for name, arm in self.summary["arms"].items()
        }
        return {key: self.summary[key] for key in PRINTED} | {"arms": arms}


def run_ttft(
    engine: Engine,
    corpus: BenchCorpus,
    questions: Sequence[Question],
    options: TtftOptions,
    out: Path,
    progress: Progress,
) -> TtftResult:
    """Measure the arms of `options` and write `results.jsonl`, `summary.json`, `table.md` and `ttft.png` into `out`.

    Raises:
        CorpusTooLarge: a cached arm is wanted and the corpus exceeds the model's window.
        PrefixRecomputed: a cached arm computed what the cache should have served; the run is refused.
        RequestTooLong: an arm that no question leaves room in the model's window.
        UsageError: no question, no matplotlib, or a corpus that has no cut of the size wanted.
    """
    require_matplotlib()
    machine = machine_facts(engine.model) | {"load_average_begin": load_average()}
    origin = {"machine": machine, "commit": commit(), "versions": versions()}
    run = _prepare(engine, corpus, questions, options, progress)
    context = ArmContext(engine, run.layout, run.cache.name if run.cache else None, run.retrievers)
    with ResultRows(out, origin) as rows, open_arms(options.arms, context) as arms:
        progress("warm-up", 0, 0)
        warmed = warm_up(arms, [run.spare, *run.asked], run.plan)
        sink = _SampleSink(rows, progress, num_samples([arm.name for arm in arms], len(run.asked), run.plan))
        samples = measure(arms, run.scored(), run.plan, sink, sink.refused)
        machine |= {"load_average_end": load_average()}
        groups = by_arm(samples, [spec.name for spec in options.arms])
        facts = run.facts(groups, warmed)
        facts["notes"] += busy_notes(machine)
        rows.write_run(facts)
    summary = origin | facts | run.figures(groups)
    _write_files(out, summary, groups)
    return TtftResult(summary, samples)


@dataclass(frozen=True)
class _PreparedRun:
    """Everything that is made before the clock. `spare` is the question of the warm-up."""

    engine: Engine
    corpus: BenchCorpus
    options: TtftOptions
    asked: list[Question]
    spare: Question
    layout: PrefixLayout
    cache: BenchCache | None
    retrievers: dict[str, Retriever]
    index_s: float
    plan: MeasurePlan

    @cached_property
    def with_gold(self) -> list[Question]:
        """The questions whose supporting texts are in the corpus."""
        return questions_with_gold(self.asked, self.corpus.passages)[0]

    def scored(self) -> list[Question]:
        """The questions; those whose supporting texts the corpus has not name none, as nobody can find them."""
        return [q if q in self.with_gold else replace(q, doc_ids=(), passage_ids=()) for q in self.asked]

    def facts(self, groups: dict[str, list[Sample]], warmed: list[str]) -> dict[str, Any]:
        """The row of the run, origin left out."""
        quality = {
            kind: retrieval_quality(retriever, self.asked, self.corpus.passages)
            for kind, retriever in self.retrievers.items()
        }
        return {
            "model": _model_facts(self.engine),
            "corpus": self.corpus.facts() | {"num_tokens": len(self.layout.token_ids)},
            "cache": self.cache.facts() if self.cache else None,
            "options": self.options.to_json() | {"num_questions": len(self.asked)},
            "retrieval": {"index_s": self.index_s, "quality": quality} if quality else {},
            "notes": run_notes(
                groups,
                self.asked,
                self.plan,
                self.cache,
                warmed,
                loading_ratio(groups),
                len(self.with_gold),
            ),
        }

    def figures(self, groups: dict[str, list[Sample]]) -> dict[str, Any]:
        """What the summary adds to the facts."""
        return {
            "arms": {name: arm_figures(group) | arm_details(group) for name, group in groups.items()},
            "ratios": ratios(groups),
            "disk_over_hot_and_read": loading_ratio(groups),
            "break_even_questions": break_even(groups, self.cache.build_s if self.cache else None),
        }


def _prepare(
    engine: Engine, corpus: BenchCorpus, questions: Sequence[Question], options: TtftOptions, progress: Progress
) -> _PreparedRun:
    asked, spare = _chosen(questions, options.n)
    if options.prefix_tokens is not None:
        corpus = cut_corpus(corpus, engine.model.tokenizer, engine.model.template, options.prefix_tokens)
    layout = lay_out(engine.model.tokenizer, engine.model.template, corpus.documents)
    cache = _cache(engine, corpus, layout, options, progress)
    retrievers, index_s = _retrievers(engine, corpus, options, progress)
    plan = _plan(options, engine, layout)
    return _PreparedRun(engine, corpus, options, asked, spare, layout, cache, retrievers, index_s, plan)


class _SampleSink:
    """Writes each sample and tells how many there are."""

    def __init__(self, rows: ResultRows, progress: Progress, total: int) -> None:
        self._rows = rows
        self._progress = progress
        self._total = total
        self._done = 0
        progress("measure, answers", 0, total)

    def __call__(self, sample: Sample) -> None:
        self._rows.write_sample(sample)
        self._count()

    def refused(self, refused: Refused) -> None:
        """Of a question that an arm has no sample of."""
        self._rows.write_row("refused", asdict(refused))
        self._count()

    def _count(self) -> None:
        self._done += 1
        self._progress("measure, answers", self._done, self._total)


def _chosen(questions: Sequence[Question], n: int | None) -> tuple[list[Question], Question]:
    """The questions to ask, and one for the warm-up: the first that is not asked, else the first."""
    if not questions:
        raise UsageError("there is no question to ask.")
    asked = list(questions[:n])
    return asked, questions[len(asked)] if len(asked) < len(questions) else questions[0]


def _cache(
    engine: Engine, corpus: BenchCorpus, layout: PrefixLayout, options: TtftOptions, progress: Progress
) -> BenchCache | None:
    if not any(spec.is_cached for spec in options.arms):
        return None
    return build_bench_cache(engine, corpus, layout, options.codec, progress)


def _retrievers(
    engine: Engine, corpus: BenchCorpus, options: TtftOptions, progress: Progress
) -> tuple[dict[str, Retriever], float]:
    """The retrievers of the run's RAG arms, and the seconds that their indexes took."""
    kinds = {spec.retriever for spec in options.arms if spec.retriever is not None}
    if not kinds:
        return {}, 0.0
    progress("index passages", 0, 0)
    embedder = load_embedder(engine.model.device.type) if needs_embedder(kinds) else None
    begin = time.perf_counter()
    retrievers = build_retrievers(kinds, corpus.passages, embedder)
    return retrievers, time.perf_counter() - begin


def _plan(options: TtftOptions, engine: Engine, layout: PrefixLayout) -> MeasurePlan:
    """Reading the corpus whole is warm already when this process has read as much, as a build before does."""
    names = {spec.name for spec in options.arms}
    was_read = engine.model.most_read_tokens >= len(layout.token_ids)
    warmed_up = frozenset({FULL_PREFILL} & names) if was_read else frozenset()
    return MeasurePlan(options.sampling(), options.seed, options.full_n, warmed_up)


def _model_facts(engine: Engine) -> dict[str, Any]:
    prints = engine.model.fingerprints
    return {
        "id": engine.model.model_id,
        "fingerprint": prints.weights,
        "tokenizer_fingerprint": prints.tokenizer,
        "template_fingerprint": prints.template,
        "adapter_fingerprint": prints.adapter,
        "window_tokens": engine.model.window_tokens,
    }


def _write_files(out: Path, summary: dict[str, Any], groups: dict[str, list[Sample]]) -> None:
    write_json(out / SUMMARY, summary)
    (out / TABLE).write_text(markdown_table(summary), encoding="utf-8")
    title = f"{summary['model']['id']}, {summary['corpus']['num_tokens']} tokens of corpus and prompt"
    plot_ttft({name: [sample.ttft_s for sample in group] for name, group in groups.items()}, title, out / PLOT)
