"""The measuring loops: each question to every party, then rounds of many sessions, in orders drawn anew each time.

Parties and questions in, samples out; nothing is averaged here. Only one party works at a time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from cag_bench.peers.parties import AskedQuestion, Party, SessionsParty
from cag_bench.provenance import load_average

T = TypeVar("T")


@dataclass(frozen=True)
class PeerSample:
    """One question answered by one party; times as in `Reply`. `position` is its place in the order drawn."""

    party: str
    source: str
    question_index: int
    position: int
    qid: str
    question_tokens: int
    load_s: float
    ttft_s: float
    tpot_s: float | None
    token_ids: tuple[int, ...]
    cached_tokens: int
    page_cache_dropped: bool | None
    load_average: tuple[float, ...]
    measured_at: float

    def to_json(self) -> dict[str, Any]:
        """The sample's part of a row."""
        return asdict(self)


@dataclass(frozen=True)
class SessionsSample:
    """One round of many sessions by one party."""

    party: str
    round_index: int
    position: int
    num_sessions: int
    num_tokens: int
    total_s: float
    tokens_per_s: float
    token_ids: tuple[tuple[int, ...], ...]
    load_average: tuple[float, ...]
    measured_at: float

    def to_json(self) -> dict[str, Any]:
        """The sample's part of a row."""
        return asdict(self)


def drawn(parties: Sequence[T], key: str) -> list[tuple[int, T]]:
    """The parties in an order drawn from `key`, with their places."""
    order = list(parties)
    random.Random(key).shuffle(order)
    return list(enumerate(order))


def measure_questions(
    parties: Sequence[Party],
    questions: Sequence[AskedQuestion],
    num_tokens: int,
    seed: int,
    on_sample: Callable[[PeerSample], None],
) -> list[PeerSample]:
    """Ask every question of every party. `on_sample` gets each sample as soon as it is there."""
    samples = []
    for index, question in enumerate(questions):
        for position, party in drawn(parties, f"{seed}/{index}"):
            reply = party.ask(question, num_tokens)
            sample = PeerSample(
                party=party.name,
                source=party.source,
                question_index=index,
                position=position,
                qid=question.qid,
                question_tokens=len(question.token_ids),
                load_average=tuple(load_average()),
                measured_at=time.time(),
                **asdict(reply),
            )
            on_sample(sample)
            samples.append(sample)
    return samples


def measure_sessions(
    parties: Sequence[SessionsParty],
    questions: Sequence[AskedQuestion],
    num_tokens: int,
    num_rounds: int,
    seed: int,
    on_sample: Callable[[SessionsSample], None],
) -> list[SessionsSample]:
    """Let every party answer all questions at once, `num_rounds` times."""
    samples = []
    for index in range(num_rounds):
        for position, party in drawn(parties, f"{seed}/sessions/{index}"):
            reply = party.ask_all(questions, num_tokens)
            total = sum(len(answer) for answer in reply.token_ids)
            sample = SessionsSample(
                party=party.name,
                round_index=index,
                position=position,
                num_sessions=len(questions),
                num_tokens=total,
                total_s=reply.total_s,
                tokens_per_s=total / reply.total_s,
                token_ids=reply.token_ids,
                load_average=tuple(load_average()),
                measured_at=time.time(),
            )
            on_sample(sample)
            samples.append(sample)
    return samples
