"""What a reader must know beside the figures of a run, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cag_bench.arm_names import DISK, FULL_PREFILL, HOT, RAM
from cag_bench.cache import BenchCache
from cag_bench.measure import MeasurePlan, Sample
from cag_bench.questions import Question


def busy_notes(machine: Mapping[str, Any]) -> list[str]:
    """Whether other work held the cores when the run began."""
    load, cores = machine["load_average_begin"][0], machine["cores"]
    if load < cores:
        return []
    return [
        f"The machine was busy at the beginning (load average {load} on {cores} cores). Arms that read many tokens "
        "for a question (RAG, the whole corpus) lose more by it than those behind a cache, so ratios are not those of "
        "a quiet machine."
    ]


def run_notes(
    groups: Mapping[str, Sequence[Sample]],
    questions: Sequence[Question],
    plan: MeasurePlan,
    cache: BenchCache | None,
    warm_up_arms: Sequence[str],
    loading: Mapping[str, Any] | None,
    num_with_gold: int,
) -> list[str]:
    """The notes of a run, in a stable order. `num_with_gold`: questions whose supporting texts are in the corpus."""
    notes = [
        _warm_up(warm_up_arms, plan),
        f"For each question all arms were asked, in an order drawn for it (seed {plan.seed}); greedy, at most "
        f"{plan.sampling.max_tokens} tokens.",
        "Ratios are medians of first-token times divided question by question; intervals are those of the median by "
        "order statistics, from 6 questions on.",
    ]
    if cache is not None:
        notes.append(_build(cache))
    notes += _page_cache(groups)
    if loading is not None:
        notes.append(
            f"{DISK} took {loading['p50']:.2f} times as long as {HOT} and reading the cache's files by itself, cold."
        )
    if any(name.startswith("rag-") for name in groups):
        notes.append("RAG: retrieval and query embedding are inside the clock, building the index is not.")
        notes += _few_passages(groups)
    if FULL_PREFILL in groups and plan.full_n is not None and plan.full_n < len(questions):
        notes.append(f"{FULL_PREFILL}: only the first {plan.full_n} of {len(questions)} questions.")
    notes += _refused(groups, len(questions), plan)
    unanswerable = sum(not question.answers for question in questions)
    if unanswerable:
        notes.append(f"{unanswerable} of {len(questions)} questions have no accepted answer: timed, but not scored.")
    return notes + _without_gold(questions, num_with_gold) + _cut_answers(groups, plan)


def _without_gold(questions: Sequence[Question], num_with_gold: int) -> list[str]:
    named = sum(bool(question.doc_ids or question.passage_ids) for question in questions)
    if num_with_gold == named:
        return []
    return [
        f"{named - num_with_gold} of {len(questions)} questions name supporting texts that are not in the corpus, cut "
        "off or left out as duplicates of others: retrieval is not scored on them."
    ]


def _refused(groups: Mapping[str, Sequence[Sample]], num_questions: int, plan: MeasurePlan) -> list[str]:
    """Of arms that have no sample of questions which they were asked."""
    missing = []
    for name, samples in groups.items():
        asked = min(num_questions, plan.full_n or num_questions) if name == FULL_PREFILL else num_questions
        if len(samples) < asked:
            missing.append(f"{name} ({asked - len(samples)} of {asked})")
    if not missing:
        return []
    return [
        "Questions that left no room in the model's window, of which the arm has no sample, no score and no pair: "
        f"{', '.join(missing)}."
    ]


def _cut_answers(groups: Mapping[str, Sequence[Sample]], plan: MeasurePlan) -> list[str]:
    samples = [sample for group in groups.values() for sample in group]
    cut = sum(sample.finish_reason == "length" for sample in samples)
    if not cut:
        return []
    return [
        f"{cut} of {len(samples)} answers were cut at {plan.sampling.max_tokens} tokens: EM, F1 and contains are those "
        "of their beginnings."
    ]


def _warm_up(names: Sequence[str], plan: MeasurePlan) -> str:
    text = f"Warm-up, not counted: one question each of {', '.join(names)}." if names else "No warm-up was needed."
    warm = sorted(plan.warmed_up)
    return f"{text} {', '.join(warm)}: a build in this process was the same prefill." if warm else text


def _build(cache: BenchCache) -> str:
    if cache.build_s is None:
        return f"Cache {cache.name}: {cache.reused_tokens} of {cache.num_tokens} tokens reused; no build time."
    return f"Cache {cache.name}: built in {cache.build_s:.2f} s."


def _few_passages(groups: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Of arms that are called after more passages than they read."""
    found = []
    for name, samples in groups.items():
        most = max((len(sample.retrieved_passage_ids or ()) for sample in samples), default=0)
        if name.startswith("rag-") and samples and most < int(name.rpartition("@")[2]):
            found.append(f"{name} ({most})")
    return [f"Fewer passages were found than the arm is called after: {', '.join(found)}."] if found else []


def _page_cache(groups: Mapping[str, Sequence[Sample]]) -> list[str]:
    notes = []
    if DISK in groups:
        kept = sum(sample.page_cache_dropped is False for sample in groups[DISK])
        total = len(groups[DISK])
        notes.append(
            f"{DISK}: the page cache was dropped for the cache's files before each question."
            if not kept
            else f"{DISK}: the page cache could NOT be dropped before {kept} of {total} questions, so their bytes "
            "may have come from memory."
        )
    if RAM in groups:
        notes.append(f"{RAM}: the cache's files were read once before each question, outside the clock.")
    return notes
