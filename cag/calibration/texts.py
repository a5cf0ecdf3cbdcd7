"""Text that is on every machine: Python's documentation and sources, what comes with installed packages, and prose of
our own, as calibration material for a model's basis."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from cag.model import LanguageModel

_SOURCES = """
argparse ast asyncio/tasks bdb calendar concurrent/futures/process configparser contextlib csv dataclasses decimal
difflib doctest email/message enum fractions ftplib functools heapq html/parser http/client imaplib inspect ipaddress
json/decoder locale logging/handlers mailbox multiprocessing/pool optparse pdb pickle platform queue random selectors
shutil smtplib socket ssl statistics subprocess tarfile tempfile textwrap threading traceback turtle typing
unittest/case urllib/request uuid weakref xml/dom/minidom xmlrpc/client zipfile
"""
_LEAST_CHARACTERS = 4000  # of a description or licence that is worth a window
_CHAPTERS = 20
_CHARACTERS_PER_TOKEN = 8  # enough for a whole window
_OPENING = "Answer from these documents.\n\n"


def own_texts() -> list[str]:
    """Prose of our own, then source code, descriptions of packages, documentation and licences in turn."""
    articles = (Path(__file__).parent / "prose.txt").read_text("utf-8").split("\n\n")
    third = -(-len(articles) // 3)
    prose = ["\n\n".join(articles[first : first + third]) for first in range(0, len(articles), third)]
    kinds = [_sources(), _descriptions(), _topics(), _licences()]
    code, packages, chapters, licences = (iter(texts) for texts in kinds)
    order = cycle((code, packages, chapters, code, packages, licences))
    technical = (next(kind, None) for kind in islice(order, 6 * max(map(len, kinds))))
    return prose + [text for text in technical if text is not None]


def _sources() -> list[str]:
    """Modules of Python's standard library."""
    folder = Path(os.__file__).parent
    paths = [folder / f"{name}.py" for name in _SOURCES.split()]
    return [path.read_text("utf-8") for path in paths if path.is_file()]


def _topics() -> list[str]:
    """Python's language reference, a mix of chapters in each text."""
    chapters = [topics[name] for name in sorted(topics)]
    return ["\n\n".join(chapters[first::_CHAPTERS]) for first in range(min(_CHAPTERS, len(chapters)))]


def _descriptions() -> list[str]:
    """The long descriptions of the packages that are installed here."""
    found = {}
    for package in metadata.distributions():
        message: Any = package.metadata
        text = str(message.get("Description") or message.get_payload() or "")
        if len(text) >= _LEAST_CHARACTERS:
            found[str(message["Name"])] = text
    return [found[name] for name in sorted(found)]


def _licences() -> list[str]:
    """The licences of the packages that are installed here, each once."""
    found = set[str]()
    for package in metadata.distributions():
        for name in _files_of(package):
            if name.rpartition("/")[2].startswith(("LICENSE", "LICENCE", "COPYING")):
                licence = Path(str(package.locate_file(name)))
                if licence.is_file():
                    found.add(licence.read_text("utf-8", errors="replace"))
    return sorted(text for text in found if len(text) >= _LEAST_CHARACTERS)


def _files_of(package: metadata.Distribution) -> Iterator[str]:
    """As `package.files`, which makes a path of each of a hundred thousand names: seconds of every calibration."""
    record = package.read_text("RECORD")
    if not record:
        return map(str, package.files or ())
    return (row[0] for row in csv.reader(record.splitlines()) if row)


def token_windows(model: LanguageModel, texts: list[str], num_windows: int, window_tokens: int) -> list[list[int]]:
    """Windows of at most `window_tokens` tokens, going round the texts; several of one text are spread evenly over it,
    a single one lies behind its first third."""
    texts = texts[:num_windows]
    opening = model.tokenizer(_OPENING, add_special_tokens=True)["input_ids"]
    share = -(-num_windows // max(1, len(texts)))
    size = max(1, window_tokens - len(opening))
    streams: list[Iterator[list[int]]] = []
    for text in texts:
        excerpt = text if share > 1 else _middle(text, _CHARACTERS_PER_TOKEN * size)
        ids = model.tokenizer(excerpt, add_special_tokens=False, verbose=False)["input_ids"]
        last = max(0, len(ids) - size)
        starts = [last * index // (share - 1) for index in range(share)] if share > 1 else [0]
        streams.append(iter([opening + ids[start : start + size] for start in starts]))
    found = islice((next(stream, None) for stream in cycle(streams)), share * len(streams))
    return [window for window in found if window is not None and len(window) > len(opening)][:num_windows]


def _middle(text: str, num_characters: int) -> str:
    """At most so many characters, from a line behind the first third on; the whole text if it is short."""
    if len(text) <= num_characters:
        return text
    start = min(len(text) // 3, len(text) - num_characters)
    return text[text.find("\n", start) + 1 :][:num_characters]
