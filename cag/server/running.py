"""Answers in progress: computed together by one scheduler, read on the event loop, which is never blocked.

    request -> AnswerRun.begin: slot -> worker thread: cache, session -> scheduler's thread: tokens -> queue
            -> AnswerRun.pieces -> response

A worker thread sleeps while tokens are made; it composes the answer in the end. An answer that nobody wants any more
leaves at the next step, and its slot is free when it has left.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cag.errors import UsageError
from cag.generation.answer import Answer, Piece
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Request
from cag.server.caches import ResidentCaches
from cag.server.conversations import LeftConversations, WholeConversation
from cag.server.loop import SchedulerLoop
from cag.server.metrics import ServerMetrics
from cag.server.sessions import KeptSession, NewSession, Place
from cag.server.slots import Slots
from cag.server.tenants import CacheKey

Event = Piece | Answer | Exception


@dataclass(frozen=True)
class Question:
    """What one request asks: the cache, earlier (question, answer) turns, the question, sampling; `session` if it is
    asked behind the turns of that one. `goes_on`: whether the next question may come with this turn as an earlier one.
    """

    cache: CacheKey
    text: str
    options: SamplingOptions
    history: tuple[tuple[str, str], ...] = ()
    session: KeptSession | None = None
    goes_on: bool = False


@dataclass(frozen=True)
class Workplace:
    """Where answers are computed."""

    caches: ResidentCaches
    left: LeftConversations
    loop: SchedulerLoop
    slots: Slots
    threads: ThreadPoolExecutor
    metrics: ServerMetrics
    runs: set[AnswerRun]


class AnswerRun:
    """One answer. `begin`, then read `pieces` to the end, then `answer`; or `complete`. `cancel` at any time."""

    def __init__(self, question: Question, workplace: Workplace) -> None:
        self.question = question
        self._at = workplace
        self._place = _place(question, workplace)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._request: Request | None = None
        self._first: Piece | Answer = Piece()
        self._answer: Answer | None = None

    async def begin(self) -> None:
        """Wait for a slot and for the first piece. Whatever is wrong before that is raised here."""
        self._place.claim()
        try:
            asked_at = time.perf_counter()
            await self._check()
            await self._at.slots.acquire(self.question.cache.tenant)
            started_at = time.perf_counter()
            self._at.metrics.waited.observe(started_at - asked_at)
            self._start(started_at)
        except BaseException:
            self._place.release()
            raise
        try:
            self._first = await self._next()
        except BaseException:
            self.cancel()
            raise

    async def _check(self) -> None:
        """What cannot be answered has no slot, nor waits for one. Raises: UsageError, CacheNotFound, StoreError."""
        question = self.question
        try:
            if not question.text.strip():
                raise UsageError("the question is empty.")
            if self._at.slots.are_taken and question.session is None:  # else it is looked up at once anyway
                await asyncio.to_thread(self._at.caches.check, question.cache)
        except Exception as error:
            self._at.metrics.count_error(error)
            raise

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of the text and of the reasoning; joined they are the answer's. Raises what went wrong after the
        first one."""
        event = self._first
        while not isinstance(event, Answer):
            yield event
            event = await self._next()
        self._answer = event

    async def _next(self) -> Piece | Answer:
        """What comes next. Raises what went wrong."""
        event = await self._events.get()
        if isinstance(event, Exception):
            try:
                raise event
            finally:
                del event  # its traceback holds this frame, which must not hold it
        return event

    async def complete(self) -> Answer:
        """The whole answer at once."""
        try:
            await self.begin()
            async for _ in self.pieces():
                pass
        finally:
            self.cancel()
        return self.answer

    @property
    def answer(self) -> Answer:
        """The answer, once `pieces` was read to its end."""
        assert self._answer is not None, "pieces() was not read to its end"
        return self._answer

    def cancel(self) -> None:
        """Leave at the next step, if it is still running."""
        self._cancelled.set()
        request = self._request
        if request is not None:
            request.cancel()

    def interrupt(self, error: Exception) -> None:
        """As `cancel`, and whoever reads is told."""
        self._events.put_nowait(error)
        self.cancel()

    def _start(self, started_at: float) -> None:
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        def ended(_: object) -> None:
            self._at.runs.discard(self)
            self._at.slots.release(time.perf_counter() - started_at)

        self._at.runs.add(self)
        try:
            loop.run_in_executor(self._at.threads, self._compute, emit).add_done_callback(ended)
        except RuntimeError:  # the threads were shut down
            ended(None)
            raise

    def _compute(self, emit: Callable[[Event], None]) -> None:
        """On a worker thread."""
        try:
            answer = self._generate(emit)
        except Exception as error:
            self._at.metrics.count_error(error)
            emit(error)
            return
        if answer is None:
            self._at.metrics.answers.add(1, "cancelled")
        else:
            self._at.metrics.count_answer(answer)
            emit(answer)

    def _generate(self, emit: Callable[[Event], None]) -> Answer | None:
        """The answer, or None when it was cancelled. Then the session has been released."""
        question, trim_text, trim_reasoning = self.question, EdgeTrimmer(), EdgeTrimmer()

        def show(piece: Piece) -> None:
            if any(shown := Piece(trim_text(piece.text), trim_reasoning(piece.reasoning))):
                emit(shown)

        with self._place.using() as use:
            stream = use.session.stream(
                question.text, question.options, started_at=use.opened_at, history=question.history
            )
            if self._cancelled.is_set():
                return None
            self._request = request = stream.submit(self._at.loop.scheduler, show)
            if self._cancelled.is_set():  # meanwhile
                request.cancel()
            try:
                return stream.finish(request)
            finally:
                self._request = None  # it tells this run its pieces, and two that hold each other stay for long


def _place(question: Question, at: Workplace) -> Place:
    if question.goes_on:
        return WholeConversation(at.caches, question.cache, at.left, question.history, question.text)
    return question.session or NewSession(at.caches, question.cache)


class EdgeTrimmer:
    """Strips a text that comes in pieces: what it returns, joined, is the whole text stripped."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""

    def __call__(self, piece: str) -> str:
        """The part of `piece` (and of what was held back before) that certainly belongs to the stripped text."""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown
