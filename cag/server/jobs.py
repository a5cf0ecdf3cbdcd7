"""Caches that clients let be built: one at a time, in the background of answers.

    submit -> waiting -> [ worker: documents -> build ] -> succeeded, failed or cancelled

A build's forwards give way to those of answers between layers (`cag.turns`). Knows no routes.
"""

from __future__ import annotations

import json
import logging
import secrets
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cag.building import BuildProgress
from cag.corpus import CorpusReport, load_corpus
from cag.describe import describe_cache
from cag.errors import BuildInterrupted, JobNotFound, QueueFull
from cag.server.errors import error_facts
from cag.server.tenants import Tenants
from cag_store import utc_now

KEPT_JOBS = 200  # that have ended, of all tenants together
RETRY_S = 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOrder:
    """What is to be built. `documents` have `text`, and where present `doc_id`, `title` and `path`."""

    name: str
    documents: Sequence[dict[str, str]]
    codec: str = "lossless"
    max_kl: float | None = None
    system_text: str | None = None
    ttl_s: float | None = None
    pinned: bool = False


@dataclass(eq=False)
class BuildJob:
    """One order on its way. Times are UTC; `cancel` lets it end at the next block."""

    tenant: str
    order: BuildOrder
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    created_at: str = field(default_factory=utc_now)
    status: str = "queued"
    finished_at: str | None = None
    progress: BuildProgress | None = None
    error: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    cancelled: bool = False
    _prefill: BuildProgress | None = None  # how far it was when it began to compute

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.finished_at is not None

    def heed(self, progress: BuildProgress) -> None:
        """Note how far it is. Raises: BuildInterrupted: it was cancelled."""
        if self.cancelled:
            raise BuildInterrupted("the build was cancelled; the store is as it was.")
        if progress.stage == "prefill" and self._prefill is None:
            self._prefill = progress
        self.progress = progress

    def end(self, status: str) -> None:
        """It is over."""
        self.status, self.finished_at = status, utc_now()

    def to_json(self) -> dict[str, Any]:
        """The job as clients see it."""
        return {
            "object": "cache.job",
            "id": self.id,
            "name": self.order.name,
            "status": self.status,
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "progress": self._progress_json(),
            "error": self.error,
            "cache": self.cache,
        }

    def _progress_json(self) -> dict[str, Any] | None:
        now, first = self.progress, self._prefill
        if now is None:
            return None
        rate = None
        if first is not None and now.done_tokens > first.done_tokens:
            rate = (now.done_tokens - first.done_tokens) / max(1e-9, now.elapsed_s - first.elapsed_s)
        is_reading = now.stage == "prefill" and rate
        return {
            "stage": now.stage,
            "done_tokens": now.done_tokens,
            "total_tokens": now.total_tokens,
            "tokens_per_s": rate,
            "eta_s": (now.total_tokens - now.done_tokens) / rate if is_reading and rate else None,
        }


class BuildJobs:
    """The orders of a server. Safe from several threads; `start` before anything is built."""

    def __init__(self, tenants: Tenants, max_waiting: int) -> None:
        self._tenants = tenants
        self._max_waiting = max_waiting
        self._jobs: OrderedDict[str, BuildJob] = OrderedDict()
        self._waiting: deque[BuildJob] = deque()
        self._news = threading.Condition()
        self._is_busy = self._closing = False
        # the end of a process must not find it in compiled code
        self._thread = threading.Thread(target=self._work, name="cag-build")

    def start(self) -> None:
        """Begin to build."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Orders that nobody works on yet."""
        return len(self._waiting)

    def submit(self, tenant: str, order: BuildOrder) -> BuildJob:
        """Let an order wait for its turn. Raises: QueueFull."""
        job = BuildJob(tenant, order)
        with self._news:
            if self._closing or len(self._waiting) + self._is_busy > self._max_waiting:
                raise QueueFull(
                    f"{len(self._waiting)} caches wait to be built; there is no room for more.",
                    hint=f"Try again in {RETRY_S} s.",
                    retry_after_s=RETRY_S,
                )
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._forget_old()
            self._news.notify_all()
        return job

    def of(self, tenant: str) -> list[BuildJob]:
        """A tenant's jobs, the newest first."""
        with self._news:
            return [job for job in reversed(self._jobs.values()) if job.tenant == tenant]

    def get(self, tenant: str, job_id: str) -> BuildJob:
        """One of them. Raises: JobNotFound."""
        with self._news:
            job = self._jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise JobNotFound(f"there is no job {job_id!r}, or it ended long ago.")
        return job

    def cancel(self, job: BuildJob) -> None:
        """Let it end at its next block, or at once if it has not begun; what is over stays as it is."""
        with self._news:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.end("cancelled")

    def close(self) -> None:
        """Take no more orders, and end those that are there."""
        with self._news:
            self._closing = True
            for job in list(self._jobs.values()):
                job.cancelled = True
            self._news.notify_all()

    def join(self) -> None:
        """Until nothing is built any more."""
        if self._thread.ident is not None:
            self._thread.join()

    def _forget_old(self) -> None:
        over = [job for job in self._jobs.values() if job.is_over]
        for job in over[: max(0, len(over) - KEPT_JOBS)]:
            del self._jobs[job.id]

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: bool(self._waiting) or self._closing)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._is_busy = True
            if job.cancelled:
                job.end("cancelled")
            else:
                self._run(job)
            self._is_busy = False

    def _run(self, job: BuildJob) -> None:
        job.status = "running"
        began = time.perf_counter()
        try:
            job.cache = self._build(job)
        except BuildInterrupted:
            job.end("cancelled")
        except Exception as error:  # whatever it is, the client is told as in a response
            job.error = error_facts(error).body()["error"]
            job.end("failed")
        else:
            job.end("succeeded")
        logger.info("%s: %s after %.1f s", job.id, job.status, time.perf_counter() - began)

    def _build(self, job: BuildJob) -> dict[str, Any]:
        order, engine = job.order, self._tenants.engine(job.tenant)
        chosen: dict[str, Any] = {
            "codec": order.codec,
            "max_kl": order.max_kl,
            "system_text": order.system_text,
            "ttl_s": order.ttl_s,
        }
        with engine.model.turns.in_background():
            engine.build(read_documents(order.documents), name=order.name, on_progress=job.heed, **chosen)
        if order.pinned:
            engine.store.pin(order.name)
        return describe_cache(*engine.find(order.name))


def read_documents(documents: Sequence[dict[str, str]]) -> CorpusReport:
    """Documents as `cag build` reads them from JSON Lines; their paths are what the client calls them, never places on
    this machine. Raises: as `load_corpus`."""
    with tempfile.TemporaryDirectory(prefix="cag-documents-") as folder:
        file = Path(folder) / "documents.jsonl"
        fields = ("doc_id", "title", "text")
        lines = ({name: document[name] for name in fields if name in document} for document in documents)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        corpus = load_corpus([file])
    paths = {document["doc_id"]: document["path"] for document in documents if {"doc_id", "path"} <= document.keys()}
    kept = tuple(replace(found, path=paths.get(found.doc_id, found.doc_id)) for found in corpus.documents)
    return CorpusReport(kept, (), (), ())
