"""What only a real process shows: quick starts, a clean stdout, Ctrl-C, a reader that has gone."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_weights import OWN_PRODUCT
from transformers import AutoModelForCausalLM

from cag.cli.output import print_json
from cag.machine import runtime
from cag.machine.runtime import RuntimePlan
from cag_kernels import has_compiler
from tiny import tiny_config, write_tiny_model

CAG = [sys.executable, "-m", "cag"]


def test_the_command_line_starts_without_torch():
    code = (
        "import sys, cag.cli.commands; left = {'torch', 'transformers', 'numpy', 'rich', 'fastapi'} & set(sys.modules);"
        "assert not left, left; cag.cli.main(['--help'])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "\n  build " in finished.stdout
    assert finished.stderr == ""


WITHOUT = """
import sys

sys.modules[sys.argv[1]] = None
from cag.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("package", ["zstandard", "xxhash", "filelock", "pydantic"])
def test_a_package_that_is_missing_is_named(package, tmp_path):
    """The store lacks the first two, which the table of errors asks for as well."""
    command = ["serve", "--preload", "nix"] if package == "pydantic" else ["pull", "no-such-model"]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith(f"error: the package {package!r} is not installed.\nhint: Install cag-engine anew")


INTERRUPTED_AT_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt)
from cag.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("module", ["typer", "cag.cli.ask", "cag.cli.doctor", "cag_store"])
def test_ctrl_c_while_a_command_starts_ends_it_quietly(module, book):
    """The last one is imported by the command itself."""
    command = [sys.executable, "-c", INTERRUPTED_AT_IMPORT, module, "ls", "--store", str(book)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (130, "")
    assert process.stderr == ("error: interrupted.\n" if module == "cag_store" else "")


def test_ctrl_c_is_not_heeded_where_the_shell_says_so(book):
    code = INTERRUPTED_AT_IMPORT.replace("signal.default_int_handler)", "signal.SIG_IGN)")
    command = [sys.executable, "-c", code, "typer", "ls", "--store", str(book)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0
    assert "book" in process.stdout


def test_a_reader_that_has_gone_is_no_error(book):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run([*CAG, "ls", "--store", str(book)], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])  # "" is as if it were not there
@pytest.mark.parametrize(
    "command", [["ls"], ["ls", "--json"], ["show", "nix", "--json"], ["--help"], ["bench", "store", "--help"]]
)
def test_a_full_disk_behind_stdout_is_said(book, command, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    line = [*CAG, *command, *(["--store", str(book)] if "--help" not in command else [])]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.returncode == 1
    assert "space" in process.stderr
    assert "bug" not in process.stderr
    assert "Traceback" not in process.stderr


def test_a_stdout_that_lacks_a_character_gets_an_escape(book):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    line = [*CAG, "show", "n\u00fcx", "--store", str(book), "--json"]
    shown = subprocess.run(line, capture_output=True, env=environment)
    assert "n\u00fcx" in json.loads(shown.stdout)["error"]["message"]
    code = "import cag.cli; cag.cli._open_standard_streams(); print('5 \u20ac')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert printed.stdout == b"5 \\u20ac\n"
    with redirect_stdout(io.StringIO()) as kept:  # text in memory has no encoding
        print_json({"price": "5 \u20ac"})
    assert kept.getvalue() == '{"price": "5 \u20ac"}\n'


def test_an_error_that_nobody_reads_is_no_other_error(book):
    reading, writing = os.pipe()
    os.close(reading)
    command = [*CAG, "show", "nix", "--store", str(book), "--json"]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, "")


@pytest.mark.parametrize(("closed", "said"), [(">&-", b""), ("2>&-", None), ("<&- >&- 2>&-", b"")])
def test_closed_streams_are_none_to_write_to(book, closed, said):
    command = [*CAG, "ls", "--store", str(book)]
    process = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], stdout=subprocess.PIPE)
    assert process.returncode == 0
    assert process.stdout == said or (said is None and b"cache holds" not in process.stdout)


@pytest.mark.slow
def test_stdout_holds_the_object_and_nothing_else(corpus, tiny_model_dir, tmp_path):
    options = ["--name", "book", "--model", str(tiny_model_dir), "--store", str(tmp_path / "s"), "--json"]
    built = subprocess.run([*CAG, "build", str(corpus), *options], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["name"] == "book"
    assert "reading: " in built.stderr


INTERRUPTED = """
import os, signal, sys
import cag.cli.build

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born without it
tell = cag.cli.build._tell

def tell_and_interrupt(report, progress):
    tell(report, progress)
    if progress.stage == "prefill" and progress.done_tokens >= 1024:
        os.kill(os.getpid(), signal.SIGINT)

cag.cli.build._tell = tell_and_interrupt
cag.cli.main(sys.argv[1:])
"""  # a signal from another process may come too late, when that one has to wait for a core


@pytest.mark.slow
def test_ctrl_c_during_a_build_leaves_the_store_as_it_was_and_the_next_build_goes_on(tmp_path):
    config = tiny_config(max_position_embeddings=32768, num_hidden_layers=4)
    model = write_tiny_model(tmp_path / "model", config=config)
    (tmp_path / "long.txt").write_text("".join(f"Valve {number} was closed by hand.\n" for number in range(600)))
    store = tmp_path / "s"
    options = ["--name", "book", "--model", str(model), "--store", str(store), "--json"]
    arguments = ["build", str(tmp_path / "long.txt"), *options]
    process = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True)
    error = json.loads(process.stdout)["error"]
    assert (process.returncode, error["code"]) == (130, "interrupted")
    assert "store is as it was" in error["message"]
    assert "Traceback" not in process.stderr
    assert list((store / "refs").iterdir()) == []
    resumed = subprocess.run([*CAG, *arguments], capture_output=True, text=True)
    assert json.loads(resumed.stdout)["reused_tokens"] >= 1024


HEAVY = {
    "torch", "transformers", "numba", "llvmlite", "triton", "sympy", "fastapi", "pydantic_settings", "huggingface_hub",
    "jinja2", "scipy", "sklearn", "pandas", "bm25s", "PIL", "accelerate", "boto3",
}  # fmt: skip


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["ask", "--help"], ["ls"], ["show", "book"]])
def test_looking_imports_nothing_heavy(command, book):
    arguments = command if command[0].startswith("--") or "--help" in command else [*command, "--store", str(book)]
    code = (
        f"import sys; from cag.cli.commands import run; code = run({arguments!r}); left = {HEAVY!r} & set(sys.modules);"
        "assert (code, left) == (0, set()), (code, left)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


ASKS = """
import json, sys
import cag.cli.commands

class FirstToken:
    def __init__(self, stdout): self.stdout, self.modules = stdout, None
    def write(self, text):
        if self.modules is None: self.modules = sorted(sys.modules)
        return len(text)
    def flush(self): pass
    def isatty(self): return False

sys.stdout = watching = FirstToken(sys.stdout)
code = cag.cli.commands.run(sys.argv[1:])
print(json.dumps({"code": code, "modules": watching.modules}), file=watching.stdout)
"""
LATER = HEAVY - {"torch", "numba", "llvmlite"} | {
    "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "cag.forward.attention_hook",
    "cag.retrieval", "cag.server", "cag_bench",
}  # fmt: skip


@pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")
@pytest.mark.slow
def test_the_second_question_of_a_model_waits_for_no_more_than_it_needs(tmp_path, monkeypatch):
    """Before the first token of the first question everything is imported, before that of the second one much less,
    however long it is: it is read in blocks of few rows."""
    monkeypatch.setenv("CAG_HOME", str(tmp_path / "home"))
    plan_for_tests(tmp_path / "home")
    model, store = tmp_path / "model", str(tmp_path / "s")
    write_tiny_model(model, config=tiny_config(torch_dtype="bfloat16"))
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(model)
    (tmp_path / "text.txt").write_text("Nobody has seen the omega key since Tuesday.\n")
    built = [*CAG, "build", str(tmp_path / "text.txt"), "--name", "book", "--model", str(model), "--store", store]
    subprocess.run(built, check=True, capture_output=True)
    for record in (tmp_path / "home" / "starts").iterdir():
        record.unlink()

    def asked(question):
        command = [sys.executable, "-c", ASKS, "ask", "book", question, "--store", store, "--max-tokens", "3"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert found["code"] == 0
        return set(found["modules"])

    first, second, long = asked("Who?"), asked("Who?"), asked("Who? " * 60)
    assert {"torch", "transformers.modeling_utils", "cag.forward.attention_hook"} <= first
    assert {"torch", "cag.engine", "cag.generation.session"} <= second
    assert second & LATER == set()
    assert long & LATER == set()


def plan_for_tests(home):
    """As if this machine had been measured."""
    plan = RuntimePlan("cpu", "bfloat16", 1, 1, OWN_PRODUCT, {}, "for tests")
    kept = {"machine": runtime._machine_key(), "measurements": 3, "disturbed": 0, "plan": asdict(plan)}
    home.mkdir()
    (home / "runtime.json").write_text(json.dumps(kept))
