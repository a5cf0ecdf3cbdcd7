"""The table of `cag bench serve`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cag_bench.table import MISSING, ratio_cell

HEADER = ["sessions", "arm", "tokens/s", "first token p50", "p90", "per token p50", "contains", "together / alone"]
HEADER += ["same answers"]
DRAFT_HEADER = ["drafts / none", "guessed of answers", "of guesses right"]


def markdown(summary: dict[str, Any]) -> str:
    """The table with what it was measured on above."""
    machine, cache, options = summary["machine"], summary["cache"], summary["options"]
    speculate = options["speculate"]
    limit, exactly = f"at most {options['max_tokens']}", f"{options['max_tokens']} tokens, stop tokens not heeded"
    lines = [
        "# Many sessions on one prefix",
        "",
        f"- machine: {machine.get('gpu') or machine['processor']}, {machine['cores']} cores",
        f"- code: {summary['commit']}",
        f"- {summary['model']}, prefix of {cache['num_tokens']} tokens, codec {cache['codec']['id']}; answers of "
        f"{f'{limit} tokens' if speculate else exactly}; {options['rounds']} rounds",
        "- alone: one question behind the other, first tokens from the beginning of each; together: all at once; "
        "milliseconds, ratios are medians of pairs [95 % CI] (n)",
        "- contains: mean over the questions with accepted answers, of answers up to where they end or are cut",
        "- warm-up, not counted: every size and arm once, two tokens an answer",
        "",
    ]
    header = HEADER + (DRAFT_HEADER if speculate else [])
    rows = (cells[: len(header)] for cells in _table_rows(summary))
    lines += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def _table_rows(summary: dict[str, Any]) -> Iterator[list[str]]:
    for entry in summary["sessions"]:
        drafts = entry.get("drafts_over_none", {})
        for arm, figures in entry["arms"].items():
            ratio = ratio_cell(entry["together_over_alone"]) if arm == "together" else ""
            same = f"{entry['same_answers']} of {entry['answers']}" if arm == "together" else ""
            times = [figures["ttft_s"]["p50"], figures["ttft_s"]["p90"]]
            times += [figures["tpot_s"]["p50"]] if figures["tpot_s"] else []
            cells = [str(entry["sessions"]), arm, f"{figures['tokens_per_s']:.1f}"]
            cells += [f"{seconds * 1e3:.1f}" for seconds in times]
            contains = MISSING if figures["containment"] is None else f"{figures['containment']:.2f}"
            cells += [*([] if figures["tpot_s"] else [MISSING]), contains, ratio, same]
            plain = arm.removesuffix(", drafts")
            yield cells + (_draft_cells(figures, drafts[plain]) if plain != arm else [""] * len(DRAFT_HEADER))


def _draft_cells(figures: dict[str, Any], ratio: dict[str, Any]) -> list[str]:
    accepted, drafted = figures["accepted_tokens"], figures["drafted_tokens"]
    shares = (accepted / max(1, figures["completion_tokens"]), accepted / max(1, drafted))
    return [ratio_cell(ratio), *(f"{share:.0%}" for share in shares)]
