"""Samples to the figures of a run: one entry an arm, ratios pair by pair, and when the build has paid.

Samples and facts in, JSON objects out; knows no engine and no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cag_bench.arm_names import CACHED_NAMES, DISK, HOT
from cag_bench.figures import break_even_questions, mean, median, paired, paired_ratio, percentiles
from cag_bench.measure import Sample

SECONDS = ("ttft_s", "retrieve_s", "load_s", "read_s", "prefill_s", "tpot_s", "total_s")
RATIO_BASES = (HOT, DISK)


def arm_figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """The entry of one arm in the printed object: percentiles of `ttft_s`, medians of the other times and of the token
    counts, means of the scores over the questions that have accepted answers."""
    return {
        "n": len(samples),
        "ttft_s": percentiles([sample.ttft_s for sample in samples]),
        **{name: median(_values(samples, name)) for name in ("retrieve_s", "load_s", "prefill_s", "tpot_s")},
        **{name: _whole(median(_values(samples, name))) for name in ("cached_tokens", "computed_tokens")},
        **{name: mean(_values(samples, name)) for name in ("em", "f1")},
    }


def arm_details(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the summary adds for one arm: the other scores, and percentiles of every time."""
    spread = {name: percentiles(_values(samples, name)) for name in SECONDS}
    gold = [sample.gold_retrieved for sample in samples if sample.gold_retrieved is not None]
    dropped = [sample.page_cache_dropped for sample in samples if sample.page_cache_dropped is not None]
    return {
        "num_scored": len(_values(samples, "em")),
        **{name: mean(_values(samples, name)) for name in ("rouge_l", "containment")},
        "total_s": median(_values(samples, "total_s")),
        "prompt_tokens": _whole(median(_values(samples, "prompt_tokens"))),
        "completion_tokens": _whole(median(_values(samples, "completion_tokens"))),
        "percentiles": spread,
        "gold_retrieved": mean([float(found) for found in gold]),
        "page_cache_dropped": {"samples": len(dropped), "dropped": sum(dropped)} if dropped else None,
    }


def by_arm(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, list[Sample]]:
    """The samples of each arm, arms in the order of `names`."""
    return {name: [sample for sample in samples if sample.arm == name] for name in names}


def ttft_by_question(samples: Sequence[Sample]) -> dict[int, float]:
    """First-token seconds of one arm's samples, by question."""
    return {sample.question_index: sample.ttft_s for sample in samples}


def ratios(groups: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """First-token time of each arm over `cag-hot` and over `cag-disk`, question by question: "ARM/BASE" -> figures."""
    found = {}
    for base in RATIO_BASES:
        for name in groups:
            if base in groups and name != base:
                pairs = paired(ttft_by_question(groups[name]), ttft_by_question(groups[base]))
                ratio = paired_ratio(pairs)
                if ratio is not None:
                    found[f"{name}/{base}"] = ratio
    return found


def loading_ratio(groups: Mapping[str, Sequence[Sample]]) -> dict[str, Any] | None:
    """First-token time of `cag-disk` over that of `cag-hot` and what reading the cache's files took by itself, question
    by question."""
    reads = {sample.question_index: sample.read_s for sample in groups.get(DISK, ())}
    hot = ttft_by_question(groups.get(HOT, ()))
    floor = {index: hot[index] + read for index, read in reads.items() if read is not None and index in hot}
    return paired_ratio(paired(ttft_by_question(groups.get(DISK, ())), floor))


def break_even(groups: Mapping[str, Sequence[Sample]], build_s: float | None) -> dict[str, dict[str, int | None]]:
    """For each base arm and each arm without a cache: the number of questions after which the build has paid.

    None when nothing is saved, or when the build was not timed in this run.
    """
    found: dict[str, dict[str, int | None]] = {}
    for base in RATIO_BASES:
        for other in groups:
            if base in groups and other not in CACHED_NAMES:
                pairs = paired(ttft_by_question(groups[other]), ttft_by_question(groups[base]))
                paid = break_even_questions(build_s, pairs) if build_s is not None else None
                found.setdefault(base, {})[other] = paid
    return found


def _values(samples: Sequence[Sample], name: str) -> list[float]:
    """The values of a field, without those that are None."""
    values = (getattr(sample, name) for sample in samples)
    return [float(value) for value in values if value is not None]


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
