"""A tiny engine with two caches, servers over it, and a gate that lets the model compute step by step."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from cag.engine import Engine
from cag.server import ServerSettings, create_app
from cag.server.service import AnswerService

TEXTS = {
    "handbook": "The alpha gate opens at seven in the morning. Its code is 4711.\n",
    "manual": "The beta pump moves 30 litres a minute and is painted green.\n",
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def engine(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Caches `handbook` and `manual`; tests that change a cache make one of their own with `copy_of`."""
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAG_HOME", str(root / "home"))
        patch.setenv("CAG_THREADS", "1")
        engine = Engine.load(str(tiny_model_dir), store=root / "store", device="cpu")
    for name, text in TEXTS.items():
        (root / f"{name}.txt").write_text(text)
        engine.build([root / f"{name}.txt"], name=name)
    return engine


@pytest.fixture
def copy_of(engine: Engine) -> Iterator[Callable[[str, str], str]]:
    """`copy_of(source, name)` lets `name` mean what `source` means; returns the digest."""
    names: set[str] = set()

    def copy(source: str, name: str) -> str:
        names.add(name)
        return engine.store.commit(name, engine.find(source)[1])

    yield copy
    for name in names & set(engine.store.names()):
        engine.store.remove(name, force=True)


class Served(NamedTuple):
    client: httpx.AsyncClient
    service: AnswerService
    app: Any


@pytest.fixture
def gates() -> list[Gate]:
    """Those of the test."""
    return []


@pytest.fixture
def serving(engine: Engine, gates: list[Gate]) -> Callable[..., AbstractAsyncContextManager[Served]]:
    """`async with serving(**settings) as served`: an app that has started, and a client without a network."""

    @asynccontextmanager
    async def start(**settings: Any) -> AsyncIterator[Served]:
        app = create_app(engine, settings=ServerSettings(**settings))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as c:
            try:
                yield Served(c, app.state.service, app)
            finally:  # a test that fails before its gate would wait for the forward behind it for ever
                for gate in gates:
                    gate.open()

    return start


class Gate:
    """Each forward of the model, whoever shares it, waits here until it is let through."""

    def __init__(self) -> None:
        self.num_forwards = 0
        self._reached = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._is_open = False

    def through(self) -> None:
        self._reached.release()
        if not self._is_open:
            self._permits.acquire()
        self.num_forwards += 1

    def let(self, num_forwards: int) -> None:
        self._permits.release(num_forwards)

    async def reached(self) -> None:
        """One more forward stands before the gate or has gone through."""
        assert await asyncio.to_thread(self._reached.acquire, timeout=60)

    def open(self) -> None:
        self._is_open = True
        self._permits.release(1000)


@pytest.fixture
def gate(engine: Engine, gates: list[Gate], monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    gates.append(gate)

    def gated(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        gate.through()
        return forward(*arguments, **options)

    for name in ("forward_together", "choose_together"):
        monkeypatch.setattr(engine.model, name, partial(gated, getattr(engine.model, name)))
    yield gate
    gate.open()


class Raw:
    """One request to an ASGI app whose client can hang up."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "server": ("t", 80),
            "client": ("t", 1),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        """As from a server: who is gone stays gone, however often it is asked for."""
        message = await self._messages.get()
        if message["type"] == "http.disconnect":
            self._messages.put_nowait(message)
        return message

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.news.set()

    async def until(self, text: bytes) -> None:
        """Wait until the response contains `text`."""
        while text not in b"".join(message.get("body", b"") for message in self.sent):
            self.news.clear()
            await self.news.wait()

    async def hang_up(self) -> None:
        """The client is gone; returns when the app has noticed."""
        self._messages.put_nowait({"type": "http.disconnect"})
        await self.task

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])


@pytest.fixture
def raw() -> type[Raw]:
    return Raw
