"""Text that is on every machine: Python's own documentation and sources, as calibration material for a model's
basis."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from pydoc_data.topics import topics

from cag.model import LanguageModel

_SOURCES = (
    "argparse.py",
    "asyncio/tasks.py",
    "csv.py",
    "dataclasses.py",
    "email/message.py",
    "heapq.py",
    "http/client.py",
    "json/decoder.py",
    "logging/handlers.py",
    "queue.py",
    "shutil.py",
    "statistics.py",
    "tarfile.py",
    "unittest/case.py",
    "zipfile.py",
)
_OPENING = "Answer from these documents.\n\n"


def own_texts() -> list[str]:
    """Prose of our own, then documentation and source code in turn."""
    folder = Path(os.__file__).parent
    sources = [path.read_text("utf-8") for name in _SOURCES if (path := folder / name).is_file()]
    chapters = [topics[name] for name in sorted(topics)]
    size = max(1, len(chapters) // max(1, len(sources)))
    prose = ["\n\n".join(chapters[first : first + size]) for first in range(0, len(chapters), size)]
    technical = [text for pair in zip(prose, sources, strict=False) for text in pair]
    articles = (Path(__file__).parent / "prose.txt").read_text("utf-8").split("\n\n")
    third = -(-len(articles) // 3)
    return ["\n\n".join(articles[first : first + third]) for first in range(0, len(articles), third)] + technical


def token_windows(model: LanguageModel, texts: list[str], num_windows: int, window_tokens: int) -> list[list[int]]:
    """Windows of at most `window_tokens` tokens, spread evenly over each text and going round the texts."""
    opening = model.tokenizer(_OPENING, add_special_tokens=True)["input_ids"]
    share = -(-num_windows // max(1, len(texts)))
    streams: list[Iterator[list[int]]] = []
    for text in texts:
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = max(1, window_tokens - len(opening))
        last = max(0, len(ids) - size)
        starts = [last * index // max(1, share - 1) for index in range(share)] if share > 1 else [0]
        streams.append(iter([opening + ids[start : start + size] for start in starts]))
    found = islice((next(stream, None) for stream in cycle(streams)), share * len(streams))
    return [window for window in found if window is not None and len(window) > len(opening)][:num_windows]
