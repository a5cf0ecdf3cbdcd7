"""What the routes share: the engine, its open caches, slots and threads, from start to shutdown."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from cag.engine import Engine
from cag.errors import CagError
from cag.server.caches import ResidentCaches
from cag.server.errors import public_message
from cag.server.loop import SchedulerLoop
from cag.server.metrics import ServerMetrics
from cag.server.running import AnswerRun, Question, Workplace
from cag.server.settings import ServerSettings
from cag.server.slots import Slots
from cag_store.errors import StoreError

logger = logging.getLogger(__name__)


class AnswerService:
    """One engine behind HTTP.

    Attributes:
        preloading: names that are not resident yet.
        preload_errors: names that could not be loaded, with the reason.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.caches = ResidentCaches(engine, settings.max_resident_bytes)
        self.slots = Slots(settings.num_slots, settings.max_waiting)
        self.metrics = ServerMetrics()
        self.runs: set[AnswerRun] = set()
        self.preloading = list(settings.preload)
        self.preload_errors: dict[str, str] = {}
        threads = ThreadPoolExecutor(settings.num_slots, "cag-answer")
        self.loop = SchedulerLoop(engine.model, self.metrics)
        self._workplace = Workplace(self.caches, self.loop, self.slots, threads, self.metrics, self.runs)
        self._closing = False
        self._add_gauges()

    def start(self) -> None:
        """Begin to answer; what is asked before waits."""
        self.loop.start()

    def run(self, question: Question) -> AnswerRun:
        """An answer to begin."""
        options = replace(question.options, speculate=self.settings.speculate)
        return AnswerRun(replace(question, options=options), self._workplace)

    async def preload(self) -> None:
        """Load the caches of the settings one after the other. Failures are kept in `preload_errors`."""
        while self.preloading and not self._closing:
            name = self.preloading[0]
            try:
                await asyncio.to_thread(self.caches.load, name)
            except (CagError, StoreError) as error:
                logger.error("cannot preload %s: %s", name, error)
                self.preload_errors[name] = public_message(error)
            self.preloading.remove(name)

    async def close(self) -> None:
        """Let running answers leave at the next step, wait for them, close the caches."""
        self._closing = True
        for run in list(self.runs):
            run.cancel()
        await asyncio.to_thread(self._workplace.threads.shutdown)
        await asyncio.to_thread(self.loop.stop)
        self.caches.close()

    def _add_gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("cag_answers_running", "Answers being computed.", lambda: self.slots.running)
        gauge("cag_step_rows", "Tokens that were computed in all steps.", lambda: self.loop.scheduler.num_rows)
        gauge("cag_tail_bytes", "Bytes of pages for the tails of sessions.", lambda: self.engine.model.pages.num_bytes)
        gauge("cag_requests_waiting", "Requests waiting for a slot.", lambda: self.slots.waiting)
        gauge("cag_resident_caches", "Open caches.", lambda: self.caches.num_resident)
        gauge("cag_evicted_caches", "Caches that were closed for room.", lambda: self.caches.num_evicted)
        gauge("cag_resident_bytes", "Bytes of their keys and values.", lambda: self.caches.num_bytes)
