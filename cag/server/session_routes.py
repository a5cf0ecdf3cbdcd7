"""Routes for conversations: `/v1/caches/{name}/sessions` opens one, `/v1/sessions` asks, lists and ends them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cag.errors import UsageError
from cag.server.asking import AskRequest, answer_response
from cag.server.bodies import ClosedBody
from cag.server.service import AnswerService
from cag.server.sessions import KeptSession
from cag.server.tenants import CacheKey, Tenant
from cag_store import utc_text


class SessionRequest(ClosedBody):
    """A session to be opened. `ttl_s`: how long it lives without a question; the server's own if not given."""

    ttl_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def session_router(service: AnswerService) -> APIRouter:
    """The routes over `service`."""
    router = APIRouter(prefix="/v1", tags=["sessions"])
    sessions = service.sessions

    @router.post("/caches/{name}/sessions", status_code=201)
    def open_session(
        name: str, response: Response, tenant: Tenant, body: SessionRequest | None = None
    ) -> dict[str, Any]:
        """Open a session behind what the name means now; the cache begins to load."""
        kept = sessions.open(CacheKey(tenant, name), _ttl_s(body, sessions.ttl_s))
        response.headers["Location"] = f"/v1/sessions/{kept.id}"
        return _session_json(kept)

    @router.get("/sessions")
    def list_sessions(tenant: Tenant) -> dict[str, Any]:
        """The caller's live sessions."""
        return {"object": "list", "data": [_session_json(kept) for kept in sessions.of(tenant)]}

    @router.get("/sessions/{session_id}")
    def get_session(session_id: str, tenant: Tenant) -> dict[str, Any]:
        """One of them. Looking at it is no use of it."""
        return _session_json(sessions.find(tenant, session_id))

    @router.delete("/sessions/{session_id}")
    def delete_session(session_id: str, tenant: Tenant) -> dict[str, Any]:
        """End a session; its answer that is running goes on."""
        sessions.delete(tenant, session_id)
        return {"id": session_id, "deleted": True}

    @router.post("/sessions/{session_id}/ask")
    async def ask(session_id: str, body: AskRequest, request: Request, tenant: Tenant) -> Response:
        """As `/v1/caches/{name}/ask`, behind the turns before."""
        kept = sessions.find(tenant, session_id)
        run = service.run(body.asked(kept.version.key, service.settings.default_max_tokens, kept))
        return await answer_response(run, request, stream=bool(body.stream))

    return router


def _ttl_s(body: SessionRequest | None, most_s: float) -> float:
    """Raises: UsageError."""
    ttl_s = most_s if body is None or body.ttl_s is None else body.ttl_s
    if ttl_s > most_s:
        raise UsageError(f"ttl_s is {ttl_s:g}; sessions of this server live at most {most_s:g} s.", param="ttl_s")
    return ttl_s


def _session_json(kept: KeptSession) -> dict[str, Any]:
    return {
        "object": "session",
        "id": kept.id,
        "cache": {"name": kept.version.key.name, "digest": kept.version.manifest.digest},
        "created_at": utc_text(kept.created_at),
        "expires_at": utc_text(kept.expires_at),
        "num_turns": kept.num_turns,
        "num_tokens": kept.num_tokens,
    }
