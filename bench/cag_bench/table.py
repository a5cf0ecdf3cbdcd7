"""The table of a run, as Markdown and for the terminal. The object of `summary.json` in, text out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from cag_bench.arm_names import DISK, HOT

HEADER = (
    "arm",
    "n",
    "ttft p50",
    "p90",
    "p99",
    "retrieve",
    "load",
    "prefill",
    "tpot",
    "total",
    "cached",
    "computed",
    "EM",
    "F1",
    "ROUGE-L",
    "contains",
)
WIDE_COLUMNS = frozenset(
    {"p99", "tpot", "total", "cached", "computed", "ROUGE-L", "contains"}
)  # left out on a terminal
MISSING = "-"


def table_columns(summary: Mapping[str, Any]) -> list[str]:
    """Headings: times in milliseconds, then one column of ratios for each base arm of the run."""
    return [*HEADER, *(f"x {base} [95 % CI] (n)" for base in _bases(summary))]


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """One row an arm, in the order of the run."""
    return [_row(name, arm, summary) for name, arm in summary["arms"].items()]


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The table with what it was measured on above and the notes of the run below."""
    columns = table_columns(summary)
    lines = [
        "# First token",
        "",
        *(f"- {line}" for line in origin_lines(summary)),
        "",
        "Times in milliseconds, medians unless a column says otherwise; EM, F1, ROUGE-L and contains are means.",
        "",
        _line(columns),
        _line(["---", *("---:" for _ in columns[1:])]),
        *(_line(row) for row in table_rows(summary)),
        "",
        *(f"- {line}" for line in [*outcome_lines(summary), *summary["notes"]]),
    ]
    return "\n".join(lines) + "\n"


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The table with fewer columns, for the terminal."""
    columns = table_columns(summary)
    shown = [number for number, column in enumerate(columns) if column not in WIDE_COLUMNS]
    table = Table(title="First token, milliseconds", title_justify="left")
    for number in shown:
        table.add_column(columns[number], justify="right" if number else "left", no_wrap=number == 0)
    for row in table_rows(summary):
        table.add_row(*(row[number] for number in shown))
    return table


def origin_lines(summary: Mapping[str, Any]) -> list[str]:
    """Machine, code, model, corpus and cache of a run, one line each."""
    machine, corpus, cache = summary["machine"], summary["corpus"], summary["cache"]
    lines = [
        f"machine: {machine['gpu'] or machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['compute_dtype']}, load average "
        f"{machine['load_average_begin'][0]} at the beginning and {machine['load_average_end'][0]} at the end",
        f"code: {summary['commit']}",
        f"model: {summary['model']['id']} ({summary['model']['fingerprint'][:12]})",
        f"corpus: {corpus['num_documents']} documents, {corpus['num_tokens']} tokens with their prompt "
        f"({corpus['sha256'][:12]})",
    ]
    if cache is not None:
        ratio, loss = cache["raw_bytes"] / cache["stored_bytes"], cache["fidelity"]["mean_kl"]
        lines.append(
            f"cache: {cache['codec']['id']}, {cache['raw_bytes'] / 1e6:.1f} MB raw, "
            f"{cache['stored_bytes'] / 1e6:.1f} MB stored ({ratio:.2f} : 1), mean KL {loss:.2g} nats"
        )
    return lines


def outcome_lines(summary: Mapping[str, Any]) -> list[str]:
    """After how many questions the build has paid, a line a base arm, and the quality of each retriever for itself."""
    lines = []
    for base, others in summary["break_even_questions"].items():
        paid = [f"{'none' if count is None else count} against {name}" for name, count in others.items()]
        lines.append(f"Questions after which the build has paid, {base}: {', '.join(paid)}.")
    for kind, found in (summary["retrieval"].get("quality") or {}).items():
        if found is not None:
            figures = [f"{name} {value:.3f}" for name, value in found.items() if name not in ("unit", "n")]
            lines.append(
                f"Retrieval by {kind} for itself, of {found['unit']}s: {', '.join(figures)} (n = {found['n']})."
            )
    return lines


def _bases(summary: Mapping[str, Any]) -> list[str]:
    return [base for base in (HOT, DISK) if any(name.endswith(f"/{base}") for name in summary["ratios"])]


def _row(name: str, arm: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    ttft = arm["ttft_s"] or {}
    return [
        name,
        str(arm["n"]),
        *(_milliseconds(ttft.get(key)) for key in ("p50", "p90", "p99")),
        *(_milliseconds(arm[key]) for key in ("retrieve_s", "load_s", "prefill_s", "tpot_s", "total_s")),
        *(_text(arm[key], "{:d}") for key in ("cached_tokens", "computed_tokens")),
        *(_text(arm[key], "{:.2f}") for key in ("em", "f1", "rouge_l", "containment")),
        *(ratio_cell(summary["ratios"].get(f"{name}/{base}")) for base in _bases(summary)),
    ]


def _milliseconds(seconds: float | None) -> str:
    """Three significant digits, more where the whole number has more."""
    if seconds is None:
        return MISSING
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio_cell(ratio: Mapping[str, Any] | None) -> str:
    """Median, interval where there is one, and the number of pairs."""
    if ratio is None:
        return MISSING
    interval = "" if ratio["ci95"] is None else f" [{ratio['ci95'][0]:.2f}, {ratio['ci95'][1]:.2f}]"
    return f"{ratio['p50']:.2f}{interval} ({ratio['n']})"


def _text(value: float | None, pattern: str) -> str:
    return MISSING if value is None else pattern.format(value)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
