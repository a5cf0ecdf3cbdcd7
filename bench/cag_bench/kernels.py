"""`cag bench kernels`: every kernel of this machine against its references and the floor of its bytes.

Sizes in; `results.jsonl` (a row a case, with machine, commit, versions and raw samples), a table and a plot out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cag.errors import UsageError
from cag_bench.kernel_case import KernelCase, measure_case
from cag_bench.kernel_cases_cpu import CpuSizes, cpu_cases
from cag_bench.kernel_clock import clock_for
from cag_bench.plot import plot_kernels, require_matplotlib
from cag_bench.provenance import commit, device_facts, load_average, versions
from cag_bench.rows import KERNELS_PLOT, TABLE, ResultRows
from cag_bench.table import ratio_cell

GPU_TOKENS, CPU_TOKENS = 85_000, 4_096
NEEDS_GPU = (
    "prefix attention",
    "cascade attention",
    "quantize",
    "dequantize",
    "move keys",
    "inverse transform",
    "entropy decoding",
)


@dataclass(frozen=True)
class KernelOptions:
    """num_tokens: of the prefix, None for the device's default. sessions: how many at once, on a GPU."""

    num_tokens: int | None = None
    sessions: Sequence[int] = (1, 16, 64)
    num_samples: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = [self.num_samples, *self.sessions, *([] if self.num_tokens is None else [self.num_tokens])]
        if not self.sessions or min(sizes) < 1:
            raise UsageError("tokens, sessions and samples must be at least 1.")


def run_kernels(
    device: torch.device, options: KernelOptions, directory: Path, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure all cases of a device and write the files; the object that `--json` prints.

    Raises:
        KernelWrong: a kernel whose result is not its reference's; the rows so far are written.
    """
    require_matplotlib()
    origin: dict[str, Any] = {"machine": device_facts(device), "commit": commit(), "versions": versions()}
    clock = clock_for(device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), ResultRows(directory, origin) as results:
        progress("measure the copy bandwidth", 0, 0)
        bandwidth = clock.copy_bandwidth()
        for case in _cases(device, options):
            progress(f"{case.name} {case.shape}", 0, 0)
            row = measure_case(case, clock, bandwidth, options.num_samples, options.seed)
            row |= {"copy_bytes_per_s": bandwidth, "load_average": load_average()}
            results.write_row("kernel", row)
            rows.append(row)
        missing = [] if device.type == "cuda" else list(NEEDS_GPU)
        results.write_row("run", {"copy_bytes_per_s": bandwidth, "needs_gpu": missing, "seed": options.seed})
    summary = {**origin, "copy_bytes_per_s": bandwidth, "needs_gpu": missing, "kernels": rows}
    (directory / TABLE).write_text(markdown(summary), encoding="utf-8")
    plot_kernels(rows, origin["machine"]["gpu"] or origin["machine"]["processor"], directory / KERNELS_PLOT)
    return summary


def _cases(device: torch.device, options: KernelOptions) -> Iterator[KernelCase]:
    if device.type == "cpu":
        return cpu_cases(CpuSizes(options.num_tokens or CPU_TOKENS))
    from cag_bench.kernel_cases_gpu import GpuSizes, gpu_cases

    return gpu_cases(GpuSizes(device, options.num_tokens or GPU_TOKENS, options.sessions))


HEADER = ("kernel", "shape", "arm", "p50", "p90", "floor", "p50 / floor", "arm / kernel", "error")


def table_rows(summary: dict[str, Any]) -> list[list[str]]:
    """A row an arm; times in microseconds."""
    lines = []
    for row in summary["kernels"]:
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        kernel = next(iter(row["arms"]))
        for name, arm in row["arms"].items():
            ratio = row["ratios"].get(f"{name}/{kernel}")
            spread = (arm["seconds"][key] * 1e6 for key in ("p50", "p90"))
            cells = [row["name"], shape, name, *(f"{value:.1f}" for value in spread), f"{row['floor_s'] * 1e6:.1f}"]
            cells += [f"{arm['p50_over_floor']:.2f}", "" if ratio is None else ratio_cell(ratio)]
            lines.append([*cells, "" if ratio else f"{row['error']:.1e}"])
    return lines


def markdown(summary: dict[str, Any]) -> str:
    """The table with what it was measured on above."""
    lines = ["# Kernels", "", *(f"- {line}" for line in origin_lines(summary)), ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *table_rows(summary))]
    return "\n".join(lines) + "\n"


def origin_lines(summary: dict[str, Any]) -> list[str]:
    """Machine, code, what the floor is, and what could not be measured, a line each."""
    machine = summary["machine"]
    lines = [
        f"machine: {machine['gpu'] or machine['processor']}, {machine['cores']} cores",
        f"code: {summary['commit']}",
        f"floor: bytes read and written once, at the {summary['copy_bytes_per_s'] / 1e9:.1f} GB/s that a copy moves",
        "times in microseconds; ratios are medians of pairs [95 % CI] (n)",
    ]
    if summary["needs_gpu"]:
        lines.append("one layer may stay in a processor's cache, so a figure may lie below the floor of its memory")
        lines.append(f"not measured, a CUDA device is needed: {', '.join(summary['needs_gpu'])}")
    return lines
