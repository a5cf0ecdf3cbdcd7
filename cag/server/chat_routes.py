"""OpenAI's routes: `/v1/models` and `/v1/chat/completions`. The model of a request is a cache's name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from cag.errors import CacheMismatch, CacheNotFound, ModelNotFound
from cag.identity import check_fingerprints
from cag.server.chat_schema import ChatRequest, CompletionHead, delta, proof
from cag.server.errors import error_facts, public_message
from cag.server.listing import readable_caches
from cag.server.running import AnswerRun
from cag.server.service import AnswerService
from cag.server.streaming import EventStream, event, while_connected
from cag.server.tenants import Tenant
from cag_store import Manifest, Ref, utc_now
from cag_store.errors import InvalidName

DONE = "[DONE]"


def chat_router(service: AnswerService) -> APIRouter:
    """The routes over `service`."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.get("/models")
    def list_models(tenant: Tenant) -> dict[str, Any]:
        """Caches that the loaded model can answer from."""
        caches, _ = readable_caches(service.tenants.engine(tenant).store)
        now = utc_now()
        usable = [_model(ref, found) for ref, found in caches if not ref.expired(now) and _fits(service, ref, found)]
        return {"object": "list", "data": usable}

    @router.get("/models/{name}")
    def get_model(name: str, tenant: Tenant) -> dict[str, Any]:
        """One of them."""
        with _called_models(name):
            ref, manifest = service.tenants.engine(tenant).find(name)
        check_fingerprints(name, manifest, service.engine.model)
        return _model(ref, manifest)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request, tenant: Tenant) -> Response:
        """Answer a conversation behind a cache."""
        run = service.run(body.question(tenant, service.settings.default_max_tokens, service.engine.model.thinking))
        head = CompletionHead(body.model)
        with _called_models(body.model):
            if not body.stream:
                return JSONResponse(head.completion(await while_connected(request, run.complete())))
            try:
                await while_connected(request, run.begin())
            except BaseException:
                run.cancel()
                raise
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(run, _chunks(run, head, include_usage))

    return router


async def _chunks(run: AnswerRun, head: CompletionHead, include_usage: bool) -> AsyncIterator[str]:
    """OpenAI's chunks; `cag` stands in the last one."""
    no_usage = {"usage": None} if include_usage else {}
    try:
        yield event(head.chunk({"role": "assistant", "content": ""}) | no_usage)
        async for piece in run.pieces():
            yield event(head.chunk(delta(piece)) | no_usage)
    except Exception as error:  # the status is sent already: the client learns it here
        yield event(error_facts(error).body())
        return
    answer, extra = run.answer, {"cag": proof(run.answer)}
    last = head.chunk({}, answer.finish_reason)
    if include_usage:
        yield event(last | no_usage)
        last = head.usage_chunk(answer)
    yield event(last | extra)
    yield event(DONE)


@contextmanager
def _called_models(name: str) -> Iterator[None]:
    """Clients of OpenAI know models, not caches. Raises: ModelNotFound: no cache has or can have this name."""
    try:
        yield
    except (CacheNotFound, InvalidName) as error:
        raise ModelNotFound(
            f"the model {name!r:.130} does not exist: {public_message(error)}", param="model"
        ) from error


def _model(ref: Ref, manifest: Manifest) -> dict[str, Any]:
    created = datetime.fromisoformat(manifest.created_at)
    return {"id": ref.name, "object": "model", "created": int(created.timestamp()), "owned_by": "cag"}


def _fits(service: AnswerService, ref: Ref, manifest: Manifest) -> bool:
    try:
        check_fingerprints(ref.name, manifest, service.engine.model)
    except CacheMismatch:
        return False
    return True
