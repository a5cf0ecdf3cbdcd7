"""`cag bench serve`: many sessions on one prefix, asked together and one by one, in one interleaved run.

Documents and questions in; `results.jsonl` (a row a round, size and arm: seconds, tokens, first tokens, with machine,
commit and versions), `summary.json` and `table.md` out. With `speculate` each arm is run with drafts too. Answers of
all arms are compared token for token: a speed of other answers would be none; and with the accepted ones.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cag.engine import Engine
from cag.errors import UsageError
from cag.generation.answer import Answer
from cag.generation.generate import SamplingOptions
from cag.prefix import Prefix
from cag.prompt import lay_out
from cag_bench.cache import build_bench_cache
from cag_bench.corpus import BenchCorpus
from cag_bench.figures import mean, median, paired_ratio, percentiles
from cag_bench.full_answers import answer_reader, answers_of_full_length
from cag_bench.provenance import commit, load_average, machine_facts, versions
from cag_bench.questions import Question
from cag_bench.rows import SUMMARY, TABLE, ResultRows, write_json
from cag_bench.serve_table import markdown
from cag_bench.text_metrics import containment

Progress = Callable[[str, int, int], None]
ALONE, TOGETHER = "alone", "together"
WITH_DRAFTS = {ALONE: "alone, drafts", TOGETHER: "together, drafts"}
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class ServeOptions:
    """sessions: how many at once, a size each; rounds: of all sizes and arms; max_tokens: of every answer, exactly.

    speculate: arms with drafts too; then answers end where they end, with `max_tokens` at most, as what a model says
    behind its answer repeats itself and would flatter drafts.
    """

    sessions: Sequence[int] = (1, 4, 16)
    max_tokens: int = 32
    rounds: int = 5
    seed: int = 0
    codec: str = "lossless"
    speculate: bool = False

    def __post_init__(self) -> None:
        if not self.sessions or min(*self.sessions, self.max_tokens, self.rounds) < 1:
            raise UsageError("sessions, tokens and rounds must be at least 1.")
        if len(set(self.sessions)) < len(self.sessions):
            raise UsageError("a number of sessions is named twice.")

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return [ALONE, TOGETHER, *(WITH_DRAFTS.values() if self.speculate else ())]


def run_serve(
    engine: Engine,
    corpus: BenchCorpus,
    questions: Sequence[Question],
    options: ServeOptions,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Measure, write the files, and return what `summary.json` holds.

    Raises:
        CorpusTooLarge: more documents than the model's window takes.
    """
    origin = {"machine": machine_facts(engine.model), "commit": commit(), "versions": versions()}
    layout = lay_out(engine.model.tokenizer, engine.model.template, corpus.documents)
    cache = build_bench_cache(engine, corpus, layout, options.codec, progress)
    rows: list[dict[str, Any]] = []
    text_of = answer_reader(engine.model)
    lengths = nullcontext() if options.speculate else answers_of_full_length(engine.model)
    with ResultRows(out, origin) as results, engine.open(cache.name) as prefix, lengths:
        prefix.resident.wait()
        for size in options.sessions:
            for arm in options.arms:
                _answers(prefix, _asked(questions, size, 0), arm, replace(options, max_tokens=WARM_UP_TOKENS))
        for row in _measured(prefix, questions, options, text_of, progress):
            results.write_row("round", row)
            rows.append(row)
        facts: dict[str, Any] = {"cache": cache.facts(), "options": asdict(options), "load_average_end": load_average()}
        facts |= {"model": engine.model.model_id, "model_fingerprint": engine.model.fingerprints.weights}
        facts |= {"corpus": corpus.facts(), "num_questions": len(questions)}
        results.write_run(facts)
    summary = {**origin, **facts, "sessions": _figures(rows, options)}
    write_json(out / SUMMARY, summary)
    (out / TABLE).write_text(markdown(summary), encoding="utf-8")
    return summary


def _asked(questions: Sequence[Question], size: int, number: int) -> list[Question]:
    """The questions of a round; they come round again where there are too few."""
    return [questions[(number * size + index) % len(questions)] for index in range(size)]


def _measured(
    prefix: Prefix,
    questions: Sequence[Question],
    options: ServeOptions,
    text_of: Callable[[Sequence[int]], str],
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Round by round all sizes, of each all arms one behind the other, in an order drawn anew each time."""
    order, done = random.Random(options.seed), 0
    total = options.rounds * len(options.sessions)
    for number in range(options.rounds):
        for size in order.sample(list(options.sessions), len(options.sessions)):
            progress("measure, rounds", done, total)
            asked, answers = _asked(questions, size, number), {}
            of_round = []
            for arm in order.sample(options.arms, len(options.arms)):
                begin = time.perf_counter()
                answers[arm] = _answers(prefix, asked, arm, options)
                of_round.append(_row(answers[arm], time.perf_counter() - begin) | {"arm": arm})
                of_round[-1] |= _said(asked, [text_of(answer.token_ids) for answer in answers[arm]])
            same = sum(len({one.token_ids for one in of_one}) == 1 for of_one in zip(*answers.values(), strict=True))
            for row in of_round:
                yield row | {"round": number, "sessions": size, "same_answers": same, "load_average": load_average()}
            done += 1


def _said(asked: Sequence[Question], texts: list[str]) -> dict[str, Any]:
    """Texts of the answers, and whether they contain the accepted ones; None for questions that have none."""
    scores = [
        containment(text, one.answers, one.all_of) if one.answers else None
        for one, text in zip(asked, texts, strict=True)
    ]
    return {"qids": [one.qid for one in asked], "answers": texts, "containment": scores}


def _answers(prefix: Prefix, questions: Sequence[Question], arm: str, options: ServeOptions) -> list[Answer]:
    asked = [one.question for one in questions]
    sampling = SamplingOptions(max_tokens=options.max_tokens, speculate=arm in WITH_DRAFTS.values())
    if arm in (TOGETHER, WITH_DRAFTS[TOGETHER]):
        return prefix.ask_all(asked, sampling)
    return [prefix.ask(one, sampling) for one in asked]


def _row(answers: list[Answer], seconds: float) -> dict[str, Any]:
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "seconds": seconds,
        "completion_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "ttft_s": [answer.timings.ttft_s for answer in answers],
        "tpot_s": [answer.timings.tpot_s for answer in answers],
        "drafted_tokens": sum(answer.usage.drafted_tokens for answer in answers),
        "accepted_tokens": sum(answer.usage.accepted_tokens for answer in answers),
    }


def _figures(rows: list[dict[str, Any]], options: ServeOptions) -> list[dict[str, Any]]:
    """One entry a size: of each arm the median speed and first tokens, and ratios of speeds round by round."""
    found = []
    for size in options.sessions:
        of_size = [row for row in rows if row["sessions"] == size]
        arms = {arm: [row for row in of_size if row["arm"] == arm] for arm in options.arms}
        speeds = {arm: [row["tokens_per_s"] for row in of_arm] for arm, of_arm in arms.items()}

        def ratio(arm: str, base: str, of: dict[str, list[float]] = speeds) -> dict[str, Any] | None:
            return paired_ratio(list(zip(of[arm], of[base], strict=True)))

        entry: dict[str, Any] = {
            "sessions": size,
            "arms": {arm: _arm_figures(of_arm) for arm, of_arm in arms.items()},
            "together_over_alone": ratio(TOGETHER, ALONE),
            "answers": size * options.rounds,
            "same_answers": sum(row["same_answers"] for row in arms[TOGETHER]),
        }
        if options.speculate:
            entry["drafts_over_none"] = {arm: ratio(drafted, arm) for arm, drafted in WITH_DRAFTS.items()}
        found.append(entry)
    return found


def _arm_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times per further token are those of answers that have one, None where none has."""
    return {
        "tokens_per_s": median([row["tokens_per_s"] for row in rows]),
        "ttft_s": percentiles([value for row in rows for value in row["ttft_s"]]),
        "tpot_s": percentiles([value for row in rows for value in row["tpot_s"] if value]),
        "containment": mean([score for row in rows for score in row["containment"] if score is not None]),
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "drafted_tokens": sum(row["drafted_tokens"] for row in rows),
        "accepted_tokens": sum(row["accepted_tokens"] for row in rows),
    }
