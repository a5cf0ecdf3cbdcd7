"""The official `openai` client against a real server on a loopback port."""

import threading
from collections.abc import Iterator

import httpx
import openai
import pytest
import uvicorn

from cag.server import ServerSettings, create_app

KEY = "sk-test"
MESSAGES = [{"role": "user", "content": "When does the alpha gate open?"}]


class StartedServer(uvicorn.Server):
    """Tells when it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_serving = threading.Event()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.is_serving.set()


@pytest.fixture
def running(engine) -> Iterator[tuple[str, object]]:
    app = create_app(engine, settings=ServerSettings(api_keys=(KEY,), num_slots=2))
    server = StartedServer(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.is_serving.wait(60)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.state.service
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def address(running) -> str:
    return running[0]


@pytest.fixture
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models_completions_and_streams(client, engine):
    alone = engine.ask("handbook", MESSAGES[0]["content"], max_tokens=12)
    assert [model.id for model in client.models.list()] == ["handbook", "manual"]
    assert client.models.retrieve("manual").owned_by == "cag"

    answer = client.chat.completions.create(model="handbook", messages=MESSAGES, max_tokens=12)
    assert answer.choices[0].message.content == alone.text
    assert answer.usage.prompt_tokens_details.cached_tokens == alone.usage.cached_tokens
    assert answer.model_extra["cag"]["cache"]["digest"] == alone.cache.digest

    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="handbook", messages=MESSAGES, max_completion_tokens=12, stream=True, stream_options=options
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone.text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == 12
    assert last.model_extra["cag"]["cache"]["name"] == "handbook"


def test_errors_are_the_clients_own_classes(client, address):
    def ask(**change):
        return client.chat.completions.create(**{"model": "handbook", "messages": MESSAGES} | change)

    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="nobody")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        ask(n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError):
        ask(messages=[{"role": "user", "content": " "}])
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="sk-wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError) as unknown:
        stranger.models.list()
    assert unknown.value.code == "invalid_api_key"


def test_a_client_that_closes_its_stream_stops_the_generation(running, client, gate):
    gate.let(2)
    stream = client.chat.completions.create(model="handbook", messages=MESSAGES, max_tokens=500, stream=True)
    service = running[1]
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    (run,) = service.runs
    stream.close()
    assert run._cancelled.wait(60)
    gate.open()
    assert httpx.get(f"{running[0]}/healthz").json() == {"status": "ok"}
    assert gate.num_forwards < 10
