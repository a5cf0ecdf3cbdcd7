"""`cag bench gpu` at tiny sizes on the CPU: every part runs, is checked, and says what it could not do."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cag.residency.stream_decoding import DecodedChunks
from cag_bench import kernel_clock
from cag_bench.cli import app
from cag_bench.errors import KernelWrong
from cag_bench.gpu import answers, run, transform
from cag_bench.gpu.clock import Budget
from cag_bench.gpu.loads import load_row
from cag_bench.gpu.model import random_model, random_prefix, weight_bytes
from cag_bench.gpu.run import run_gpu
from cag_bench.gpu.shapes import SMALL
from cag_bench.gpu.table import bars
from cag_bench.gpu.transform import geometric_slots
from cag_bench.gpu.tuning import attend_cut
from cag_bench.gpu.ways import apart, attention_ways, step_way_row, step_ways, ways_rows
from cag_kernels import DensePrefix, decode_segments
from cag_kernels.prefix_reference import prefix_attention_reference
from cag_kernels.triton.launch_ways import launch_ways

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_copies(monkeypatch):
    """Nothing here is about the bandwidth, which takes seconds to measure."""
    monkeypatch.setitem(kernel_clock.COPY_BYTES, "cpu", 1 << 20)


def test_the_script_keeps_all_its_time(tmp_path):
    """The benchmark's budget is what the tests leave; a Python that only says how it is called."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in -c*) exit 1;; esac\necho "$@"\n')
    python.chmod(0o755)
    script = Path(__file__).parents[2] / "bench" / "gpu_session.sh"
    for all_seconds, most in ((590, 300), (100, 60)):
        out, environment = tmp_path / str(all_seconds), os.environ | {"PYTHON": str(python)}
        subprocess.run(["bash", script, out, "240", "300", str(all_seconds)], check=True, env=environment)
        budget = int((out / "bench.log").read_text().split("--budget ")[1])
        assert most - 30 <= budget <= most


def quiet(*_):
    """A progress that shows nothing."""


def test_the_command_measures_every_bar(tmp_path):
    ran = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--small", "--samples", "1", "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["kind"] for row in rows} == {"gpu", "run"}
    assert [row["name"] for row in rows if "failed" in row or "skipped" in row] == ["tuning"]  # needs a GPU
    assert all(row["commit"] and row["versions"] and row["machine"] for row in rows)
    names = [row["name"] for row in rows[:-1]]
    assert names.count("prefix attention, int4") == 3
    ways = {row["name"]: row["variants_s"] for row in rows[:-1] if row["name"].startswith("launch ways")}
    assert list(ways["launch ways, first token, bf16"]) == list(step_ways())
    for kind in ("bf16", "int8", "int4"):
        assert list(ways[f"launch ways, attention {kind}, queries 1"]) == list(attention_ways())
    assert all(seconds > 0 for found in ways.values() for seconds in found.values())
    for kind in ("bf16", "int8", "int4"):
        assert {f"first token, {kind}", f"decode, {kind}", f"check steps, {kind}"} <= set(names)
    (decoding,) = [row for row in rows[:-1] if row["name"] == "decode transform"]
    for way in ("", "apart_", "in_turn_"):
        seconds = decoding[f"decode_{way}s"]["p50"]
        assert decoding[f"{way}gb_per_s"] == pytest.approx(decoding["plain_bytes"] / seconds / 1e9)
    assert decoding["entropy_s"]["p50"] > 0
    assert decoding["entropy_apart_s"]["p50"] > 0
    assert decoding["p50_over_floor"] == pytest.approx(decoding["decode_s"]["p50"] / decoding["floor_s"])
    for row in rows[:-1]:
        if "floor_s" in row:
            assert row["floor_s"] > 0
            assert row["samples_s" if "samples_s" in row else "arms" if "arms" in row else "entropy_samples_s"]
    assert all(bar["found"] > 0 for bar in summary["bars"])
    assert "| first token / floor |" in (tmp_path / "table.md").read_text()


def test_a_big_network_is_not_tried_on_a_cpu(tmp_path):
    ran = CliRunner().invoke(app, ["gpu", "--device", "cpu", "--out", str(tmp_path)])
    assert ran.exit_code != 0
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.slow
def test_a_part_that_fails_leaves_the_others_their_rows(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KernelWrong("off by 3")

    monkeypatch.setattr(transform, "check_entropy", broken)
    monkeypatch.setattr(run, "attention_rows", broken)
    summary = run_gpu(CPU, replace(SMALL, samples=1), tmp_path, quiet)
    failed = {row["name"]: row["failed"] for row in summary["rows"] if "failed" in row}
    assert failed == {"attention": "KernelWrong: off by 3", "transform": "KernelWrong: off by 3"}
    found = {bar["name"]: bar["found"] for bar in summary["bars"]}
    assert found["bf16 attention / int4 attention, worst of the sizes"] is None
    assert found["RAG / first token"] > 0


@pytest.mark.slow
def test_a_figure_that_fails_leaves_those_behind_it_their_rows(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error\nmore of it")

    monkeypatch.setattr(answers.Answers, "first_token_ways", broken)
    monkeypatch.setattr(answers.Answers, "decoding_apart", broken)
    summary = run_gpu(CPU, replace(SMALL, samples=1), tmp_path, quiet)
    failed = {row["name"]: row["failed"] for row in summary["rows"] if "failed" in row}
    assert failed == dict.fromkeys(
        ["launch ways, first token, bf16", "decode, session by session"], "RuntimeError: CUDA error more of it"
    )
    names = [row["name"] for row in summary["rows"]]
    assert {"decode, bf16", "first token, int4", "answers through the scheduler"} <= set(names)


def test_a_device_that_is_lost_leaves_rows_and_summary(tmp_path, monkeypatch):
    """Behind the second part nothing works any more, not even to give memory back."""
    parts = []

    def released(_device):
        parts.append(1)
        if len(parts) > 2:
            raise RuntimeError("illegal memory access")

    monkeypatch.setattr(run, "released", released)
    run_gpu(CPU, replace(SMALL, samples=1), tmp_path, quiet)
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    lost = [row["name"] for row in rows if "failed" in row]
    assert lost == ["attention", "launch ways", "transform", "load transform", "tuning"]
    assert "first token, int4" in (tmp_path / "table.md").read_text()


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    def samples():
        if not launch_ways().overlaps:
            raise RuntimeError("not so")
        return [1.0]

    row = step_way_row("a step", samples, list, Budget(60))
    assert set(row["variants_s"]) | set(row["variants_failed"]) == set(step_ways())
    assert row["variants_failed"] == dict.fromkeys(["launches not overlapped", "as it was"], "RuntimeError: not so")
    prepared = kernel_clock.WallClock.prepared

    def fails_once(clock, work):
        if not launched:
            launched.append(work)
            raise RuntimeError("not so")
        return prepared(clock, work)

    launched = []
    monkeypatch.setattr(kernel_clock.WallClock, "prepared", fails_once)
    row = next(ways_rows(CPU, kernel_clock.clock_for(CPU), SMALL, Budget(60)))
    assert row["variants_failed"] == {"as it is": "RuntimeError: not so"}
    assert list(row["variants_s"]) == list(attention_ways())[1:]


def test_a_load_is_checked_before_it_is_timed(monkeypatch):
    row = load_row(CPU, SMALL, 1e9, Budget(60))
    assert row["host_copy_bytes"] < 0.5 * row["plain_bytes"]
    assert row["first_layer_s"] > 0
    put = DecodedChunks.put
    monkeypatch.setattr(DecodedChunks, "put", lambda *args: put(*args) or args[2][0, -1].zero_())
    with pytest.raises(KernelWrong, match="differ"):
        load_row(CPU, SMALL, 1e9, Budget(60))


def test_what_there_is_no_time_for_is_said(tmp_path):
    summary = run_gpu(CPU, replace(SMALL, budget_s=0.01), tmp_path, quiet)
    assert [row["name"] for row in summary["rows"] if "skipped" in row] == [
        "check steps", "answers", "attention", "launch ways", "transform", "load transform", "tuning",
    ]  # fmt: skip
    assert all(bar["found"] is None and bar["met"] is None for bar in bars(summary["rows"]))


def test_steps_that_differ_from_the_network_are_not_timed(monkeypatch):
    model = random_model(SMALL.network, CPU, 600, 0)
    assert answers.check_steps(model, "int4", 100) < answers.MAX_DIFFERENCE
    forward = model.device_decoder.forward
    monkeypatch.setattr(model.device_decoder, "forward", lambda *args: forward(*args).flip(1))
    with pytest.raises(KernelWrong, match="off by"):
        answers.check_steps(model, "int4", 100)


def test_a_kind_of_prefix_whose_steps_are_wrong_has_no_speed(tmp_path, monkeypatch):
    def checked(_model, kind, _num_tokens):
        if kind != "int8":
            raise KernelWrong("off by 3")
        return 0.0

    monkeypatch.setattr(run, "check_steps", checked)
    for part in ("attention_rows", "ways_rows", "tuning_rows"):
        monkeypatch.setattr(run, part, lambda *_: iter(()))
    for part in ("transform_row", "load_row"):
        monkeypatch.setattr(run, part, lambda *_: {"name": "left out", "skipped": "by the test"})
    summary = run_gpu(CPU, replace(SMALL, samples=1, steps=1), tmp_path, quiet)
    rows = {row["name"]: row for row in summary["rows"]}
    for kind in ("bf16", "int4"):
        assert rows[f"check steps, {kind}"]["failed"] == "KernelWrong: off by 3"
        assert rows[f"first token, {kind}"]["skipped"] == "its steps were not found right"
        assert f"decode, {kind}" not in rows
    assert rows["first token, int8"]["samples_s"]
    assert all(bar["met"] is None for bar in summary["bars"])


def test_sessions_apart_give_the_logits_of_sessions_together():
    model = random_model(SMALL.network, CPU, 600, 0)
    with torch.inference_mode():
        row = answers.Answers(model, SMALL, Budget(60), 1e9).decoding_apart(random_prefix(model, 200, "int8", 1))
    assert row["difference"] < 0.02
    assert row["floor_s"] > weight_bytes(model) / 1e9


def test_streams_decode_to_codes_of_their_table():
    slots = geometric_slots()
    assert slots.shape == (1, 4096)
    frequencies = torch.bincount(slots[0].long() >> 24, minlength=128)
    assert frequencies.sum() == 4096
    assert frequencies[64] == frequencies.max()
    assert (slots[0].long() >> 12 & 4095 == frequencies[slots[0].long() >> 24]).all()
    assert 2.3 < transform.bits_per_code(slots) < 2.7
    ((blocks, _),) = decode_segments([transform.random_streams(CPU, 512, 200)])
    large, codes = blocks.by_token().split([transform.NUM_LARGE, 200 - transform.NUM_LARGE], dim=1)
    assert large.abs().max() > 127
    shares = torch.bincount(codes.flatten().long() + 64, minlength=128) / codes.numel()
    torch.testing.assert_close(shares, frequencies / 4096, rtol=0, atol=0.01)


def test_ways_are_those_of_the_launches_that_are_timed():
    """Each way is in force while it is timed, what was recorded is forgotten before, and the product's comes back."""
    usual, seen, forgotten = launch_ways(), [], []

    def samples():
        seen.append((launch_ways(), len(forgotten)))
        return [1.0]

    row = step_way_row("a step", samples, lambda: forgotten.append(1), Budget(60))
    assert [ways for ways, _ in seen] == list(step_ways().values())
    assert [count for _, count in seen] == list(range(1, len(seen) + 1))
    assert len(forgotten) == len(seen) + 1
    assert launch_ways() == usual
    assert seen[0][0] == usual
    assert seen[-1][0] == apart()
    assert list(row["variants_s"]) == list(step_ways())
    assert step_way_row("a step", samples, list, Budget(0.001))["variants_s"] == {}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
def test_other_cuts_compute_the_same():
    pytest.importorskip("triton")
    keys, values = torch.randn(2, 2, 300, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    query, plain = torch.randn(4, 3, 32).bfloat16(), DensePrefix(keys, values)
    expected, _ = prefix_attention_reference(query.float(), plain, scale=32**-0.5)
    for cut in ((4, 3, 4), (2, 2, 1)):
        torch.testing.assert_close(attend_cut(query, plain, *cut), expected, atol=0.02, rtol=0)
