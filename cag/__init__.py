"""Cache-augmented generation: read a body of text once, answer questions right behind it.

    engine = cag.Engine.load("qwen2.5-coder-1.5b-instruct")
    engine.build(["docs/"], name="handbook")
    with engine.open("handbook") as prefix:
        print(prefix.ask("How do I rotate a key?").text)

Names are imported when they are first used, so that `import cag` and `cag --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
import os

# Idle OpenMP threads that spin take the cores from the ones that work; threads that sleep at once are slow to wake for
# the next of a forward's many small products. A short spin serves both (docs/log.md). Must be set before torch is
# imported.
if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "12000"}

TYPE_CHECKING = False  # `typing` takes longer than all of this
if TYPE_CHECKING:
    from typing import Any

    from cag.building.options import BuildOptions, BuildProgress, BuildReport
    from cag.corpus import Document, load_corpus, load_documents
    from cag.engine import Engine
    from cag.errors import CagError
    from cag.generation.answer import Answer, CacheOrigin, Citation, Piece, Timings, Usage
    from cag.generation.generate import SamplingOptions
    from cag.generation.session import AnswerStream, Session
    from cag.prefix import Prefix

_HOMES = {
    "Answer": "cag.generation.answer",
    "AnswerStream": "cag.generation.session",
    "BuildOptions": "cag.building.options",
    "BuildProgress": "cag.building.options",
    "BuildReport": "cag.building.options",
    "CacheOrigin": "cag.generation.answer",
    "CagError": "cag.errors",
    "Citation": "cag.generation.answer",
    "Document": "cag.corpus",
    "Engine": "cag.engine",
    "Piece": "cag.generation.answer",
    "Prefix": "cag.prefix",
    "SamplingOptions": "cag.generation.generate",
    "Session": "cag.generation.session",
    "Timings": "cag.generation.answer",
    "Usage": "cag.generation.answer",
    "load_corpus": "cag.corpus",
    "load_documents": "cag.corpus",
}

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AnswerStream",
    "BuildOptions",
    "BuildProgress",
    "BuildReport",
    "CacheOrigin",
    "CagError",
    "Citation",
    "Document",
    "Engine",
    "Piece",
    "Prefix",
    "SamplingOptions",
    "Session",
    "Timings",
    "Usage",
    "__version__",
    "load_corpus",
    "load_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cag' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
