"""The commands of the README are run as they stand there, on a tiny model in the place of the default one."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cag.machine import runtime
from tiny import tiny_config, write_tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("cag ")
]


def test_the_readme_commands_run(tmp_path, monkeypatch):
    from cag.cli.commands import app

    monkeypatch.chdir(ROOT)
    measured = runtime._measured_in_this_process()
    monkeypatch.setattr(runtime, "_measure", lambda: measured)  # `doctor` measures again, which its own test is about
    model = write_tiny_model(tmp_path / "model", config=tiny_config(max_position_embeddings=65536))
    runner = CliRunner()
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        words = shlex.split(command, comments=True)[1:]
        arguments = [word.replace("qwen2.5-coder-1.5b-instruct", str(model)) for word in words]
        if arguments[0] in ("build", "update"):
            arguments += ["--model", str(model)]
        if arguments[0] == "ask":
            arguments += ["--max-tokens", "2"]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, f"{command}: {result.output}"


def test_the_readme_python_runs(tmp_path, monkeypatch, capsys):
    model = write_tiny_model(tmp_path / "model")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "keys.md").write_text("Keys are rotated in the console.")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = code.replace("qwen2.5-coder-1.5b-instruct", str(model))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_make_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert f"make {target}" in README
