"""Names of arms: what `--arms` accepts, and what each name means. Knows no model and no store."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cag.errors import UsageError

HOT, RAM, DISK, FULL_PREFILL = "cag-hot", "cag-ram", "cag-disk", "full-prefill"
CACHED_NAMES = (HOT, RAM, DISK)
RETRIEVER_KINDS = ("bm25", "dense", "hybrid")
ALL_KS = (1, 3, 5, 10)
DEFAULT_ARMS = f"{HOT},{DISK},{FULL_PREFILL},rag-bm25@3,rag-hybrid@3"

_RAG = re.compile(rf"rag-({'|'.join(RETRIEVER_KINDS)})@([1-9]\d{{0,3}})")


@dataclass(frozen=True)
class ArmSpec:
    """One arm: its name, and for a RAG arm the kind of retriever and the number of passages."""

    name: str
    retriever: str | None = None
    k: int = 0

    @property
    def is_cached(self) -> bool:
        """Whether the arm answers behind a cache."""
        return self.name in CACHED_NAMES


def parse_arms(text: str) -> tuple[ArmSpec, ...]:
    """The arms of a comma-separated list, in its order; `all` stands for every arm with k = 1, 3, 5, 10.

    Raises: `UsageError` for an unknown name, a name that stands twice, or an empty list.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("no arm is named.", hint=_known())
    if names == ["all"]:
        names = all_arm_names()
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"arms named twice: {', '.join(repeated)}.")
    return tuple(_parse_arm(name) for name in names)


def all_arm_names() -> list[str]:
    """What `all` stands for."""
    return [*CACHED_NAMES, FULL_PREFILL, *(f"rag-{kind}@{k}" for kind in RETRIEVER_KINDS for k in ALL_KS)]


def _parse_arm(name: str) -> ArmSpec:
    if name in CACHED_NAMES or name == FULL_PREFILL:
        return ArmSpec(name)
    match = _RAG.fullmatch(name)
    if match is None:
        raise UsageError(f"unknown arm {name!r}.", hint=_known())
    return ArmSpec(name, match[1], int(match[2]))


def _known() -> str:
    rag = ", ".join(f"rag-{kind}@K" for kind in RETRIEVER_KINDS)
    return f"Known: {', '.join(CACHED_NAMES)}, {FULL_PREFILL}, {rag}; or all, alone."
