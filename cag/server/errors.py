"""Errors as OpenAI's clients expect them: one shape, and the status from the engine's one error table."""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from cag.errors import CacheNotFound, CagError, QueueFull, UsageError, error_row
from cag_store.errors import EntryNotFound, StoreError

CLIENT_GONE = 499  # nobody reads this response; it tells the access log
SHOWN_MISTAKES = 8  # of one body
TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# Refusals that no class of the engine stands for; docs/errors.md has them.
HTTP_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_entity_too_large",
}

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

MAX_MESSAGE = 2000  # characters: a message may quote what a client sent
# What may be a path or URL, and where the folders of a store begin in it (docs/format.md section 1).
_RUN = re.compile(r"(?:[^:;'\"\n]|:(?=//))+")
_SCHEME = string.ascii_lowercase + string.digits + "+.-"
_FOLDER = re.compile(r"/(?=(?:chunks|blobs|manifests|refs|leases|locks|touched|tmp|format)\b)")

logger = logging.getLogger(__name__)


class ErrorFields(BaseModel):
    """What is told of an error."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object, as `/openapi.json` describes it."""

    error: ErrorFields


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request or its moment was wrong"},
    "5XX": {"model": ErrorBody, "description": "The server or its store is not as it should be"},
}


class ErrorFacts(NamedTuple):
    """One error as HTTP shows it."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message.encode(errors="replace").decode()  # it may quote what is no text
        return {"error": {"message": message, "type": kind, "code": self.code, "param": self.param}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body(), self.status, self.headers)


def error_facts(error: Exception) -> ErrorFacts:
    """How `error` is shown. Whatever is the server's fault is logged; of what nobody foresaw nothing else is told."""
    if isinstance(error, RequestValidationError):
        return _validation_facts(error)
    if isinstance(error, HTTPException):
        row = error_row(UsageError("") if error.status_code < 500 else error)
        code = HTTP_CODES.get(error.status_code, row.code)
        return ErrorFacts(error.status_code, code, str(error.detail), None, error.headers)
    if isinstance(error, CagError | StoreError):
        row = error_row(error)
        if row.http_status >= 500:
            logger.error("%s: %s", row.code, error)
        param = error.facts.get("param")
        wait = {"Retry-After": str(error.facts["retry_after_s"])} if isinstance(error, QueueFull) else None
        return ErrorFacts(
            row.http_status, row.code, public_message(error), param if isinstance(param, str) else None, wait
        )
    logger.error("unexpected error", exc_info=error)
    row = error_row(error)
    return ErrorFacts(row.http_status, row.code, "internal error; the server's log has the details.")


def public_message(error: CagError | StoreError) -> str:
    """What is said of `error` over HTTP: not where the store lies, nor what else is in it."""
    if isinstance(error, CacheNotFound | EntryNotFound) and isinstance(name := error.facts.get("name"), str):
        expires_at = error.facts.get("expires_at")
        return f"cache {name!r} expired at {expires_at}." if expires_at else f"no cache is called {name!r}."
    return _RUN.sub(_without_places, str(error)[:MAX_MESSAGE])


def _without_places(run: re.Match[str]) -> str:
    """A part of a message without paths and URLs up to the folders of a store; each character is looked at once."""
    text, kept, at = run[0], [], 0
    while (begin := text.find("/", at)) >= 0 and (folder := _FOLDER.search(text, begin + 1)):
        scheme = text.rfind("://", at, folder.start())
        kept.append(text[at:begin] if scheme < 0 else text[at:scheme].rstrip(_SCHEME))
        at = folder.end()
    return "".join([*kept, text[at:]])


def install_error_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave in the one shape. Middleware that is added later stands around all of them."""
    for cls in (CagError, StoreError, RequestValidationError, HTTPException):
        app.add_exception_handler(cls, _respond)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    # a handler of `Exception` would stand outside of all middleware: no page of another origin could read its response
    app.add_middleware(ServerErrorMiddleware, handler=_respond)


async def _respond(request: Request, error: Exception) -> Response:
    facts = error_facts(error)
    if facts.status == 405:  # the router tells the methods of one route of the path
        facts = facts._replace(headers={"Allow": ", ".join(_methods_of(request))})
    return facts.response()


def _methods_of(request: Request) -> list[str]:
    """What may be done with the path of a request."""
    asked = [(method, {**request.scope, "method": method}) for method in sorted(METHODS)]
    routes = request.app.routes
    return [method for method, scope in asked if any(route.matches(scope)[0] is Match.FULL for route in routes)]


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


def _validation_facts(error: RequestValidationError) -> ErrorFacts:
    row = error_row(UsageError(""))
    entries = error.errors()
    found = [(_param(entry), _mistake(entry)) for entry in entries[:SHOWN_MISTAKES]]
    message = "; ".join(f"{param}: {text}" if param else text for param, text in found)
    if len(entries) > len(found):
        message += f"; and {len(entries) - len(found)} more"
    return ErrorFacts(row.http_status, row.code, message, found[0][0])


def _mistake(entry: Mapping[str, Any]) -> str:
    """What is wrong; pydantic's words, but for a body as a whole."""
    if entry["type"] == "json_invalid":
        return f"the body is no JSON: {(entry.get('ctx') or {}).get('error', entry['msg'])} at {entry['loc'][-1]}"
    if tuple(entry["loc"]) == ("body",) and entry["type"] in ("missing", "model_attributes_type", "dict_type"):
        return "the body must be a JSON object, sent with the header `Content-Type: application/json`"
    return str(entry["msg"])


def _param(entry: Mapping[str, Any]) -> str | None:
    """`messages[0].content` for what is wrong; None for a body that is no JSON."""
    if entry["type"] == "json_invalid":
        return None
    field = (entry.get("ctx") or {}).get("field")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in entry["loc"][1:])
    return field or path.removeprefix(".") or None
