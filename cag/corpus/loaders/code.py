"""Source code, configuration and tables of text (CSV, XML, JSON): kept as they are, titled by their file name."""

from __future__ import annotations

from pathlib import PurePosixPath

from cag.corpus.loaders.base import Extract, Source
from cag.corpus.loaders.text import read_text

_DECLARES_ENCODING = (".py", ".pyi", ".pyx", ".rb", ".xml", ".xsd", ".xsl")


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for binary data and for encodings that are not certain."""
    name = PurePosixPath(source.name).name
    return [Extract(read_text(source, allow_declared=name.lower().endswith(_DECLARES_ENCODING)), name)]
