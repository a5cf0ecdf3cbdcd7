"""Results as pictures. First-token times: every sample a dot, the median a line, one row an arm, logarithmic seconds.
Quality: loss over size, a line for the steps of a codec on a corpus. Store: speeds, one row a codec. Kernels: times
over the floor of their bytes, one row a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cag.errors import UsageError

JITTER = 0.18  # of the distance between two arms, so that equal times stay visible
NARROW_RANGE = 30
LABEL_ROOM = 0.06  # of the axis, for the time beside the last line


def require_matplotlib() -> None:
    """Raises: `UsageError` when plots cannot be made here, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("the benchmark draws with matplotlib.", hint="Install cag-engine[bench].") from error


def plot_ttft(ttft_s: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw first-token seconds, `ttft_s[arm] = samples`, to a PNG file. Arms without samples are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [name for name, values in ttft_s.items() if values]
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    generator = np.random.default_rng(0)
    for row, name in enumerate(arms):
        values = np.asarray(ttft_s[name])
        heights = row + generator.uniform(-JITTER, JITTER, len(values))
        axes.plot(values, heights, "o", markersize=4, alpha=0.5, color="tab:blue")
        middle = float(np.median(values))
        axes.plot([middle, middle], [row - 0.35, row + 0.35], color="black", linewidth=2)
        axes.annotate(f" {_duration(middle)}", (middle, row - 0.36), fontsize=8, ha="left", va="bottom")
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** LABEL_ROOM)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}" if _is_narrow(ttft_s) else "")
    axes.set_yticks(range(len(arms)), [f"{name} (n = {len(ttft_s[name])})" for name in arms])
    axes.set_ylim(len(arms) - 0.4, -0.7)
    axes.set_xlabel("time to the first token in seconds (line: median)")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(visible=True, axis="x", which="both", alpha=0.25)
    figure.savefig(path, dpi=150)


def plot_quality(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw mean KL over raw bytes by stored bytes, the basis apart, to a PNG file; both axes logarithmic. What loses
    nothing is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["outcome"] == "measured" and row["fidelity"]["corpus"]["mean_kl"] > 0:
            name = f"{row['codec']['id']}, {row['corpus']['name']}"
            point = row["raw_over_stored"]["without_basis"], row["fidelity"]["corpus"]["mean_kl"]
            lines.setdefault(name, []).append(point)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=5, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("uncompressed over stored bytes, the basis apart")
    axes.set_ylabel("mean KL divergence in nats, probes of the corpus")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(visible=True, which="both", alpha=0.25)
    if lines:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def plot_store(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw uncompressed GB a second of each codec's encoding, decoding and loads to a PNG file."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        most = max(row["encode"], key=int)
        cores = f"{most} core{'s' if most != '1' else ''}"
        seconds = {
            f"encode, {cores}": row["encode"][most],
            f"decode, {cores}": row["decode"][most],
            "load cold": row["seconds"]["load_cold"],
            "load warm": row["seconds"]["load_warm"],
        }
        label = f"{row['label']} ({row['raw_bytes'] / row['stored_bytes']:.2f}x smaller)"
        found[label] = {
            work: [row["raw_bytes"] / 1e9 / value for value in figure["samples"]] for work, figure in seconds.items()
        }
    _plot_rows(found, "GB of uncompressed keys and values a second", title, path)


def plot_kernels(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the times of all arms over the floor of their case to a PNG file. The first arm is the kernel."""
    found = {}
    for row in rows:
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        found[f"{row['name']}: {shape}"] = {
            arm if number else "the kernel": [value / row["floor_s"] for value in figures["samples_s"]]
            for number, (arm, figures) in enumerate(row["arms"].items())
        }
    _plot_rows(found, "time over the floor of its bytes", title, path)


def _plot_rows(rows: Mapping[str, Mapping[str, Sequence[float]]], what: str, title: str, path: Path) -> None:
    """Samples as dots and their median as a line, `rows[label][series]`: a row a label and a colour a series."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(series for found in rows.values() for series in found))
    figure = Figure(figsize=(10, 1.8 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, found in enumerate(rows.values()):
        for series, values in found.items():
            color, middle = f"C{names.index(series)}", float(np.median(values))
            axes.plot(values, [place] * len(values), "o", markersize=4, alpha=0.4, color=color)
            axes.plot([middle, middle], [place - 0.3, place + 0.3], color=color, linewidth=2)
    for number, series in enumerate(names):
        axes.plot([], [], "o", color=f"C{number}", label=series)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{what} (line: median)")
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(visible=True, axis="x", which="both", alpha=0.25)
    if names:
        figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


def _duration(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _is_narrow(ttft_s: Mapping[str, Sequence[float]]) -> bool:
    """Whether powers of ten alone would label too few ticks."""
    values = [value for samples in ttft_s.values() for value in samples]
    return max(values) / min(values) < NARROW_RANGE
