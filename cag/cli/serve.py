"""`cag serve`: one engine behind HTTP until it is stopped."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cag.cli.opening import ModelChoice, cache_in, load_engine, load_engine_of, store_at
from cag.cli.options import (
    AdapterOption,
    CacheBytesOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SpeculateOption,
    StoreOption,
    VerboseOption,
    given,
)
from cag.cli.output import note, note_configuration, print_json
from cag.cli.quantities import duration_s, size_bytes

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import ValidationError

    from cag_store import Store

_OPTIONS = {
    "max_resident_bytes": "--max-resident-bytes",
    "session_ttl_s": "--session-ttl",
    "max_body_bytes": "--max-body-bytes",
}
SHUTDOWN_S = 30  # until everything is cut off after the signal to stop
LAST_WORDS_S = 2  # before that, answers that still run end with an error that their clients are told


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    preload: Annotated[
        list[str] | None,
        typer.Option("--preload", help="Load this cache at the start; may be repeated.", show_default="none"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to answer with.", show_default="the first preloaded cache's")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    store: StoreOption = None,
    cache_bytes: CacheBytesOption = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            help="Key that clients must send; may be repeated. CAG_API_KEY holds one.",
            show_default="none: open to all who reach the port",
        ),
    ] = None,
    tenant_keys: Annotated[
        Path | None,
        typer.Option(
            "--tenant-keys",
            envvar="CAG_TENANT_KEYS",
            help="TOML file of lines: tenant = KEY or [KEY, ...].",
            show_default="no tenants",
        ),
    ] = None,
    tenant_stores: Annotated[
        str | None,
        typer.Option(
            "--tenant-stores",
            help="Directory or URL under which each tenant's store lies.",
            show_default="$CAG_HOME/tenants",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Web pages of this origin may ask from a browser, like https://chat.example.org; may be repeated.",
            show_default="none",
        ),
    ] = None,
    max_resident_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-resident-bytes",
            help="Memory of open caches, e.g. 8GB; unused ones are closed for room.",
            parser=size_bytes,
            metavar="SIZE",
            show_default="no limit",
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", help="Answers at the same time.", show_default="16", min=1, max=64)
    ] = None,
    queue: Annotated[
        int | None,
        typer.Option("--queue", help="Requests of each tenant that may wait for a slot.", show_default="64", min=0),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Longest answer to a request that does not say.", show_default="512", min=1),
    ] = None,
    session_ttl: Annotated[
        float | None,
        typer.Option(
            "--session-ttl",
            help="How long a session lives without a question, at most.",
            parser=duration_s,
            metavar="DURATION",
            show_default="30m",
        ),
    ] = None,
    conversation_bytes: Annotated[
        int | None,
        typer.Option(
            "--conversation-bytes",
            help="Keys and values of chats that are kept for their next question.",
            parser=size_bytes,
            metavar="SIZE",
            show_default="512MiB",
        ),
    ] = None,
    max_sessions: Annotated[
        int | None,
        typer.Option("--max-sessions", help="Sessions of each tenant that may be open.", show_default="100", min=1),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-body-bytes",
            help="Largest body of a request.",
            parser=size_bytes,
            metavar="SIZE",
            show_default="8MiB",
        ),
    ] = None,
    speculate: SpeculateOption = None,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve caches over HTTP: OpenAI's API, and the engine's own."""
    from pydantic import ValidationError

    from cag.errors import UsageError
    from cag.home import cag_home
    from cag.server import ServerSettings, create_app
    from cag.server.tenants import CacheKey, read_tenant_keys

    chosen = given(
        preload=tuple(preload or ()),
        api_keys=tuple(api_key or _key_of_environment()),
        tenant_keys=read_tenant_keys(tenant_keys) if tenant_keys is not None else None,
        cors_origins=tuple(cors_origin or ()),
        tenant_stores=tenant_stores or (str(cag_home() / "tenants") if tenant_keys is not None else None),
        max_resident_bytes=max_resident_bytes,
        num_slots=slots,
        max_waiting=queue,
        default_max_tokens=max_tokens,
        session_ttl_s=session_ttl,
        conversation_bytes=conversation_bytes,
        max_sessions=max_sessions,
        max_body_bytes=max_body_bytes,
        speculate=speculate,
    )
    try:
        settings = ServerSettings(**chosen)
    except ValidationError as error:
        raise UsageError(_told(error)) from error
    listener = _listen(host, port)
    with listener:
        if settings.is_open and not _is_loopback(host):
            note(f"warning: {host} can be reached from other machines, and there is no API key; set CAG_API_KEY.")
        engine = _load(
            store_at(store, cache_bytes),
            tuple(name for name in settings.preload if CacheKey.named(name).is_operators),
            ModelChoice(model, adapter, device, dtype),
            verbose=verbose,
        )
        counts = {"num_api_keys": len(settings.api_keys), "tenants": sorted(settings.tenant_keys)}
        note_configuration(verbose, **settings.model_dump(exclude={"api_keys", "tenant_keys"}), **counts)
        facts = {"url": _url(listener), "model": engine.model.model_id, "preload": list(settings.preload)}
        app = create_app(engine, settings=settings)
        _run(app, listener, facts, json_output=json_output, verbose=verbose)


def _key_of_environment() -> list[str]:
    """The key in CAG_API_KEY, as it is; a blank one is refused as any other that is none, and opens no server."""
    return [os.environ["CAG_API_KEY"]] if "CAG_API_KEY" in os.environ else []


def _told(error: ValidationError) -> str:
    """The first mistake, with the option that it was made in."""
    first = error.errors(include_input=False)[0]
    option = _OPTIONS.get(str(next(iter(first["loc"]), "")))
    return f"{option}: {first['msg']}." if option else f"{first['msg']}."


def _load(store: Store, preload: tuple[str, ...], choice: ModelChoice, *, verbose: bool) -> Any:
    """The engine; every preloaded cache is looked up before a model is loaded. Raises: CacheNotFound."""
    for name in preload:
        cache_in(store, name)
    if preload:
        return load_engine_of(store, preload[0], choice, verbose=verbose)
    return load_engine(store, choice, verbose=verbose)


def _run(
    app: FastAPI,
    listener: socket.socket,
    facts: dict[str, Any],
    *,
    json_output: bool,
    verbose: bool,
) -> None:
    """Serve until SIGINT or SIGTERM; running answers are finished first, in about `SHUTDOWN_S`."""
    import uvicorn

    # a full collection would look at half a million objects of libraries: 0.2 s in the midst of somebody's answer
    gc.collect()
    gc.freeze()

    class AnnouncedServer(uvicorn.Server):
        """Says its address when it serves, and to clients that it stops when it cannot wait for them."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if json_output:
                print_json(facts)
            else:
                note(f"serving {facts['model']} at {facts['url']} (OpenAI API at {facts['url']}/v1)")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            interrupt = app.state.service.interrupt
            timer = asyncio.get_running_loop().call_later(SHUTDOWN_S - LAST_WORDS_S, interrupt)
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()

    level = "INFO" if verbose else "WARNING"
    config = uvicorn.Config(app, log_config=_logging(level), timeout_graceful_shutdown=SHUTDOWN_S)
    try:
        AnnouncedServer(config).run(sockets=[listener])
    except KeyboardInterrupt:  # Ctrl-C is how a server is stopped; uvicorn raises it again after the shutdown
        note("stopped")


def _logging(level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: a line on stderr with time and level for each record, ours from `level` on and
    warnings of libraries."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {name: {"level": level} for name in ("cag", "uvicorn")},
    }


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before a model is loaded. Raises: UsageError."""
    from cag.errors import UsageError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror or error}.", hint="Choose another --port or --host."
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
