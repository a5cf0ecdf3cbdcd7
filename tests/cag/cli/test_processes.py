"""What only a real process shows: quick starts, a clean stdout, Ctrl-C, a reader that has gone."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tiny import tiny_config, write_tiny_model

CAG = [sys.executable, "-m", "cag.cli"]


def test_the_command_line_starts_without_torch():
    code = (
        "import sys, cag.cli; left = {'torch', 'transformers', 'numpy', 'rich', 'fastapi'} & set(sys.modules);"
        "assert not left, left; cag.cli.main(['--help'])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "\n  build " in finished.stdout
    assert finished.stderr == ""


def test_a_reader_that_has_gone_is_no_error(book):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run([*CAG, "ls", "--store", str(book)], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, "")


@pytest.mark.slow
def test_stdout_holds_the_object_and_nothing_else(corpus, tiny_model_dir, tmp_path):
    options = ["--name", "book", "--model", str(tiny_model_dir), "--store", str(tmp_path / "s"), "--json"]
    built = subprocess.run([*CAG, "build", str(corpus), *options], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["name"] == "book"
    assert "reading: " in built.stderr


@pytest.mark.slow
def test_ctrl_c_during_a_build_leaves_the_store_as_it_was_and_the_next_build_goes_on(tmp_path):
    config = tiny_config(max_position_embeddings=32768, num_hidden_layers=4)
    model = write_tiny_model(tmp_path / "model", config=config)
    (tmp_path / "long.txt").write_text("".join(f"Valve {number} was closed by hand.\n" for number in range(600)))
    store = tmp_path / "s"
    options = ["--name", "book", "--model", str(model), "--store", str(store), "--json"]
    command = [*CAG, "build", str(tmp_path / "long.txt"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("  "):  # the first tenth of the reading
                process.send_signal(signal.SIGINT)
                break
        stdout, stderr = process.communicate()
    error = json.loads(stdout)["error"]
    assert (process.returncode, error["code"]) == (130, "interrupted")
    assert "store is as it was" in error["message"]
    assert "Traceback" not in stderr
    assert list((store / "refs").iterdir()) == []
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(resumed.stdout)["reused_tokens"] >= 1024
