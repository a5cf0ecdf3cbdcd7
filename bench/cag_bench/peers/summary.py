"""Samples of a comparison to its figures: one entry a party, and ours over each peer, pair by pair.

Samples in, JSON objects out; knows no engine and no peer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cag_bench.figures import mean, median, paired, paired_ratio, percentiles
from cag_bench.peers.measure import PeerSample, SessionsSample
from cag_bench.peers.parties import AskedQuestion
from cag_bench.text_metrics import containment

OURS = "cag"  # what names of ours begin with


def party_figures(
    samples: Sequence[PeerSample],
    reference: Sequence[PeerSample],
    questions: Sequence[AskedQuestion],
    text_of: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """The entry of a party. `first_token_agrees`: share of the questions whose first token is that of `reference`;
    `containment`: as in `cag bench ttft`, over the questions with accepted answers."""
    first = {sample.question_index: sample.token_ids[0] for sample in reference}
    scores = [
        containment(text_of(sample.token_ids), question.answers, question.all_of)
        for sample in samples
        if (question := questions[sample.question_index]).answers
    ]
    dropped = [sample.page_cache_dropped for sample in samples if sample.page_cache_dropped is not None]
    return {
        "n": len(samples),
        "source": samples[0].source,
        "ttft_s": percentiles([sample.ttft_s for sample in samples]),
        "load_s": median([sample.load_s for sample in samples]),
        "tpot_s": percentiles([sample.tpot_s for sample in samples if sample.tpot_s is not None]),
        "cached_tokens": min(sample.cached_tokens for sample in samples),
        "containment": mean(scores),
        "first_token_agrees": mean([float(s.token_ids[0] == first[s.question_index]) for s in samples]),
        "page_cache_dropped": {"samples": len(dropped), "dropped": sum(dropped)} if dropped else None,
    }


def sessions_figures(samples: Sequence[SessionsSample]) -> dict[str, Any]:
    """The entry of a party that answered many at once."""
    return {
        "n": len(samples),
        "num_sessions": samples[0].num_sessions,
        "num_tokens": samples[0].num_tokens,
        "tokens_per_s": percentiles([sample.tokens_per_s for sample in samples]),
    }


def grouped(samples: Sequence[Any]) -> dict[str, list[Any]]:
    """Samples by party, in the order of the names."""
    names = sorted({sample.party for sample in samples})
    return {name: [sample for sample in samples if sample.party == name] for name in names}


def question_ratios(samples: Sequence[PeerSample]) -> dict[str, dict[str, Any]]:
    """`ttft_s` and `tpot_s` of each party of ours over each peer with its prefix in the same place."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("ttft_s", "tpot_s"):
        values = {
            party: {s.question_index: getattr(s, name) for s in group if getattr(s, name) is not None}
            for party, group in grouped(samples).items()
        }
        source = {sample.party: sample.source for sample in samples}
        pairs = [(ours, peer) for ours in values for peer in values if _compared(ours, peer)]
        found[name] = {
            f"{ours}/{peer}": paired_ratio(paired(values[ours], values[peer]))
            for ours, peer in pairs
            if source[ours] == source[peer]
        }
    return found


def sessions_ratios(samples: Sequence[SessionsSample]) -> dict[str, Any]:
    """Tokens a second of each party of ours over each peer, round by round."""
    values = {party: {s.round_index: s.tokens_per_s for s in group} for party, group in grouped(samples).items()}
    return {
        f"{ours}/{peer}": paired_ratio(paired(values[ours], values[peer]))
        for ours in values
        for peer in values
        if _compared(ours, peer)
    }


def _compared(ours: str, peer: str) -> bool:
    return ours.startswith(OURS) and not peer.startswith(OURS)
