"""The tables of a comparison, as Markdown. The object of `summary.json` in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PARTIES = ("party", "n", "prefix in", "ttft p50", "p90", "load", "tpot p50", "cached", "contains", "same first token")
SESSIONS = ("party", "rounds", "sessions", "tokens", "tokens/s p50")
RATIOS = ("ours / peer", "figure", "p50", "95 % CI", "n")
MISSING = "-"


def markdown(summary: Mapping[str, Any]) -> str:
    """All tables, with what they were measured on above and the notes of the run below."""
    lines = ["# Beside other engines", "", *(f"- {line}" for line in origin_lines(summary)), ""]
    lines += ["Times in milliseconds, medians unless a column says otherwise.", ""]
    lines += _table(PARTIES, [_party(name, figures) for name, figures in summary["parties"].items()])
    if summary["sessions"]:
        lines += ["", *_table(SESSIONS, [_sessions(name, figures) for name, figures in summary["sessions"].items()])]
    rows = [_ratio(pair, name, ratio) for name, pairs in summary["ratios"].items() for pair, ratio in pairs.items()]
    if rows:
        lines += ["", *_table(RATIOS, rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in summary["notes"])]) + "\n"


def origin_lines(summary: Mapping[str, Any]) -> list[str]:
    """Machine, code, model, prefix and peers, a line each."""
    machine, model = summary["machine"], summary["model"]
    peers = [
        f"{name}: {', '.join(f'{key} {value}' for key, value in (peer['versions'] | peer['settings']).items())}"
        for name, peer in summary["peers"].items()
    ]
    return [
        f"machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['compute_dtype']}, load average {machine['load_average_begin'][0]} at the beginning and "
        f"{machine['load_average_end'][0]} at the end",
        f"code: {summary['commit']}",
        f"model: {model['id']} ({model['fingerprint'][:12]})",
        f"prefix: {summary['prefix_tokens']} tokens, questions of {summary['question_tokens']['p50']:.0f}",
        *peers,
    ]


def _party(name: str, figures: Mapping[str, Any]) -> list[str]:
    ttft, tpot = figures["ttft_s"], figures["tpot_s"]
    cells = [_ms(ttft["p50"]), _ms(ttft["p90"]), _ms(figures["load_s"]), _ms(tpot["p50"] if tpot else None)]
    shares = [
        MISSING if figures[key] is None else f"{figures[key]:.2f}" for key in ("containment", "first_token_agrees")
    ]
    return [name, str(figures["n"]), figures["source"], *cells, str(figures["cached_tokens"]), *shares]


def _sessions(name: str, figures: Mapping[str, Any]) -> list[str]:
    counts = [str(figures[key]) for key in ("n", "num_sessions", "num_tokens")]
    return [name, *counts, f"{figures['tokens_per_s']['p50']:.1f}"]


def _ratio(pair: str, name: str, ratio: Mapping[str, Any]) -> list[str]:
    low_high = MISSING if ratio["ci95"] is None else f"[{ratio['ci95'][0]:.2f}, {ratio['ci95'][1]:.2f}]"
    return [pair, name, f"{ratio['p50']:.2f}", low_high, str(ratio["n"])]


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (header, line, *rows)]
