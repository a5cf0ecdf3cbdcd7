"""The bars of a run and its table: figures beside their floors, ratios beside their bars. Rows in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cag_bench.gpu.clock import median_of

Row = dict[str, Any]
FIRST, RAG, DECODE, APART, INT4, TRANSFORM = (
    "first token, bf16",
    "first token, RAG",
    "decode, bf16",
    "decode, session by session",
    "prefix attention, int4",
    "decode transform",
)


def bars(rows: Sequence[Row]) -> list[Row]:
    """What is asked of a GPU: `name`, `found` (None where it was not measured), `bar`, `met`."""
    named = {row["name"]: row for row in rows if "failed" not in row and "skipped" not in row}
    attention = [row for row in rows if row["name"] == INT4 and "quicker_bf16_over" in row]
    codes = {row["shape"]["num_queries"]: row["quicker_bf16_over"]["p50"] for row in attention}
    found: list[tuple[str, float | None, float, bool]] = [
        ("first token / floor", _value(named, FIRST, "p50_over_floor"), 1.5, False),
        ("RAG / first token", _ratio(_median(named, RAG), _median(named, FIRST)), 5.0, True),
        (
            "tokens/s together / one by one",
            _ratio(_value(named, DECODE, "tokens_per_s"), _value(named, APART, "tokens_per_s")),
            12.0,
            True,
        ),
        ("bf16 attention / int4 attention, one query", codes.get(1), 2.5, True),
        ("bf16 attention / int4 attention, worst of the sizes", min(codes.values(), default=None), 2.5, True),
        ("transform, GB/s of bfloat16 bytes", _value(named, TRANSFORM, "gb_per_s"), 100.0, True),
    ]
    return [
        {"name": name, "found": value, "bar": bar, "met": None if value is None else _meets(value, bar, at_least)}
        for name, value, bar, at_least in found
    ]


def _value(named: dict[str, Row], name: str, field: str) -> float | None:
    return float(named[name][field]) if name in named else None


def _median(named: dict[str, Row], name: str) -> float | None:
    return median_of(named[name]["samples_s"]) if name in named else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


def _meets(value: float, bar: float, at_least: bool) -> bool:
    return value >= bar if at_least else value <= bar


HEADER = ("figure", "shape", "p50, ms", "p90, ms", "floor, ms", "p50 / floor", "more")


def markdown(summary: Row) -> str:
    """Bars first, then every figure."""
    machine = summary["machine"]
    lines = [
        "# A model's size on a GPU",
        "",
        f"- machine: {machine['gpu'] or machine['processor']}, {machine['cores']} cores; code: {summary['commit']}",
        f"- floor: bytes read once, at the {summary['copy_bytes_per_s'] / 1e9:.0f} GB/s that a copy moves",
        f"- {summary['left_s']:.0f} s of {summary['options']['budget_s']:.0f} s were left",
        "",
        "| bar | found | should be | met |",
        "| --- | --- | --- | --- |",
        *(_bar_line(bar) for bar in summary["bars"]),
        "",
        *(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *map(_cells, summary["rows"]))),
    ]
    return "\n".join(lines) + "\n"


def _bar_line(bar: Row) -> str:
    found = "not measured" if bar["found"] is None else f"{bar['found']:.2f}"
    sign = "<=" if bar["name"].endswith("floor") else ">="
    return f"| {bar['name']} | {found} | {sign} {bar['bar']:g} | {'' if bar['met'] is None else bar['met']} |"


def _cells(row: Row) -> list[str]:
    shape = ", ".join(f"{name} {value}" for name, value in row.get("shape", {}).items())
    arms: list[Row] = list(row.get("arms", {}).values())
    kernel: Row = arms[0] if arms else row
    seconds = kernel.get("seconds")
    times = [f"{seconds[key] * 1e3:.3f}" for key in ("p50", "p90")] if isinstance(seconds, dict) else ["", ""]
    floor_s = row.get("floor_s")
    over = kernel.get("p50_over_floor")
    more = [
        f"{key} {row[key]:.4g}"
        for key in (
            "tokens_per_s",
            "gb_per_s",
            "apart_gb_per_s",
            "in_turn_gb_per_s",
            "difference",
            "retrieve_s",
            "first_layer_s",
        )
        if row.get(key)
    ]
    more += [str(row[key]) for key in ("skipped", "failed") if key in row]
    more += [f"{cut}: {value * 1e6:.0f} us" for cut, value in row.get("variants_s", {}).items()]
    more += [f"{cut} failed: {why}" for cut, why in row.get("variants_failed", {}).items()]
    if "quicker_bf16_over" in row:
        more.append(f"bf16 / this {row['quicker_bf16_over']['p50']:.2f}")
    cells = [row["name"], shape, *times, "" if floor_s is None else f"{floor_s * 1e3:.3f}"]
    return [*cells, "" if over is None else f"{over:.2f}", "; ".join(more)]
