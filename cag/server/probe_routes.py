"""Routes for those who watch over a server: `/healthz`, `/readyz`, `/metrics`. They need no API key, and answer HEAD
too, as load balancers ask."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from cag.server.metrics import CONTENT_TYPE
from cag.server.service import AnswerService
from cag.server.tenants import CacheKey


def probe_router(service: AnswerService) -> APIRouter:
    """The routes over `service`."""
    router = APIRouter(tags=["probes"])

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The event loop answers."""
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz")
    async def readyz() -> JSONResponse:
        """200 when model and preloaded caches are there; 503 with what is missing before."""
        if service.preload_errors:
            own, others = _own_and_others(service.preload_errors)
            errors = {name: service.preload_errors[name] for name in own}
            return JSONResponse({"status": "failed", "errors": errors} | others, 503)
        if service.preloading:
            own, others = _own_and_others(service.preloading)
            return JSONResponse({"status": "loading", "caches": own} | others, 503)
        return JSONResponse({"status": "ready", "model": service.engine.model.model_id})

    @router.head("/metrics", include_in_schema=False)
    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """The Prometheus exposition."""
        return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return router


def _own_and_others(names: Iterable[str]) -> tuple[list[str], dict[str, int]]:
    """The operator's caches by name; of tenants', which are nobody else's business, how many."""
    names = list(names)
    own = [name for name in names if CacheKey.named(name).is_operators]
    return own, {"tenant_caches": len(names) - len(own)} if len(own) < len(names) else {}
