"""Results as pictures. First-token times: every sample a dot, the median a line, one row an arm, logarithmic seconds.
Quality: loss over size, a line for the steps of a codec on a corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
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
            name = f"{row['codec']['id']}, {'/'.join(PurePath(row['corpus']['paths'][0]).parts[-2:])}"
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


def _duration(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _is_narrow(ttft_s: Mapping[str, Sequence[float]]) -> bool:
    """Whether powers of ten alone would label too few ticks."""
    values = [value for samples in ttft_s.values() for value in samples]
    return max(values) / min(values) < NARROW_RANGE
