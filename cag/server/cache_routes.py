"""The engine's own routes: `/v1/caches`. Bodies are strict: a field nobody knows is an error."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from cag.describe import describe_cache, summarize_cache
from cag.server.asking import AskRequest, answer_response
from cag.server.bodies import ClosedBody
from cag.server.listing import readable_caches
from cag.server.service import AnswerService
from cag.server.tenants import CacheKey, Tenant
from cag.stores import translated_lookup

MAX_TTL_S = 100 * 365 * 86_400


class CachePatch(ClosedBody):
    """What may be changed about a cache; `ttl_s` null: it never expires. What is not given stays as it is."""

    pinned: bool = False
    ttl_s: float | None = Field(default=None, gt=0, le=MAX_TTL_S, allow_inf_nan=False)

    @model_validator(mode="after")
    def _not_empty(self) -> CachePatch:
        if not self.model_fields_set:
            raise PydanticCustomError("empty_patch", "give `pinned`, `ttl_s` or both")
        return self


def cache_router(service: AnswerService) -> APIRouter:
    """The routes over `service`."""
    router = APIRouter(prefix="/v1/caches", tags=["caches"])
    engine_of, caches = service.tenants.engine, service.caches

    @router.get("")
    def list_caches(tenant: Tenant) -> dict[str, Any]:
        """All caches of the caller, expired ones too; `damaged` names those that cannot be read."""
        readable, damaged = readable_caches(engine_of(tenant).store)
        rows = [
            summarize_cache(ref, manifest)
            | {"resident": caches.is_resident(CacheKey(tenant, ref.name), manifest.digest)}
            for ref, manifest in readable
        ]
        return {"object": "list", "data": rows, "damaged": damaged}

    @router.get("/{name}")
    def get_cache(name: str, tenant: Tenant) -> dict[str, Any]:
        """What `cag show --json` prints."""
        return describe_cache(*engine_of(tenant).find(name))

    @router.patch("/{name}")
    def patch_cache(name: str, patch: CachePatch, tenant: Tenant) -> dict[str, Any]:
        """Pin, unpin, let expire. An expired cache that `gc` has not removed yet comes back with a later expiry."""
        store = engine_of(tenant).store
        with translated_lookup():
            ref = store.ref(name)
            store.manifest(ref.manifest)  # nothing is changed about a damaged cache
        if "ttl_s" in patch.model_fields_set:
            ref = store.set_ttl(name, patch.ttl_s)
        if "pinned" in patch.model_fields_set:
            ref = store.pin(name) if patch.pinned else store.unpin(name)
        return describe_cache(ref, store.manifest(ref.manifest))

    @router.delete("/{name}")
    def delete_cache(name: str, tenant: Tenant, force: bool = False) -> dict[str, Any]:
        """Forget a cache, a pinned one with `?force=true`; answers that are running and sessions go on, `gc` frees the
        disk behind them."""
        with translated_lookup():
            engine_of(tenant).store.remove(name, force=force)
        caches.drop(CacheKey(tenant, name))
        return {"name": name, "deleted": True}

    @router.post("/{name}/ask")
    async def ask(name: str, body: AskRequest, request: Request, tenant: Tenant) -> Response:
        """Answer one question: the object of `cag ask --json`, or events `token` and a final `answer`."""
        run = service.run(body.asked(CacheKey(tenant, name), service.settings.default_max_tokens))
        return await answer_response(run, request, stream=bool(body.stream))

    return router
