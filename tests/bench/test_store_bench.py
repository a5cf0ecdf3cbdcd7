"""Speeds of codecs and loads on a tiny model: the figures are those of work that was done, and right."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cag.engine import Engine
from cag.errors import UsageError
from cag_bench.cli import app
from cag_bench.codec_list import parse_codecs
from cag_bench.cores import can_pin, on_cores
from cag_bench.corpus import read_corpus
from cag_bench.reading import Reader
from cag_bench.store_bench import StoreOptions, TimedCodec, run_store


@pytest.fixture
def tiny_engine(tiny_model_dir, bench_home, tmp_path):
    """Of a checkpoint in bfloat16, whose codes the engine keeps."""
    directory = shutil.copytree(tiny_model_dir, tmp_path / "half")
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    network.save_pretrained(directory)
    return Engine.load(str(directory), store=tmp_path / "store", device="cpu")


@pytest.fixture
def summary(tiny_engine, corpus_dir, tmp_path):
    options = StoreOptions(parse_codecs(["lossless", "int8", "int4"]), 1200, (1, 2), num_samples=3)
    return run_store(tiny_engine, read_corpus([str(corpus_dir)]), options, tmp_path / "out", lambda *_: None)


def test_every_figure_has_its_samples_and_its_bytes(summary, tiny_engine):
    rows = {row["label"]: row for row in summary["rows"]}
    assert list(rows) == ["lossless", "int8", "int4"]
    assert summary["corpus"]["num_documents"] == 4
    assert summary["corpus"]["num_characters"] < summary["num_tokens"], "what was cut off is not counted"
    raw_bytes = summary["num_tokens"] * tiny_engine.model.kv_bytes_per_token
    for row in rows.values():
        assert row["raw_bytes"] == raw_bytes
        assert 0 < row["encoded_bytes"] < row["stored_bytes"]
        for work in ("encode", "decode"):
            assert list(row[work]) == ["1", "2"]
            for figure in row[work].values():
                assert len(figure["samples"]) == 3
                assert figure["raw_gb_per_s"] == pytest.approx(raw_bytes / figure["p50"] / 1e9)
        assert row["encode_over_prefill"] == pytest.approx(row["encode"]["2"]["p50"] / summary["prefill_s"])
        assert {len(times["samples"]) for times in row["seconds"].values()} == {3}
        times = {name: row["seconds"][name]["samples"] for name in ("load_cold", "read_cold", "decode")}
        ratios = [cold / max(read, decode) for cold, read, decode in zip(*times.values(), strict=True)]
        assert row["cold_over_longer"]["p50"] == pytest.approx(np.median(ratios))
        assert row["cold_over_longer"]["n"] == 3
        assert ("codes_over_longer" in row) == (row["label"] != "lossless")
        if row["label"] != "lossless":
            times = {name: row["seconds"][name]["samples"] for name in ("load_cold_codes", "read_cold", "keep")}
            ratios = [cold / max(read, keep) for cold, read, keep in zip(*times.values(), strict=True)]
            assert row["codes_over_longer"]["p50"] == pytest.approx(np.median(ratios))
    errors = {label: row["relative_error"] for label, row in rows.items()}
    assert errors["lossless"] == 0
    assert 0 < errors["int8"] < errors["int4"] < 0.5
    sizes = {label: row["encoded_bytes"] for label, row in rows.items()}  # heads of 16 channels: int8 gains little
    assert sizes["int4"] < min(sizes["int8"], sizes["lossless"])


def test_the_seed_draws_an_order_anew_for_each_sample(tiny_engine, corpus_dir, tmp_path, monkeypatch):
    order = []
    seconds, load = Reader.seconds, TimedCodec._load

    def reads(*arguments):
        order.append("read")
        return seconds(*arguments)

    def loads(*arguments):
        order.append("load")
        load(*arguments)

    monkeypatch.setattr(Reader, "seconds", reads)
    monkeypatch.setattr(TimedCodec, "_load", loads)

    def order_of(seed):
        order.clear()
        options = StoreOptions(parse_codecs(["lossless"]), 1200, (1,), num_samples=6, seed=seed)
        run_store(tiny_engine, read_corpus([str(corpus_dir)]), options, tmp_path / "out", lambda *_: None)
        return [tuple(order[1:][start : start + 4]) for start in range(0, 24, 4)]  # behind the first load

    first = order_of(0)
    assert len(set(first)) > 1
    assert all(sorted(sample) == ["load", "load", "read", "read"] for sample in first)
    assert order_of(0) == first
    assert order_of(1) != first


def test_no_more_is_read_than_the_model_reads(tiny_engine, corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tiny_engine.model), "window_tokens", 500)
    options = StoreOptions(parse_codecs(["int8"]), 1200, (1,), num_samples=1)
    summary = run_store(tiny_engine, read_corpus([str(corpus_dir)]), options, tmp_path / "out", lambda *_: None)
    assert 490 < summary["num_tokens"] <= 500


def test_whether_the_page_cache_was_dropped_is_said(tiny_engine, corpus_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tiny_engine.store.backend), "drop_page_cache", lambda *_: False)
    options = StoreOptions(parse_codecs(["int8"]), 1200, (1,), num_samples=1)
    summary = run_store(tiny_engine, read_corpus([str(corpus_dir)]), options, tmp_path / "out", lambda *_: None)
    assert summary["rows"][0]["page_cache_dropped"] is False
    assert "could NOT be dropped" in (tmp_path / "out" / "table.md").read_text()


def test_a_store_that_gives_back_other_values_is_not_timed(tiny_engine, corpus_dir, tmp_path, monkeypatch):
    load = TimedCodec._load

    def damaged(self, entries):
        load(self, entries)
        self._buffers[0][0][0, 0] += 1

    monkeypatch.setattr(TimedCodec, "_load", damaged)
    with pytest.raises(RuntimeError, match="other numbers of layer 0"):
        options = StoreOptions(parse_codecs(["int8"]), 1200, (1,), num_samples=1)
        run_store(tiny_engine, read_corpus([str(corpus_dir)]), options, tmp_path / "out", lambda *_: None)


def test_codes_that_the_store_gives_back_otherwise_are_not_timed(tiny_engine, corpus_dir, tmp_path, monkeypatch):
    load = TimedCodec._load

    def damaged(self, entries, codes=None):
        load(self, entries, codes)
        if codes is not None:
            codes[1][0].scales[0, 0, 0] += 1

    monkeypatch.setattr(TimedCodec, "_load", damaged)
    with pytest.raises(RuntimeError, match="other codes"):
        options = StoreOptions(parse_codecs(["int8"]), 1200, (1,), num_samples=1)
        run_store(tiny_engine, read_corpus([str(corpus_dir)]), options, tmp_path / "out", lambda *_: None)


@pytest.mark.skipif(not can_pin(), reason="threads cannot be bound to cores here")
def test_threads_are_bound_and_set_free_again():
    before = os.sched_getaffinity(0)
    with on_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_the_command(tiny_model_dir, bench_home, corpus_dir, tmp_path):
    arguments = ["store", "--corpus", corpus_dir, "--model", tiny_model_dir, "--out", tmp_path / "out"]
    arguments += ["--codec", "int8", "--samples", 2, "--cores", "1"]
    done = CliRunner().invoke(app, [str(part) for part in [*arguments, "--json"]])
    assert done.exit_code == 0, done.output
    assert [row["label"] for row in json.loads(done.stdout)["rows"]] == ["int8"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["store", "run"]
    assert all({"machine", "commit", "versions"} <= set(line) for line in lines)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert (tmp_path / "out" / "store.png").stat().st_size > 1000
    wrong = CliRunner().invoke(app, [str(part) for part in [*arguments, "--samples", "0"]])
    assert isinstance(wrong.exception, UsageError)
    wrong = CliRunner().invoke(app, [str(part) for part in [*arguments, "--cores", "1,9999"]])
    assert isinstance(wrong.exception, UsageError)
    assert "--cores has 9999" in str(wrong.exception)
