"""The application: routes, errors, middleware and lifespan over one loaded engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from cag.engine import Engine
from cag.server.cache_routes import cache_router
from cag.server.chat_routes import chat_router
from cag.server.errors import RESPONSES, install_error_handlers
from cag.server.job_routes import job_router
from cag.server.middleware import ApiKeys, BodyLimit, RequestCount
from cag.server.probe_routes import probe_router
from cag.server.service import AnswerService
from cag.server.session_routes import session_router
from cag.server.settings import ServerSettings
from cag.server.tenants import owners_of


def create_app(engine: Engine, *, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI application that answers from the caches of `engine`.

    The model is loaded before there is an app, so that a model that cannot be loaded is an error of the program that
    starts the server; caches of `settings.preload` load in the background of the lifespan. One app serves one event
    loop. `app.state.service` is the `AnswerService`.
    """
    settings = settings or ServerSettings()
    service = AnswerService(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        preloading, sweeping = asyncio.create_task(service.preload()), asyncio.create_task(service.sweep())
        try:
            yield
        finally:
            await service.close()
            await asyncio.gather(preloading, sweeping)

    app = FastAPI(title="cag", summary="Cache-augmented generation", lifespan=lifespan, responses=RESPONSES)
    app.state.service = service
    install_error_handlers(app)
    routers = chat_router(service), cache_router(service), session_router(service), job_router(service)
    for router in (probe_router(service), *routers):
        app.include_router(router)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(ApiKeys, owners=owners_of(settings.api_keys, settings.tenant_keys))
    if settings.cors_origins:  # before keys are asked for: a browser's question whether it may ask has none
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PATCH", "DELETE"),
            allow_headers=("*",),
            expose_headers=("Location", "Retry-After"),
        )
    app.add_middleware(RequestCount, count=service.metrics.count_request)
    return app
