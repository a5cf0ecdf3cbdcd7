from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cag.errors import InsufficientResources, UsageError
from cag_bench import cache
from cag_bench.cli import app
from cag_store.errors import UnknownCodec


@pytest.fixture
def bench(tiny_model_dir, bench_home, corpus_dir, questions_file, tmp_path):
    def invoke(*arguments):
        base = ["ttft", "--corpus", corpus_dir, "--questions", questions_file, "--model", tiny_model_dir]
        rest = ["--out", tmp_path / "out", "--max-tokens", "3", "--device", "cpu", *arguments]
        return CliRunner().invoke(app, [str(part) for part in [*base, *rest]])

    return invoke


def test_json_is_the_only_thing_on_standard_output(bench, tmp_path):
    result = bench("--arms", "cag-hot,cag-disk,rag-bm25@3", "--n", "2", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert set(printed["arms"]) == {"cag-hot", "cag-disk", "rag-bm25@3"}
    assert printed["ratios"]["rag-bm25@3/cag-hot"]["n"] == 2
    assert "measure, answers 6/6" in result.stderr
    # The temporary store goes with the run.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.jsonl",
        "summary.json",
        "table.md",
        "ttft.png",
    ]


def test_the_table_goes_to_the_terminal_and_a_named_store_is_kept(bench, tmp_path):
    arguments = ("--arms", "cag-hot,full-prefill", "--n", "1", "--store", tmp_path / "kept")
    first, second = bench(*arguments), bench(*arguments)
    assert first.exit_code == second.exit_code == 0, first.output
    assert "full-prefill" in first.stdout
    assert "built in" in first.stdout
    assert "reused; no build time" in second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--arms", "cag-cold"), "unknown arm"), (("--n", "0"), "at least 1"), (("--max-tokens", "0"), "max_tokens")],
)
def test_bad_options_are_usage_errors(bench, tmp_path, arguments, message):
    result = bench(*arguments)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("codec", ["auto", "transform"])
def test_a_build_gets_the_codec_that_was_named(bench, monkeypatch, codec):
    def build(_model, _store, _name, _documents, options, _progress):
        raise InsufficientResources(options.codec)

    monkeypatch.setattr(cache, "build_cache", build)
    assert str(bench("--arms", "cag-hot", "--codec", codec).exception) == codec


def test_an_unknown_codec_is_refused_before_a_model_is_loaded(bench, tmp_path):
    assert isinstance(bench("--codec", "gzip").exception, UnknownCodec)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_results_that_cannot_be_made_is_a_usage_error(bench, tmp_path):
    (tmp_path / "out").write_text("a file")
    result = bench("--arms", "cag-hot", "--n", "1")
    assert isinstance(result.exception, UsageError)
    assert str(tmp_path / "out") in str(result.exception)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here that nobody can write to")
def test_a_folder_that_takes_no_results_is_a_usage_error_before_a_model_is_loaded(bench):
    result = bench("--arms", "cag-hot", "--store", "kept", "--out", "/proc/self", "--model", "no-such-model")
    assert isinstance(result.exception, UsageError)
    assert "no folder for the results at /proc/self" in str(result.exception)


def test_the_command_line_loads_no_torch():
    code = "import sys, cag_bench.cli; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
