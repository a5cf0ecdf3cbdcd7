"""What happens to every request before it is routed: API keys, size of the body, counting."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cag.server.errors import error_facts
from cag.server.tenants import OPERATOR, SCOPE

PROTECTED = "/v1"


class ApiKeys:
    """Refuses requests under `/v1` that carry none of the keys as a bearer token, before their body is read; of the
    others the scope says whose they are.

    owners: each key with its tenant; none: everything is open, and the operator's.
    """

    def __init__(self, app: ASGIApp, owners: Sequence[tuple[bytes, str]]) -> None:
        self.app = app
        self._owners = owners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or not _is_protected(scope):
            await self.app(scope, receive, send)
            return
        tenant = self._owner(Headers(scope=scope).get("authorization", "")) if self._owners else OPERATOR
        if tenant is None:
            message = "a valid API key is needed: send the header `Authorization: Bearer KEY`."
            refusal = HTTPException(401, message, headers={"WWW-Authenticate": "Bearer"})
            await error_facts(refusal).response()(scope, receive, send)
        else:
            scope[SCOPE] = tenant
            await self.app(scope, receive, send)

    def _owner(self, header: str) -> str | None:
        """Whose key it is; None if it is nobody's. All keys are compared, whichever it is."""
        kind, _, given = header.partition(" ")
        matches = [tenant for key, tenant in self._owners if hmac.compare_digest(given.strip().encode(), key)]
        return matches[0] if kind.lower() == "bearer" and matches else None


def _is_protected(scope: Scope) -> bool:
    """Whether a path is below `/v1`, wherever the application itself is mounted."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return bool((path + "/").startswith(PROTECTED + "/"))


class BodyLimit:
    """Refuses bodies above `max_body_bytes`, whether or not they announce their size."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await error_facts(self._too_large()).response()(scope, receive, send)
        else:
            await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request's body has more than {self._max_bytes} bytes.")


class RequestCount:
    """Tells `count(method, route, status)` about every response; the route is the pattern, never the client's path."""

    def __init__(self, app: ASGIApp, count: Callable[[str, str, int], None]) -> None:
        self.app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unmatched")
                self._count(scope["method"], route, message["status"])
            await send(message)

        await self.app(scope, receive, counting)
