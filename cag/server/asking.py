"""One question over HTTP: its body, and the answer as one object or as events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cag.server.bodies import ClosedBody, Text
from cag.server.chat_schema import SamplingFields
from cag.server.errors import error_facts
from cag.server.running import AnswerRun, Question
from cag.server.sessions import KeptSession
from cag.server.streaming import EventStream, event, while_connected
from cag.server.tenants import CacheKey


class AskRequest(SamplingFields, ClosedBody):
    """One question. A field nobody knows is an error."""

    question: Text

    def asked(self, cache: CacheKey, default_max_tokens: int, session: KeptSession | None = None) -> Question:
        """What is asked, in a session of its own or in `session`."""
        options = self.options(self.max_tokens, default_max_tokens, think=bool(self.think))
        return Question(cache, self.question, options, session=session)


async def answer_response(run: AnswerRun, request: Request, *, stream: bool) -> Response:
    """The object of `cag ask --json`, or events `reasoning`, where the model thinks, `token`, and a final `answer`."""
    if not stream:
        return JSONResponse((await while_connected(request, run.complete())).to_json())
    try:
        await while_connected(request, run.begin())
    except BaseException:
        run.cancel()
        raise
    return EventStream(run, _events(run))


async def _events(run: AnswerRun) -> AsyncIterator[str]:
    try:
        async for piece in run.pieces():
            if piece.reasoning:
                yield event({"text": piece.reasoning}, "reasoning")
            if piece.text:
                yield event({"text": piece.text}, "token")
    except Exception as error:  # the status is sent already: the client learns it here
        yield event(error_facts(error).body(), "error")
        return
    yield event(run.answer.to_json(), "answer")
