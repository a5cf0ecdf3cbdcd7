"""Caches that clients let be built: one at a time, in the background of answers.

    submit -> queue of the tenant -> [ worker: documents -> build ] -> succeeded, failed or cancelled

A build gives way to answers between two layers (`cag.forward.turns`). Knows no routes.
"""

from __future__ import annotations

import json
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cag.building.options import BuildProgress, BuildReport
from cag.corpus import CorpusReport, load_corpus
from cag.errors import BuildInterrupted, EmptyCorpus, JobNotFound
from cag.server.errors import error_facts
from cag.server.job_progress import JobProgress
from cag.server.queues import MAX_RETRY_AFTER_S, TenantQueues, queue_full
from cag.server.tenants import Tenants
from cag_store import utc_now

KEPT_JOBS = 50  # of a tenant, that have ended

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]

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
    """One order on its way. Times are UTC; `order` is None once it is over, since it holds all texts; `report` is that
    of a build that has succeeded."""

    tenant: str
    name: str
    order: BuildOrder | None
    id: str = field(default_factory=lambda: f"job-{secrets.token_hex(12)}")
    created_at: str = field(default_factory=utc_now)
    status: Status = "queued"
    finished_at: str | None = None
    progress: JobProgress = field(default_factory=JobProgress)
    error: dict[str, Any] | None = None
    report: BuildReport | None = None
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen any more."""
        return self.finished_at is not None

    def check(self) -> None:
        """Raises: BuildInterrupted: it was cancelled."""
        if self.is_cancelled:
            raise BuildInterrupted("the build was cancelled; the store is as it was.")

    def heed(self, progress: BuildProgress) -> None:
        """Note how far it is. Raises: as `check`."""
        self.progress.tell(progress)
        self.check()

    def end(self, status: Status, report: BuildReport | None = None, error: dict[str, Any] | None = None) -> None:
        """It is over."""
        self.status, self.report, self.error = status, report, error
        self.finished_at, self.order = utc_now(), None

    def to_json(self) -> dict[str, Any]:
        """The job as lists show it."""
        return {
            "object": "cache.job",
            "id": self.id,
            "name": self.name,
            "status": self.status,
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "progress": self.progress.to_json(),
            "error": self.error,
        }


class BuildJobs:
    """The orders of a server: tenants in turn, each one's as they came. Safe from several threads; `start` before
    anything is built."""

    def __init__(self, tenants: Tenants, max_waiting: int) -> None:
        """max_waiting: orders of one tenant that nobody works on yet."""
        self._tenants = tenants
        self._max_waiting = max_waiting
        self._jobs: dict[str, dict[str, BuildJob]] = {}  # of each tenant
        self._queues = TenantQueues[BuildJob]()
        self._running: BuildJob | None = None
        self._closing = False
        self._news = threading.Condition()
        # the end of a process must not find it in compiled code
        self._thread = threading.Thread(target=self._work, name="cag-build")

    def start(self) -> None:
        """Begin to build."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Orders that nobody works on yet."""
        with self._news:
            return len(self._queues)

    @property
    def num_running(self) -> int:
        """0 or 1."""
        return int(self._running is not None)

    def submit(self, tenant: str, order: BuildOrder) -> BuildJob:
        """Let an order wait for its turn. Raises: QueueFull."""
        job = BuildJob(tenant, order.name, order)
        with self._news:
            num_waiting = self._queues.num_of(tenant)
            is_next = not num_waiting and self._running is None
            if self._closing or (num_waiting >= self._max_waiting and not is_next):
                what = "the server stops" if self._closing else f"{num_waiting} caches wait to be built, as many as may"
                eta_s = self._running.progress.eta_s if self._running is not None else None
                raise queue_full(f"{what}.", eta_s or MAX_RETRY_AFTER_S)
            jobs = self._jobs.setdefault(tenant, {})
            jobs[job.id] = job
            over = [old for old in jobs.values() if old.is_over]
            for old in over[: max(0, len(over) - KEPT_JOBS)]:
                del jobs[old.id]
            self._queues.put(tenant, job)
            self._news.notify_all()
        return job

    def of(self, tenant: str) -> list[BuildJob]:
        """A tenant's jobs, the newest first."""
        with self._news:
            return list(reversed(self._jobs.get(tenant, {}).values()))

    def as_now(self, job: BuildJob) -> BuildJob:
        """A copy of a job at one moment: it ends in one step, with all that it has to tell."""
        with self._news:
            return replace(job)

    def get(self, tenant: str, job_id: str) -> BuildJob:
        """One of them. Raises: JobNotFound."""
        with self._news:
            job = self._jobs.get(tenant, {}).get(job_id)
        if job is None:
            raise JobNotFound(
                f"there is no job {job_id!r:.130}, or it ended long ago: jobs do not outlive the server.",
                hint="What a cache is now, and whether it was built, is at /v1/caches/NAME.",
            )
        return job

    def cancel(self, job: BuildJob) -> None:
        """Let it end: at once if it has not begun, else before its next layer or step; what is over stays as it is."""
        with self._news:
            self._cancel(job)

    def close(self) -> None:
        """Take no more orders, and end those that are there."""
        with self._news:
            self._closing = True
            for job in [job for jobs in self._jobs.values() for job in jobs.values()]:
                self._cancel(job)
            self._news.notify_all()

    def join(self) -> None:
        """Until nothing is built any more."""
        if self._thread.ident is not None:
            self._thread.join()

    def _cancel(self, job: BuildJob) -> None:
        """The lock is held."""
        if job.status == "queued":
            self._queues.remove(job.tenant, job)
            job.end("cancelled")
        elif job is self._running:
            job.is_cancelled = True
            self._tenants.engine(job.tenant).model.turns.wake()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            began = time.perf_counter()
            outcome = self._run(job)
            with self._news:
                self._running = None
                job.end(*outcome)
            logger.info("%s: %s after %.1f s", job.id, job.status, time.perf_counter() - began)

    def _next(self) -> BuildJob | None:
        """The next job once there is one, None when the server stops."""
        with self._news:
            self._news.wait_for(lambda: self._closing or len(self._queues) > 0)
            self._running = job = self._queues.take()  # nothing is left when it stops
            if job is not None:
                job.status = "running"
            return job

    def _run(self, job: BuildJob) -> tuple[Status, BuildReport | None, dict[str, Any] | None]:
        """The arguments of `BuildJob.end`."""
        try:
            return "succeeded", self._build(job), None
        except BuildInterrupted:
            return "cancelled", None, None
        except Exception as error:  # whatever it is, the client is told as in a response
            return "failed", None, error_facts(error).body()["error"]

    def _build(self, job: BuildJob) -> BuildReport:
        order, engine = job.order, self._tenants.engine(job.tenant)
        assert order is not None, "it is not over"
        chosen: dict[str, Any] = {
            "codec": order.codec,
            "max_kl": order.max_kl,
            "system_text": order.system_text,
            "ttl_s": order.ttl_s,
        }
        with engine.model.turns.giving_way(job.check):
            built = engine.build(read_documents(order.documents), name=order.name, on_progress=job.heed, **chosen)
        if order.pinned:
            engine.store.pin(order.name)
        return built


def read_documents(documents: Sequence[dict[str, str]]) -> CorpusReport:
    """Documents as `cag build` reads them from JSON Lines; their paths are what the client calls them, never places on
    this machine, and those that were left out are called by their ids. Raises: as `load_corpus`."""
    with tempfile.TemporaryDirectory(prefix="cag-documents-") as folder:
        file = Path(folder) / "documents.jsonl"
        fields = ("doc_id", "title", "text")
        lines = ({name: document[name] for name in fields if name in document} for document in documents)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        try:
            corpus = load_corpus([file])
        except EmptyCorpus as error:  # whose hint names files
            raise EmptyCorpus("no document has text.") from error
    paths = {document["doc_id"]: document["path"] for document in documents if {"doc_id", "path"} <= document.keys()}
    kept = tuple(replace(found, path=paths.get(found.doc_id, found.doc_id)) for found in corpus.documents)
    here = f"{corpus.documents[0].path}#"
    duplicates = tuple((place.removeprefix(here), first.removeprefix(here)) for place, first in corpus.duplicates)
    return CorpusReport(kept, duplicates, tuple(place.removeprefix(here) for place in corpus.empty), ())
