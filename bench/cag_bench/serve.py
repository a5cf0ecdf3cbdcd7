"""`cag bench serve`: many sessions on one prefix, asked together and one by one, in one interleaved run.

Documents and questions in; `results.jsonl` (a row a round, size and arm: seconds, tokens, first tokens, with machine,
commit and versions), `summary.json` and `table.md` out. Answers of both arms are compared token for token: a speed of
other answers would be none.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cag.answer import Answer
from cag.engine import Engine
from cag.errors import UsageError
from cag.generate import SamplingOptions
from cag.model import LanguageModel
from cag.prefix import Prefix
from cag.prompt import lay_out
from cag_bench.cache import build_bench_cache
from cag_bench.corpus import BenchCorpus
from cag_bench.figures import median, paired_ratio, percentiles
from cag_bench.provenance import commit, load_average, machine_facts, versions
from cag_bench.questions import Question
from cag_bench.rows import SUMMARY, TABLE, ResultRows, write_json

Progress = Callable[[str, int, int], None]
ALONE, TOGETHER = "alone", "together"
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class ServeOptions:
    """sessions: how many at once, a size each; max_tokens: of every answer, exactly; rounds: of all sizes and arms."""

    sessions: Sequence[int] = (1, 4, 16)
    max_tokens: int = 32
    rounds: int = 5
    seed: int = 0
    codec: str = "lossless"

    def __post_init__(self) -> None:
        if not self.sessions or min(*self.sessions, self.max_tokens, self.rounds) < 1:
            raise UsageError("sessions, tokens and rounds must be at least 1.")


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
    with ResultRows(out, origin) as results, engine.open(cache.name) as prefix, _whole_answers(engine.model):
        prefix.resident.wait()
        for size in options.sessions:
            prefix.ask_all(_asked(questions, size, 0), max_tokens=WARM_UP_TOKENS)
        for row in _measured(prefix, questions, options, progress):
            results.write_row("round", row)
            rows.append(row)
        facts = {"cache": cache.facts(), "options": asdict(options), "load_average_end": load_average()}
        results.write_run(facts)
    summary = {**origin, **facts, "model": engine.model.model_id, "sessions": _figures(rows, options)}
    write_json(out / SUMMARY, summary)
    (out / TABLE).write_text(markdown(summary), encoding="utf-8")
    return summary


@contextmanager
def _whole_answers(model: LanguageModel) -> Iterator[None]:
    """Stop tokens are not heeded inside, so that every answer has as many tokens as were asked for."""
    stop_ids, model.stop_ids = model.stop_ids, frozenset()
    try:
        yield
    finally:
        model.stop_ids = stop_ids


def _asked(questions: Sequence[Question], size: int, number: int) -> list[str]:
    """The questions of a round; they come round again where there are too few."""
    return [questions[(number * size + index) % len(questions)].question for index in range(size)]


def _measured(
    prefix: Prefix, questions: Sequence[Question], options: ServeOptions, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Round by round all sizes, of each both arms one behind the other, in an order drawn anew each time."""
    order, done = random.Random(options.seed), 0
    total = options.rounds * len(options.sessions)
    for number in range(options.rounds):
        for size in order.sample(list(options.sessions), len(options.sessions)):
            progress("measure, rounds", done, total)
            asked, answers = _asked(questions, size, number), {}
            pair = []
            for arm in order.sample([ALONE, TOGETHER], 2):
                begin = time.perf_counter()
                answers[arm] = _answers(prefix, asked, arm, options)
                pair.append(_row(answers[arm], time.perf_counter() - begin) | {"arm": arm})
            same = sum(mine.token_ids == other.token_ids for mine, other in zip(*answers.values(), strict=True))
            for row in pair:
                yield row | {"round": number, "sessions": size, "same_answers": same, "load_average": load_average()}
            done += 1


def _answers(prefix: Prefix, asked: list[str], arm: str, options: ServeOptions) -> list[Answer]:
    sampling = SamplingOptions(max_tokens=options.max_tokens)
    return prefix.ask_all(asked, sampling) if arm == TOGETHER else [prefix.ask(one, sampling) for one in asked]


def _row(answers: list[Answer], seconds: float) -> dict[str, Any]:
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "seconds": seconds,
        "completion_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "ttft_s": [answer.timings.ttft_s for answer in answers],
        "tpot_s": [answer.timings.tpot_s for answer in answers],
    }


def _figures(rows: list[dict[str, Any]], options: ServeOptions) -> list[dict[str, Any]]:
    """One entry a size: of each arm the median speed and first tokens, and the ratio of the speeds pair by pair."""
    found = []
    for size in options.sessions:
        of_size = [row for row in rows if row["sessions"] == size]
        arms = {arm: [row for row in of_size if row["arm"] == arm] for arm in (ALONE, TOGETHER)}
        speeds = {arm: [row["tokens_per_s"] for row in of_arm] for arm, of_arm in arms.items()}
        pairs = list(zip(speeds[TOGETHER], speeds[ALONE], strict=True))
        found.append(
            {
                "sessions": size,
                "arms": {
                    arm: {
                        "tokens_per_s": median(speeds[arm]),
                        "ttft_s": percentiles([value for row in of_arm for value in row["ttft_s"]]),
                        "tpot_s": percentiles([value for row in of_arm for value in row["tpot_s"]]),
                    }
                    for arm, of_arm in arms.items()
                },
                "together_over_alone": paired_ratio(pairs, options.seed),
                "answers": size * options.rounds,
                "same_answers": sum(row["same_answers"] for row in arms[TOGETHER]),
            }
        )
    return found


HEADER = ("sessions", "arm", "tokens/s", "first token p50", "p90", "per token p50", "together / alone", "same answers")


def markdown(summary: dict[str, Any]) -> str:
    """The table with what it was measured on above."""
    machine, cache, options = summary["machine"], summary["cache"], summary["options"]
    lines = [
        "# Many sessions on one prefix",
        "",
        f"- machine: {machine.get('gpu') or machine['processor']}, {machine['cores']} cores",
        f"- code: {summary['commit']}",
        f"- {summary['model']}, prefix of {cache['num_tokens']} tokens, codec {cache['codec']['id']}; answers of "
        f"{options['max_tokens']} tokens, stop tokens not heeded; {options['rounds']} rounds",
        "- alone: one question behind the other, first tokens from the beginning of each; together: all at once; "
        "milliseconds, ratios are medians of pairs",
        "",
    ]
    lines += [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *_table_rows(summary))]
    return "\n".join(lines) + "\n"


def _table_rows(summary: dict[str, Any]) -> Iterator[list[str]]:
    for entry in summary["sessions"]:
        for arm, figures in entry["arms"].items():
            ratio = f"{entry['together_over_alone']['p50']:.2f}" if arm == TOGETHER else ""
            same = f"{entry['same_answers']} of {entry['answers']}" if arm == TOGETHER else ""
            times = (figures["ttft_s"]["p50"], figures["ttft_s"]["p90"], figures["tpot_s"]["p50"])
            cells = [str(entry["sessions"]), arm, f"{figures['tokens_per_s']:.1f}"]
            yield [*cells, *(f"{seconds * 1e3:.1f}" for seconds in times), ratio, same]
