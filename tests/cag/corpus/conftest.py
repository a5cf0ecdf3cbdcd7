"""A way to put files on disk and load them; real files of each format are made inside the tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cag.corpus import Document, load_corpus


@pytest.fixture
def load_one(tmp_path: Path) -> Callable[[str, str | bytes], Document]:
    """Write one file, load it by its path, and give back its only document."""

    def load(name: str, content: str | bytes) -> Document:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        (document,) = load_corpus([path]).documents
        return document

    return load


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, str | bytes]], Path]:
    """Write files given as {relative path: content} below a folder called `root`, and give back that folder."""

    def write(files: dict[str, str | bytes]) -> Path:
        for name, content in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return tmp_path / "root"

    return write
