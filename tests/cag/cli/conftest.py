"""Command lines run in this process through the entry point, over a tiny model and a store that was built once."""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cag.cli import main

LONG_TEXT = "The relay of the ninth lock is oiled on the first Monday of each month by the harbour crew. " * 12
CORPUS = {"alpha.md": "# Alpha gate\n\nThe alpha gate opens at seven. Its code is 4711.\n", "relay.txt": LONG_TEXT}


@dataclass(frozen=True)
class Finished:
    """What a command line left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        return json.loads(self.stdout)

    @property
    def error(self) -> dict[str, Any]:
        """The error of a command line with `--json`; stdout holds nothing else."""
        assert set(self.json) == {"error"}
        return self.json["error"]


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory):
    return tmp_path_factory.mktemp("cli-home")


@pytest.fixture(autouse=True)
def cag_home(shared_home, monkeypatch):
    """One cache home for these tests: the machine is measured once."""
    monkeypatch.setenv("CAG_HOME", str(shared_home))
    monkeypatch.setenv("CAG_THREADS", "1")
    return shared_home


@pytest.fixture(autouse=True, scope="session")
def parsers_made_once():
    """Typer makes the parser of all commands anew for each command line, which takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture
def cag(capsys):
    """Runs `cag ARGUMENTS` in this process."""

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(left.value.code, captured.out, captured.err)

    return run


def write_corpus(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(scope="session")
def built_once(tiny_model_dir, tmp_path_factory, shared_home):
    """A store with the cache `book`, and its corpus."""
    from cag.engine import Engine

    folder = tmp_path_factory.mktemp("built")
    corpus = write_corpus(folder / "corpus", CORPUS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAG_HOME", str(shared_home))
        patch.setenv("CAG_THREADS", "1")
        Engine.load(str(tiny_model_dir), store=folder / "store", device="cpu").build([corpus], name="book")
    return folder


@pytest.fixture
def book(built_once, tmp_path):
    """A store of this test's own that holds the cache `book`."""
    shutil.copytree(built_once / "store", tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def corpus(built_once, tmp_path):
    """A copy of the documents of `book`."""
    return shutil.copytree(built_once / "corpus", tmp_path / "corpus")


@pytest.fixture
def damage(book):
    """Flips a byte in the middle of the largest file of a folder of the store."""

    def flip(folder: str) -> None:
        files = [path for path in (book / folder).rglob("*") if path.is_file()]
        path = max(files, key=lambda file: file.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)

    return flip
