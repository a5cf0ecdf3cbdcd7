"""`cag bench gpu`: all parts one behind the other within a budget, a row a figure with its floor and its bar.

Sizes in; `results.jsonl`, `summary.json` and `table.md` out. A part that fails or that there is no time for is a row
that says so; the others go on, and every row is written when it is there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cag.model import LanguageModel
from cag.residency.resident import ResidentPrefix
from cag_bench.figures import percentiles
from cag_bench.gpu.answers import Answers, Part, check_steps
from cag_bench.gpu.attention import attention_rows
from cag_bench.gpu.clock import Budget, failure, median_of, peak_bytes, released
from cag_bench.gpu.loads import load_row
from cag_bench.gpu.model import KINDS, random_model, random_prefix
from cag_bench.gpu.retrieval import retrieval_samples
from cag_bench.gpu.shapes import SMALL, GpuOptions
from cag_bench.gpu.table import bars, markdown
from cag_bench.gpu.transform import transform_row
from cag_bench.gpu.tuning import tuning_rows
from cag_bench.gpu.ways import ways_rows
from cag_bench.kernel_clock import clock_for
from cag_bench.provenance import commit, device_facts, load_average, versions
from cag_bench.rows import SUMMARY, TABLE, ResultRows, write_json

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
MIN_PART_S = 5.0  # a part is not begun with less
CHECK = "check steps, "


def run_gpu(device: torch.device, options: GpuOptions, out: Path, progress: Progress) -> Row:
    """Measure everything and write the files; the object that `--json` prints."""
    budget, clock = Budget(options.budget_s), clock_for(device)
    origin = {"machine": device_facts(device), "commit": commit(), "versions": versions()}
    rows: list[Row] = []
    with torch.inference_mode(), ResultRows(out, origin) as results:
        progress("measure the copy bandwidth", 0, 0)
        bandwidth = clock.copy_bandwidth()
        parts: dict[str, Part] = {
            "check steps": lambda: _checks(device, options),
            "answers": lambda: _answers(device, options, budget, bandwidth, progress, _found_right(rows)),
            "attention": lambda: attention_rows(device, clock, options, bandwidth),
            "launch ways": lambda: ways_rows(device, clock, options, budget),
            "transform": lambda: iter([transform_row(device, clock, options, bandwidth, budget)]),
            "load transform": lambda: iter([load_row(device, options, bandwidth, budget)]),
            "tuning": lambda: tuning_rows(device, clock, options, budget),
        }
        for name, part in parts.items():
            progress(name, 0, 0)
            for row in _guarded(name, part, device, budget):
                row |= {"peak_device_bytes": peak_bytes(device), "load_average": load_average()}
                results.write_row("gpu", row)
                rows.append(row)
        facts = {"options": asdict(options), "copy_bytes_per_s": bandwidth, "left_s": budget.left_s, "bars": bars(rows)}
        results.write_run(facts)
    summary = {**origin, **facts, "rows": rows}
    write_json(out / SUMMARY, summary)
    (out / TABLE).write_text(markdown(summary), encoding="utf-8")
    return summary


def _guarded(name: str, part: Part, device: torch.device, budget: Budget) -> Iterator[Row]:
    """The rows of a part, and a row for what went wrong."""
    if budget.left_s < MIN_PART_S:
        yield {"name": name, "skipped": f"only {budget.left_s:.0f} s were left"}
        return
    try:
        released(device)  # of what the part before took; a device that it broke fails here
        yield from part()
    except Exception as error:  # one part must not take the others' figures with it
        yield failure(name, error)


def _measured(name: str, measure: Callable[[], Row]) -> Row:
    """The row of a figure, or one for what went wrong."""
    try:
        return measure()
    except Exception as error:  # nor one figure those behind it
        return failure(name, error)


def _checks(device: torch.device, options: GpuOptions) -> Iterator[Row]:
    """Steps of a small network behind each kind of prefix, against the network's own forward."""
    model = random_model(SMALL.network, device, 2 * SMALL.prefix_tokens, options.seed)
    for kind in KINDS:
        yield _measured(CHECK + kind, partial(_check, model, kind))


def _check(model: LanguageModel, kind: str) -> Row:
    return {"name": CHECK + kind, "difference": check_steps(model, kind, SMALL.prefix_tokens)}


def _found_right(rows: Sequence[Row]) -> set[str]:
    """The kinds of prefixes whose steps were checked and are right."""
    return {kind for kind in KINDS for row in rows if row["name"] == CHECK + kind and "difference" in row}


def _answers(
    device: torch.device, options: GpuOptions, budget: Budget, bandwidth: float, progress: Progress, right: set[str]
) -> Iterator[Row]:
    """First tokens and decoding behind each kind of prefix whose steps are `right`."""
    progress("make the network", 0, 0)
    window = (
        options.prefix_tokens + options.rag_tokens + 4 * (options.tail_tokens + options.question_tokens + options.steps)
    )
    model = random_model(options.network, device, window, options.seed)
    answers = Answers(model, options, budget, bandwidth)
    retrieval = retrieval_samples(options.prefix_tokens, options.samples, budget)
    retrieve_s = None if retrieval is None else median_of(retrieval)
    yield {"name": "retrieve, bm25", "seconds": percentiles(retrieval or []), "samples_s": retrieval}
    yield _measured("first token, RAG", partial(answers.rag_first_token, retrieve_s))
    for kind in KINDS:
        if kind not in right:
            yield {"name": f"first token, {kind}", "skipped": "its steps were not found right"}
            continue
        if kind != "bf16" and budget.left_s < MIN_PART_S:
            yield {"name": f"first token, {kind}", "skipped": "no time left"}
            continue
        progress(f"answers behind {kind}", 0, 0)
        yield from _answers_behind(answers, kind, random_prefix(model, options.prefix_tokens, kind, options.seed))
        gc.collect()


def _answers_behind(answers: Answers, kind: str, prefix: ResidentPrefix) -> Iterator[Row]:
    measures: dict[str, Callable[[], Row]] = {f"first token, {kind}": partial(answers.first_token, kind, prefix)}
    if kind == "bf16":
        measures[f"launch ways, first token, {kind}"] = partial(answers.first_token_ways, kind, prefix)
    measures[f"decode, {kind}"] = partial(answers.decoding, kind, prefix)
    if kind == "bf16":
        measures["decode, session by session"] = partial(answers.decoding_apart, prefix)
    if kind == "int4":
        measures["answers through the scheduler"] = partial(answers.scheduled, prefix)
    for name, measure in measures.items():
        yield _measured(name, measure)
