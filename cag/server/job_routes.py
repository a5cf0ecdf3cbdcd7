"""Building caches over HTTP: `POST /v1/caches` and `/v1/jobs`. Documents come with the request: no client can name a
file of the server."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from cag.building.options import check_codec
from cag.describe import describe_cache
from cag.errors import CacheNotFound
from cag.server.bodies import ClosedBody, Text
from cag.server.cache_routes import MAX_TTL_S
from cag.server.jobs import BuildJob, BuildOrder
from cag.server.service import AnswerService
from cag.server.tenants import Tenant
from cag_store import checked_name
from cag_store.errors import StoreError

MAX_DOCUMENTS = 10_000


def _one_line(label: str) -> str:
    """Labels are shown in terminals and citations, without white space around them."""
    if not label.isprintable() or not label.strip():
        raise PydanticCustomError("no_label", "it must be one line of printable characters")
    return label.strip()


Label = Annotated[Text, Field(min_length=1, max_length=1000), AfterValidator(_one_line)]


class NewDocument(ClosedBody):
    """One document. Without a `doc_id` it is called by its place in the list; `path` is what citations show."""

    text: Text
    doc_id: Label | None = None
    title: Label | None = None
    path: Label | None = None


class NewCache(ClosedBody):
    """A cache to be built; one that has its name already is replaced when the new one is whole."""

    name: Text
    documents: list[NewDocument] = Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)
    codec: Text = "lossless"
    max_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    system_text: Text | None = None
    ttl_s: float | None = Field(default=None, gt=0, le=MAX_TTL_S, allow_inf_nan=False)
    pinned: bool = False

    @model_validator(mode="after")
    def _documents_have_names(self) -> NewCache:
        names = [self.name_of(place) for place in range(len(self.documents))]
        if len(set(names)) < len(names):
            raise PydanticCustomError("same_doc_id", "two documents have the same `doc_id`", {"field": "documents"})
        return self

    def name_of(self, place: int) -> str:
        """The `doc_id` of a document."""
        return self.documents[place].doc_id or str(place + 1)

    def order(self) -> BuildOrder:
        """As a build wants it. Raises: InvalidName, UnknownCodec."""
        check_codec(self.codec)
        documents = [
            {"doc_id": self.name_of(place)} | {k: v for k, v in document.model_dump().items() if v is not None}
            for place, document in enumerate(self.documents)
        ]
        options = self.model_dump(include={"codec", "max_kl", "system_text", "ttl_s", "pinned"})
        return BuildOrder(checked_name(self.name), documents, **options)


def job_router(service: AnswerService) -> APIRouter:
    """The routes over `service`."""
    router, builds = APIRouter(prefix="/v1", tags=["jobs"]), service.builds

    def whole(job: BuildJob) -> dict[str, Any]:
        """A job with what it did, and the cache that it has built as long as its name means that one."""
        job = builds.as_now(job)
        cache, report = None, job.report
        with suppress(CacheNotFound, StoreError):  # removed since, or damaged, which its own route tells
            ref, manifest = service.tenants.engine(job.tenant).find(job.name)
            cache = describe_cache(ref, manifest) if report and manifest.digest == report.digest else None
        return job.to_json() | {"report": report and report.to_json(), "cache": cache}

    @router.post("/caches", status_code=202)
    def create_cache(body: NewCache, response: Response, tenant: Tenant) -> dict[str, Any]:
        """Let a cache be built; answers with the job."""
        job = builds.submit(tenant, body.order())
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return whole(job)

    @router.get("/jobs")
    def list_jobs(tenant: Tenant) -> dict[str, Any]:
        """The caller's jobs, the newest first, without what they have built."""
        return {"object": "list", "data": [builds.as_now(job).to_json() for job in builds.of(tenant)]}

    @router.get("/jobs/{job_id}")
    def get_job(job_id: str, tenant: Tenant) -> dict[str, Any]:
        """How far a job is."""
        return whole(builds.get(tenant, job_id))

    @router.post("/jobs/{job_id}/cancel")
    def cancel_job(job_id: str, tenant: Tenant) -> dict[str, Any]:
        """Let it end; the store is as it was, and whole chunks are kept for the next build."""
        job = builds.get(tenant, job_id)
        builds.cancel(job)
        return whole(job)

    return router
