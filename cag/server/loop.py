"""One thread that steps through all answers of a server, as long as there are any."""

from __future__ import annotations

import logging
import threading

from cag.generation.scheduler import Scheduler
from cag.model import LanguageModel
from cag.server.metrics import ServerMetrics

logger = logging.getLogger(__name__)


class SchedulerLoop:
    """Runs a scheduler on a thread of its own from `start` to `stop`; what is submitted before waits."""

    def __init__(self, model: LanguageModel, metrics: ServerMetrics) -> None:
        self.scheduler = Scheduler(model)
        self._metrics = metrics
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cag-scheduler", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End when nobody is left; returns when it has ended."""
        self._stopping = True
        self.scheduler.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not (self._stopping and not self.scheduler.num_requests):
            self.scheduler.wait_for_work(lambda: self._stopping)
            with self.scheduler.model.turns.answering():
                while self.scheduler.num_requests:
                    self._step()

    def _step(self) -> None:
        try:
            batch_size = self.scheduler.step()
        except Exception:  # of the scheduler itself: nobody's answer is to blame, and nobody may wait for ever
            logger.exception("a step failed")
            self.scheduler.abandon(RuntimeError("the scheduler failed; the server's log has the details."))
            return
        if batch_size:
            self._metrics.batch_size.observe(batch_size)
