"""Thoughts over HTTP: fields, events, choices and counts, as clients of other servers know them."""

import json

import pytest
from thinkers import CHANNEL_TOKENS, CHANNELS, CHOOSES, Forced

from cag.engine import Engine
from cag.generation.generate import THOUGHT_TOKENS
from cag.model import LanguageModel
from cag.prompt import THOUGHTS
from cag_store import Store
from tiny import tiny_config, tiny_tokenizer, write_tiny_model

pytestmark = pytest.mark.anyio
URL, ASK = "/v1/chat/completions", "/v1/caches/handbook/ask"
SCRIPT = "<think>\nIt says seven.\n</think>\n\nAt seven."


@pytest.fixture(scope="module", params=["choice", "effort"])
def engine(request, tmp_path_factory, home_of_models):
    """In the place of the engine that does not think."""
    directory = tmp_path_factory.mktemp("thinker")
    template, special = {"choice": (CHOOSES, THOUGHTS[0]), "effort": (CHANNELS, CHANNEL_TOKENS)}[request.param]
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    write_tiny_model(directory, chat_template=template, config=tiny_config(vocab_size=len(tokenizer) + 1))
    tokenizer.save_pretrained(directory)
    engine = Engine(LanguageModel.load(directory, model_id="tiny"), Store.open(directory / "store"))
    (directory / "alpha.md").write_text("The alpha gate opens at seven in the morning.\n")
    engine.build([directory / "alpha.md"], name="handbook")
    engine.kind = request.param
    return engine


@pytest.fixture
def forced(engine, monkeypatch):
    return Forced(monkeypatch, engine.model)


@pytest.fixture
def script(engine):
    begin, end = THOUGHTS[0] if engine.kind == "choice" else THOUGHTS[3]
    return f"{begin}\nIt says seven.\n{end}\n\nAt seven."


def body(**more):
    return {"model": "handbook", "messages": [{"role": "user", "content": "When?"}], "max_tokens": 400} | more


async def test_a_completion_has_thoughts_under_both_names(serving, forced, script):
    forced.say(script, "At seven.")
    async with serving() as served:
        answer = (await served.client.post(URL, json=body(chat_template_kwargs={"enable_thinking": True}))).json()
        plain = (await served.client.post(URL, json=body())).json()
        metrics = (await served.client.get("/metrics")).text.splitlines()
    message = answer["choices"][0]["message"]
    assert message["content"] == "At seven."
    assert message["reasoning"] == message["reasoning_content"] == "It says seven."
    thoughts = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < thoughts < answer["usage"]["completion_tokens"]
    assert answer["cag"]["usage"]["reasoning_tokens"] == thoughts
    assert plain["choices"][0]["message"] == {"role": "assistant", "content": "At seven.", "refusal": None}
    assert f"cag_reasoning_tokens_total {thoughts}" in metrics


async def test_streams_have_thoughts_apart(serving, forced, script):
    forced.say(script, script, script)
    async with serving() as served:
        chunks = await served.client.post(URL, json=body(stream=True, think=True))
        events = await served.client.post(ASK, json={"question": "When?", "think": True, "stream": True})
        whole = (await served.client.post(ASK, json={"question": "When?", "think": True})).json()
    data = [json.loads(line.removeprefix("data: ")) for line in chunks.text.split("\n\n")[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in data]
    for field, expected in (("content", "At seven."), ("reasoning", "It says seven.")):
        assert "".join(delta.get(field, "") for delta in deltas) == expected
    assert all(delta.get("reasoning") == delta.get("reasoning_content") for delta in deltas)
    told = {"reasoning": "", "token": ""}
    *pieces, last = events.text.strip().split("\n\n")
    for piece in pieces:
        name, text = piece.removeprefix("event: ").split("\ndata: ")
        told[name] += json.loads(text)["text"]
    assert told == {"reasoning": "It says seven.", "token": "At seven."}
    assert json.loads(last.split("\ndata: ")[1])["reasoning"] == whole["reasoning"] == "It says seven."


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"think": True}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "medium"}, True),
        ({"chat_template_kwargs": None}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"thinking": True}, "reasoning_effort": "medium"}, True),
    ],
)
async def test_clients_choose_as_they_do_elsewhere(serving, engine, forced, fields, thinks):
    forced.say("At seven.")
    with engine.open("handbook") as prefix:
        expected = len(prefix.session().stream("When?", think=thinks)._generation.suffix_ids)
    async with serving(default_max_tokens=7) as served:
        request = {name: value for name, value in body(**fields).items() if name != "max_tokens"}
        runs, run = [], served.service.run
        served.service.run = lambda question: runs.append(question) or run(question)
        answer = (await served.client.post(URL, json=request)).json()
    assert answer["cag"]["usage"]["computed_tokens"] == expected
    assert runs[0].options.think == thinks
    assert runs[0].options.max_tokens == 7 + thinks * THOUGHT_TOKENS


async def test_an_effort_that_the_cache_does_not_say_is_refused(serving, engine, forced):
    forced.say("At seven.")
    async with serving() as served:
        response = await served.client.post(URL, json=body(reasoning_effort="high"))
    if engine.kind == "choice":  # whose template knows no efforts
        assert response.status_code == 200
    else:
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "reasoning_effort")
        assert "medium" in error["message"]


async def test_turns_of_sessions_and_clients_carry_no_thoughts(serving, forced, script):
    forced.say(script, "Because.", "Because.")
    async with serving() as served:
        session = (await served.client.post("/v1/caches/handbook/sessions")).json()
        url = f"/v1/sessions/{session['id']}/ask"
        first = (await served.client.post(url, json={"question": "When?", "think": True})).json()
        second = (await served.client.post(url, json={"question": "Why?", "think": True})).json()
        messages = [
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": first["answer"], "reasoning_content": first["reasoning"]},
            {"role": "user", "content": "Why?"},
        ]
        again = (await served.client.post(URL, json=body(messages=messages, think=True))).json()
    assert (first["answer"], second["answer"], again["choices"][0]["message"]["content"]) == (
        "At seven.",
        "Because.",
        "Because.",
    )
    assert again["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]
