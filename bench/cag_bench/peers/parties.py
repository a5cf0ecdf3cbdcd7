"""Who is compared: one way to answer a question behind the prefix, and one to answer many at once.

All get the same token ids, answer greedily and never stop early, so the work is equal. Clocks are the engines' own and
run from the question's arrival: ours has the tokenizing of the question in it, peers are given token ids.
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cag.generation.generate import Generation, SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.prefix import Prefix
from cag_bench.arms import BenchArm
from cag_bench.errors import PrefixRecomputed
from cag_bench.peers.process import PeerProcess
from cag_store.backends import page_cache

MEMORY, DISK = "memory", "disk"


@dataclass(frozen=True)
class AskedQuestion:
    """A question's words, and its tokens behind the prefix."""

    qid: str
    text: str
    token_ids: list[int]
    answers: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """Seconds and tokens of an answer. `ttft_s` has `load_s` in it; `tpot_s` is None for a single token.

    `page_cache_dropped` is None where nothing comes from a file.
    """

    load_s: float
    ttft_s: float
    tpot_s: float | None
    token_ids: tuple[int, ...]
    cached_tokens: int
    page_cache_dropped: bool | None = None


@dataclass(frozen=True)
class SessionsReply:
    """Seconds from the arrival of all questions to the last token, and the tokens of each answer."""

    total_s: float
    token_ids: tuple[tuple[int, ...], ...]


class Party(ABC):
    """Answers one question at a time. `source` is where its prefix lies when a question comes."""

    name: str
    source: str

    @abstractmethod
    def ask(self, question: AskedQuestion, num_tokens: int) -> Reply:
        """An answer of exactly `num_tokens` tokens."""


class SessionsParty(ABC):
    """Answers many questions at once behind one prefix, or behind a copy of it each."""

    name: str

    @abstractmethod
    def ask_all(self, questions: Sequence[AskedQuestion], num_tokens: int) -> SessionsReply:
        """Answers of exactly `num_tokens` tokens each."""


class CagParty(Party):
    """An arm of ours."""

    def __init__(self, arm: BenchArm, codec: str, source: str) -> None:
        self.name, self.source, self._arm = f"{arm.name}@{codec}", source, arm

    def ask(self, question: AskedQuestion, num_tokens: int) -> Reply:
        """See `Party.ask`. Raises as `BenchArm.ask`, among them `PrefixRecomputed`."""
        answered = self._arm.ask(question.text, SamplingOptions(max_tokens=num_tokens, speculate=False))
        answer, timings = answered.answer, answered.answer.timings
        return Reply(
            timings.load_s,
            timings.ttft_s,
            timings.tpot_s or None,
            answer.token_ids,
            answer.usage.cached_tokens,
            answered.page_cache_dropped,
        )


class CagSessions(SessionsParty):
    """Sessions of ours on one resident prefix, stepped together."""

    def __init__(self, name: str, prefix: Prefix) -> None:
        self.name, self._prefix = name, prefix

    def ask_all(self, questions: Sequence[AskedQuestion], num_tokens: int) -> SessionsReply:
        """See `SessionsParty.ask_all`. Raises what an answer failed with."""
        model, options = self._prefix.model, SamplingOptions(max_tokens=num_tokens, speculate=False)
        begin = time.perf_counter()
        scheduler = Scheduler(model)
        requests = [
            scheduler.submit(
                Generation(model, model.new_session_state(self._prefix.resident), question.token_ids, options),
                lambda _: None,
            )
            for question in questions
        ]
        scheduler.run()
        total_s = time.perf_counter() - begin
        for request in requests:
            if request.error is not None:
                raise request.error
        return SessionsReply(total_s, tuple(tuple(request.generation.token_ids) for request in requests))


class PeerParty(Party):
    """A peer with its prefix in memory, or in a file whose pages are dropped before each question."""

    def __init__(
        self,
        name: str,
        process: PeerProcess,
        source: str,
        timeout_s: float,
        path: Path | None = None,
        prefix_tokens: int = 0,
    ) -> None:
        self.name, self.source = name, source
        self._process, self._timeout_s, self._path = process, timeout_s, path
        self._prefix_tokens = prefix_tokens

    def ask(self, question: AskedQuestion, num_tokens: int) -> Reply:
        """See `Party.ask`. Raises: `PeerError`; `PrefixRecomputed`."""
        dropped = drop_file(self._path) if self._path is not None else None
        request = {"do": "ask", "source": self.source, "question_ids": question.token_ids, "num_tokens": num_tokens}
        answer = self._process.request(request, self._timeout_s)
        reply = read_reply(answer, num_tokens, self._process)
        check_cached(self.name, reply.cached_tokens, self._prefix_tokens)
        return replace(reply, page_cache_dropped=dropped)


class PeerSessions(SessionsParty):
    """A peer's own way to serve many."""

    def __init__(self, name: str, process: PeerProcess, timeout_s: float) -> None:
        self.name, self._process, self._timeout_s = name, process, timeout_s

    def ask_all(self, questions: Sequence[AskedQuestion], num_tokens: int) -> SessionsReply:
        """See `SessionsParty.ask_all`. Raises: `PeerError`."""
        asked = [question.token_ids for question in questions]
        request = {"do": "sessions", "questions": asked, "num_tokens": num_tokens}
        answer = self._process.request(request, self._timeout_s)
        answers = answer.get("token_ids")
        if not isinstance(answers, list) or len(answers) != len(questions):
            raise self._process.nonsense(f"gave no {len(questions)} answers")
        tokens = tuple(_token_ids(each, num_tokens, self._process) for each in answers)
        return SessionsReply(_seconds(answer, "total_s", self._process), tokens)


def read_reply(answer: Mapping[str, Any], num_tokens: int, process: PeerProcess) -> Reply:
    """A peer's answer to one question. Raises: `PeerNonsense`."""
    cached = answer.get("cached_tokens")
    if not isinstance(cached, int) or cached < 0:
        raise process.nonsense(f"says that {cached!r} tokens were cached")
    return Reply(
        _seconds(answer, "load_s", process),
        _seconds(answer, "ttft_s", process),
        _seconds(answer, "tpot_s", process) if num_tokens > 1 else None,
        _token_ids(answer.get("token_ids"), num_tokens, process),
        cached,
    )


def check_cached(party: str, cached_tokens: int, prefix_tokens: int) -> None:
    """Raises: `PrefixRecomputed` when a peer read more than half of the prefix again; whole blocks of any size that the
    prefix has are more than half of it."""
    if 2 * cached_tokens < prefix_tokens:
        raise PrefixRecomputed(
            f"{party}: {cached_tokens} of the {prefix_tokens} tokens of the prefix were cached.",
            hint="The run was stopped: its times would not be those of a cache.",
            arm=party,
            expected=prefix_tokens,
            found=cached_tokens,
        )


def drop_file(path: Path) -> bool:
    """Drop a file's pages from memory; whether the kernel then says that none is left."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return page_cache.drop(descriptor)
    finally:
        os.close(descriptor)


def _seconds(answer: Mapping[str, Any], name: str, process: PeerProcess) -> float:
    value = answer.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise process.nonsense(f"says that {name} is {value!r}")
    return float(value)


def _token_ids(found: Any, num_tokens: int, process: PeerProcess) -> tuple[int, ...]:
    if not isinstance(found, list) or len(found) != num_tokens or not all(type(token) is int for token in found):
        raise process.nonsense(f"gave no {num_tokens} tokens")
    return tuple(found)
