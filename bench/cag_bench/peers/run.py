"""`cag bench peers`: caches of ours against other engines, on the same tokens, in one run.

A straight walk: cut the corpus, build the caches, let the peers read the prefix, warm up, measure question by question
and then many sessions at once, write the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cag.engine import Engine
from cag.errors import UsageError
from cag.prompt import PrefixLayout, lay_out, question_ids
from cag_bench.arm_names import DISK as DISK_ARM
from cag_bench.arm_names import HOT
from cag_bench.arms import BenchArm
from cag_bench.arms.cached import HotArm, StoredArm
from cag_bench.cache import BenchCache, build_bench_cache
from cag_bench.corpus import BenchCorpus
from cag_bench.exact_prefix import cut_corpus
from cag_bench.figures import percentiles
from cag_bench.full_answers import answer_reader, answers_of_full_length
from cag_bench.peers.measure import PeerSample, SessionsSample, measure_questions, measure_sessions
from cag_bench.peers.parties import (
    DISK,
    MEMORY,
    AskedQuestion,
    CagParty,
    CagSessions,
    Party,
    PeerParty,
    PeerSessions,
    SessionsParty,
)
from cag_bench.peers.process import PeerProcess
from cag_bench.peers.specs import LLAMA_CPP, VLLM, PeerFacts, PeerLimits, PeerSpec, read_facts
from cag_bench.peers.summary import grouped, party_figures, question_ratios, sessions_figures, sessions_ratios
from cag_bench.peers.table import markdown
from cag_bench.provenance import commit, load_average, machine_facts, versions
from cag_bench.questions import Question
from cag_bench.rows import SUMMARY, TABLE, ResultRows, write_json

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PeersOptions:
    """How a run goes. `num_tokens` are those of an answer; `num_sessions` 0 leaves the sessions out; `timeout_s` is for
    one answer of a peer, its preparation included."""

    prefix_tokens: int = 4096
    codecs: tuple[str, ...] = ("lossless", "int8")
    num_questions: int = 8
    num_tokens: int = 16
    num_sessions: int = 16
    num_rounds: int = 3
    num_threads: int = 2
    timeout_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_tokens": 2} | dict.fromkeys(("num_questions", "num_rounds", "num_threads", "prefix_tokens"), 1)
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UsageError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {value}.")
        if self.num_sessions < 0 or not self.codecs or not self.timeout_s > 0:
            raise UsageError("there must be a codec, a time to wait, and no negative number of sessions.")
        if len(set(self.codecs)) < len(self.codecs):
            raise UsageError(f"a codec is named twice: {', '.join(self.codecs)}.")


@dataclass
class _Bench:
    """What is ready to be measured."""

    parties: list[Party] = field(default_factory=list)
    sessions: list[SessionsParty] = field(default_factory=list)
    peers: list[PeerFacts] = field(default_factory=list)
    caches: list[BenchCache] = field(default_factory=list)


def run_peers(
    engine: Engine,
    corpus: BenchCorpus,
    questions: Sequence[Question],
    specs: Sequence[PeerSpec],
    options: PeersOptions,
    out: Path,
    progress: Progress,
    before_clock: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure, and write `results.jsonl`, `summary.json` and `table.md` into `out`; returns the summary.

    `before_clock` is called when all is prepared and warm.

    Raises:
        PeerError: a peer failed; rows so far are written.
        PrefixRecomputed: a cached arm computed what the cache should have served.
        UsageError: no question, or a corpus that has no cut of the size wanted.
    """
    out.mkdir(parents=True, exist_ok=True)
    cut = cut_corpus(corpus, engine.model.tokenizer, engine.model.template, options.prefix_tokens)
    layout = lay_out(engine.model.tokenizer, engine.model.template, cut.documents)
    asked = asked_questions(engine, questions)
    with (
        TemporaryDirectory(prefix="state-", dir=out) as states,
        answers_of_full_length(engine.model),
        _opened(engine, cut, layout, asked, specs, options, Path(states), out, progress) as bench,
    ):
        many = [asked[place % len(asked)] for place in range(options.num_sessions)]
        _warm_up(bench, asked[-1], many, progress)
        before_clock()
        machine = machine_facts(engine.model) | {"load_average_begin": load_average()}
        peers = {facts.name: facts.to_json() for facts in bench.peers}
        origin = {"machine": machine, "commit": commit(), "versions": versions(), "peers": peers}
        with ResultRows(out, origin) as rows:
            samples, rounds = _measure(bench, asked, many, options, rows, progress)
            machine |= {"load_average_end": load_average()}
            facts = _facts(engine, cut, asked, bench, specs, options, samples)
            rows.write_row("run", facts)
    figures = _figures(engine, asked, samples, rounds)
    summary = {**origin, **facts, **figures}
    write_json(out / SUMMARY, summary)
    (out / TABLE).write_text(markdown(summary), encoding="utf-8")
    return summary


def asked_questions(engine: Engine, questions: Sequence[Question]) -> list[AskedQuestion]:
    """Questions with their tokens behind a prefix. Raises: `UsageError` without questions."""
    if not questions:
        raise UsageError("there is no question to ask.")
    model = engine.model
    return [
        AskedQuestion(q.qid, q.question, question_ids(model.tokenizer, model.template, q.question), q.answers, q.all_of)
        for q in questions
    ]


@contextmanager
def _opened(
    engine: Engine,
    corpus: BenchCorpus,
    layout: PrefixLayout,
    asked: Sequence[AskedQuestion],
    specs: Sequence[PeerSpec],
    options: PeersOptions,
    states: Path,
    out: Path,
    progress: Progress,
) -> Iterator[_Bench]:
    """All parties, ready; closed at the end. Ours first, so that peers do not idle meanwhile."""
    bench = _Bench()
    with ExitStack() as stack:
        for codec in options.codecs:
            cache = build_bench_cache(engine, corpus, layout, codec, progress)
            bench.caches.append(cache)
            hot: BenchArm = HotArm(HOT, engine, cache.name)
            disk: BenchArm = StoredArm(DISK_ARM, engine, cache.name, from_disk=True)
            for arm, source in ((hot, MEMORY), (disk, DISK)):
                stack.callback(arm.close)
                bench.parties.append(CagParty(arm, codec, source))
            prefix = stack.enter_context(engine.open(cache.name))
            bench.sessions.append(CagSessions(f"cag@{codec}", prefix))
        longest = max(len(question.token_ids) for question in asked)
        room = len(layout.token_ids) + longest + options.num_tokens
        limits = PeerLimits(options.num_threads, -(-room // 256) * 256, max(1, options.num_sessions))
        for spec in specs:
            progress(f"prepare {spec.name}", 0, 0)
            process = stack.enter_context(
                PeerProcess(spec.name, spec.command, out / f"{spec.name}.log", options.num_threads)
            )
            request = spec.preparation(layout.token_ids.tolist(), limits, states)
            _add_peer(bench, spec, process, process.request(request, options.timeout_s), options)
        if not options.num_sessions:
            bench.sessions = []
        yield bench


def _add_peer(
    bench: _Bench, spec: PeerSpec, process: PeerProcess, answer: dict[str, Any], options: PeersOptions
) -> None:
    facts = read_facts(answer, spec, process)
    bench.peers.append(facts)
    for source in spec.sources:
        path = facts.state_path if source == DISK else None
        name = f"{spec.name} {source}"
        bench.parties.append(PeerParty(name, process, source, options.timeout_s, path, options.prefix_tokens))
    bench.sessions.append(PeerSessions(spec.name, process, options.timeout_s))


def _warm_up(bench: _Bench, question: AskedQuestion, many: Sequence[AskedQuestion], progress: Progress) -> None:
    """One question of each party, and all sessions once, for two tokens, uncounted."""
    progress("warm-up", 0, 0)
    for party in bench.parties:
        party.ask(question, 2)
    for sessions in bench.sessions:
        sessions.ask_all(many, 2)


def _measure(
    bench: _Bench,
    asked: Sequence[AskedQuestion],
    many: Sequence[AskedQuestion],
    options: PeersOptions,
    rows: ResultRows,
    progress: Progress,
) -> tuple[list[PeerSample], list[SessionsSample]]:
    chosen = asked[: options.num_questions]
    progress("measure questions", 0, 0)
    samples = measure_questions(
        bench.parties, chosen, options.num_tokens, options.seed, lambda s: rows.write_row("sample", s.to_json())
    )
    if not bench.sessions:
        return samples, []
    progress("measure sessions", 0, 0)
    rounds = measure_sessions(
        bench.sessions,
        many,
        options.num_tokens,
        options.num_rounds,
        options.seed,
        lambda s: rows.write_row("sessions", s.to_json()),
    )
    return samples, rounds


def _facts(
    engine: Engine,
    corpus: BenchCorpus,
    asked: Sequence[AskedQuestion],
    bench: _Bench,
    specs: Sequence[PeerSpec],
    options: PeersOptions,
    samples: Sequence[PeerSample],
) -> dict[str, Any]:
    return {
        "model": {"id": engine.model.model_id, "fingerprint": engine.model.fingerprints.weights},
        "corpus": corpus.facts(),
        "caches": {name: cache.facts() for name, cache in zip(options.codecs, bench.caches, strict=True)},
        "options": asdict(options),
        "prefix_tokens": options.prefix_tokens,
        "question_tokens": percentiles([len(q.token_ids) for q in asked[: options.num_questions]]),
        "notes": _notes(specs, options, samples),
    }


def _notes(specs: Sequence[PeerSpec], options: PeersOptions, samples: Sequence[PeerSample]) -> list[str]:
    kept = sum(sample.page_cache_dropped is False for sample in samples)
    missing = [name for name in (VLLM, LLAMA_CPP) if not any(spec.name.startswith(name) for spec in specs)]
    notes = [
        "Same token ids for all, greedy, answers of exactly "
        f"{options.num_tokens} tokens; for each question all parties were asked, one at a time, in an order drawn for "
        f"it (seed {options.seed}). Warm-up, not counted: one question and two tokens of all sessions each.",
        "Ratios are medians of pairs; intervals are those of the median by order statistics, from 6 pairs on.",
        "Prefix on disk: opening, loading and first token, the page cache dropped for the files before each question"
        + (f", which failed {kept} times." if kept else "."),
        "Sessions: all questions arrive at once; the clock ends with the last token. Ours and vLLM share the prefix, "
        "llama.cpp has a copy of it for each sequence.",
    ]
    return notes + [f"{name} was left out: its Python was not given." for name in missing]


def _figures(
    engine: Engine,
    asked: Sequence[AskedQuestion],
    samples: Sequence[PeerSample],
    rounds: Sequence[SessionsSample],
) -> dict[str, Any]:
    """What the summary adds to the facts. `reference` of agreement is our first codec in memory."""
    groups = grouped(samples)
    reference = next(group for name, group in groups.items() if name.startswith(HOT))
    text_of = answer_reader(engine.model)
    ratios = question_ratios(samples)
    if rounds:
        ratios["tokens_per_s"] = sessions_ratios(rounds)
    return {
        "parties": {name: party_figures(group, reference, asked, text_of) for name, group in groups.items()},
        "sessions": {name: sessions_figures(group) for name, group in grouped(rounds).items()},
        "ratios": ratios,
    }
