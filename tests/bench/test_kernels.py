from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from cag.errors import UsageError
from cag_bench.cli import app
from cag_bench.errors import KernelWrong
from cag_bench.kernel_case import KernelCase, measure_case
from cag_bench.kernel_cases_gpu import KINDS, GpuSizes, gpu_cases
from cag_bench.kernel_clock import WallClock


@pytest.fixture
def clock():
    return WallClock(torch.device("cpu"))


def make_case(**changes) -> KernelCase:
    counted = {"kernel": 0, "reference": 0}

    def arm(name):
        def call():
            counted[name] += 1

        return call

    arms = {name: arm(name) for name in counted}
    case = KernelCase("sum", {"n": 3}, 1000, arms, lambda: 0.0, 0.1)
    return replace(case, **changes)


def test_a_case_is_a_row_with_raw_samples_and_pairs(clock):
    row = measure_case(make_case(), clock, bandwidth=1e6, num_samples=5, seed=0)
    assert row["floor_s"] == pytest.approx(1e-3)
    assert {name: len(arm["samples_s"]) for name, arm in row["arms"].items()} == {"kernel": 5, "reference": 5}
    for arm in row["arms"].values():
        assert arm["p50_over_floor"] == pytest.approx(arm["seconds"]["p50"] / 1e-3)
    assert row["ratios"]["reference/kernel"]["n"] == 5


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_a_wrong_kernel_is_not_timed(clock, error):
    case = make_case(error=lambda: error, arms={"kernel": pytest.fail})
    with pytest.raises(KernelWrong, match="off by"):
        measure_case(case, clock, bandwidth=1e6, num_samples=5, seed=0)


def test_the_cases_of_a_gpu_run_and_are_right(clock):
    """At small sizes, on the CPU, where the same operations are served by torch."""
    sizes = GpuSizes(
        torch.device("cpu"), 600, (1, 3), 4, 2, 32, question_tokens=5, tail_tokens=20, chunk_tokens=120, num_sides=1
    )
    with torch.inference_mode():
        rows = [measure_case(case, clock, 1e9, num_samples=1, seed=0) for case in gpu_cases(sizes)]
    names = [row["name"] for row in rows]
    assert names.count("prefix attention, int4") == 3
    assert names.count("cascade attention, bf16") == 2
    assert {"quantize, int8", "dequantize, int4", "move keys", "inverse transform", "entropy decoding"} <= set(names)
    moved = {row["name"]: row["bytes_moved"] for row in rows if row["shape"].get("num_queries", 1) == 1}
    plain = 2 * 2 * 600 * 32 * 2
    assert plain < moved["prefix attention, bf16"] < 1.1 * plain
    assert moved["prefix attention, int4"] < 0.5 * plain
    assert set(KINDS) == {"bf16", "int8", "int4"}


def test_the_command_writes_rows_and_says_what_needs_a_gpu(tmp_path):
    arguments = [
        "kernels",
        "--device",
        "cpu",
        "--prefix-tokens",
        "96",
        "--samples",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert "cascade attention" in printed["needs_gpu"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["kernel"] * (len(rows) - 1) + ["run"]
    for row in rows[:-1]:
        assert row["machine"]["processor"]
        assert row["commit"]
        assert row["versions"]["torch"]
        assert all(len(arm["samples_s"]) == 2 for arm in row["arms"].values())
    table = (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "kernels.png").stat().st_size > 1000
    assert "a CUDA device is needed" in table
    assert all(name in table for name in ("segment attention", "packed linear", "decode, int8"))
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "packed linear" in shown.stdout


@pytest.mark.parametrize("arguments", [("--sessions", "1,x"), ("--samples", "0"), ("--prefix-tokens", "0")])
def test_bad_options_are_usage_errors(tmp_path, arguments):
    result = CliRunner().invoke(app, ["kernels", "--out", str(tmp_path / "out"), *arguments])
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "out").exists()
