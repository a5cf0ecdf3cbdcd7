"""What the routes share: the engines, their open caches, slots and threads, from start to shutdown."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from cag.engine import Engine
from cag.errors import ServerStopping
from cag.server.caches import ResidentCaches
from cag.server.conversations import LeftConversations
from cag.server.errors import error_facts
from cag.server.jobs import BuildJobs
from cag.server.loop import SchedulerLoop
from cag.server.metrics import ServerMetrics
from cag.server.running import AnswerRun, Question, Workplace
from cag.server.session_table import SessionTable
from cag.server.settings import ServerSettings
from cag.server.slots import Slots
from cag.server.tenants import CacheKey, Tenants

RETRY_PRELOAD_S = 10.0
SWEEP_S = 1.0
CHECK_CACHES_S = 30.0

logger = logging.getLogger(__name__)


class AnswerService:
    """One model behind HTTP, over the stores of all tenants.

    Attributes:
        engine: the operator's.
        tenants: everybody's.
        left: conversations that chat completions have left.
        builds: caches that are being built.
        preloading: names that are not resident yet.
        preload_errors: names that could not be loaded, with the reason.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.tenants = Tenants(engine, frozenset(settings.tenant_keys), settings.tenant_stores)
        self.caches = ResidentCaches(self.tenants.find, settings.max_resident_bytes)
        self.builds = BuildJobs(self.tenants, settings.max_waiting_builds)
        self.sessions = SessionTable(
            self.caches, settings.session_ttl_s, settings.max_sessions, engine.model.settle_pages
        )
        self.left = LeftConversations(settings.conversation_bytes, settings.session_ttl_s, engine.model.settle_pages)
        engine.model.pages.make_room = self.left.make_room
        self.slots = Slots(settings.num_slots, settings.max_waiting)
        self.metrics = ServerMetrics()
        self.runs: set[AnswerRun] = set()
        self.preloading = list(settings.preload)
        self.preload_errors: dict[str, str] = {}
        threads = ThreadPoolExecutor(settings.num_slots, "cag-answer")
        self.loop = SchedulerLoop(engine.model, self.metrics)
        self._workplace = Workplace(self.caches, self.left, self.loop, self.slots, threads, self.metrics, self.runs)
        self._closing = asyncio.Event()
        self._add_readings()

    def start(self) -> None:
        """Begin to answer; what is asked before waits."""
        self.loop.start()
        self.builds.start()

    def run(self, question: Question) -> AnswerRun:
        """An answer to begin."""
        options = replace(question.options, speculate=self.settings.speculate)
        return AnswerRun(replace(question, options=options), self._workplace)

    async def preload(self) -> None:
        """Load the caches of the settings one after the other. Failures are kept in `preload_errors`, and
        tried again every `RETRY_PRELOAD_S` until they load: nobody sends questions to a server that is not ready."""
        while self.preloading and not self._closing.is_set():
            await self._preload_one(self.preloading[0])
            del self.preloading[0]
        while self.preload_errors and not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), RETRY_PRELOAD_S)
            for name in () if self._closing.is_set() else list(self.preload_errors):
                await self._preload_one(name)

    async def _preload_one(self, name: str) -> None:
        try:
            await asyncio.to_thread(self.caches.load, CacheKey.named(name))
        except Exception as error:  # whatever it is, `/readyz` must not say "loading" for ever
            logger.error("cannot preload %s: %s", name, error)
            self.preload_errors[name] = error_facts(error).message
        else:
            self.preload_errors.pop(name, None)

    async def sweep(self) -> None:
        """Close sessions that have expired, every `SWEEP_S`, and caches that are outdated, every `CHECK_CACHES_S`,
        until the service is closed. Who was answered last gave pages back behind the last step: their memory goes when
        nobody has come since."""
        checked_at, num_steps = time.monotonic(), 0
        while not self._closing.is_set():
            if self.sessions.any_over:
                await self._tidy(self.sessions.close_expired)
            if self.left.any_over:
                await self._tidy(self.left.close_expired)
            if time.monotonic() - checked_at >= CHECK_CACHES_S:
                await self._tidy(self.caches.drop_outdated)
                if self.loop.scheduler.num_steps == num_steps:
                    await self._tidy(self.engine.model.settle_pages)
                checked_at, num_steps = time.monotonic(), self.loop.scheduler.num_steps
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), SWEEP_S)

    async def _tidy(self, work: Callable[[], None]) -> None:
        """Do `work` on another thread. It is tried again when its time has come, so what goes wrong is only logged."""
        try:
            await asyncio.to_thread(work)
        except Exception:
            logger.exception("cannot tidy up")

    def interrupt(self) -> None:
        """End all answers, those that wait too, with an error that their clients are told."""
        error = ServerStopping("the server stops.", hint="Ask again in a moment, or another server.")
        self.slots.refuse(error)
        for run in list(self.runs):
            run.interrupt(error)

    async def close(self) -> None:
        """Interrupt what runs, wait until it has left at the next step, close sessions and caches."""
        self._closing.set()
        self.builds.close()
        self.interrupt()
        await asyncio.to_thread(self._workplace.threads.shutdown)
        await asyncio.to_thread(self.loop.stop)
        await asyncio.to_thread(self.builds.join)
        await asyncio.to_thread(self.sessions.close)
        await asyncio.to_thread(self.left.close)
        self.caches.close()

    def _tail_bytes(self) -> int:
        return self.engine.model.pages.num_bytes + self.sessions.recurrent_bytes + self.left.recurrent_bytes

    def _add_readings(self) -> None:
        gauge = self.metrics.gauge
        gauge("cag_answers_running", "Answers being computed.", lambda: self.slots.running)
        gauge("cag_sessions", "Open sessions.", lambda: len(self.sessions))
        gauge("cag_left_conversations", "Conversations kept for a next question.", lambda: len(self.left))
        gauge("cag_tail_bytes", "Bytes of the tails of sessions, free pages included.", self._tail_bytes)
        gauge("cag_requests_waiting", "Requests waiting for a slot.", lambda: self.slots.waiting)
        gauge("cag_builds_waiting", "Caches waiting to be built.", lambda: self.builds.num_waiting)
        gauge("cag_builds_running", "Caches being built.", lambda: self.builds.num_running)
        gauge("cag_resident_caches", "Open caches.", lambda: self.caches.num_resident)
        gauge("cag_resident_bytes", "Bytes of their keys and values.", lambda: self.caches.num_bytes)
        total = self.metrics.total
        total("cag_step_rows_total", "Tokens that were computed in all steps.", lambda: self.loop.scheduler.num_rows)
        total("cag_evicted_caches_total", "Caches that were closed for room.", lambda: self.caches.num_evicted)
