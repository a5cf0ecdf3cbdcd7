"""Server-sent events, and hearing that a client has hung up.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cag.server.running import AnswerRun

T = TypeVar("T")


def event(data: dict[str, Any] | str, name: str | None = None) -> str:
    """One event; JSON has no line breaks, so its data is one line."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n"


class EventStream(StreamingResponse):
    """A stream of events about one run. However it ends, the run ends with it."""

    media_type = "text/event-stream"

    def __init__(self, run: AnswerRun, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            with suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`; it is cancelled when the client hangs up first. Raises: ClientDisconnect."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    """Returns when the client is gone; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
