"""`/v1/chat/completions` and `/v1/models`: what comes back, streamed or not, and what is refused."""

import json

import pytest

from cag.generation.generate import SamplingOptions

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
QUESTION = "When does the alpha gate open?"


def user(text):
    return {"role": "user", "content": text}


def body(**more):
    return {"model": "handbook", "messages": [user(QUESTION)], "max_tokens": 12} | more


def chunks_of(response):
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_a_completion_is_the_engines_answer_with_its_proof(serving, engine):
    alone = engine.ask("handbook", QUESTION, max_tokens=12)
    async with serving() as served:
        answer = (await served.client.post(URL, json=body())).json()
        again = (await served.client.post(URL, json=body())).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (alone.text, alone.finish_reason)
    assert answer["usage"] == {
        "prompt_tokens": alone.usage.prompt_tokens,
        "completion_tokens": alone.usage.completion_tokens,
        "total_tokens": alone.usage.prompt_tokens + alone.usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": alone.usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": alone.usage.accepted_tokens,
            "rejected_prediction_tokens": alone.usage.drafted_tokens - alone.usage.accepted_tokens,
        },
    }
    assert alone.usage.cached_tokens == engine.find("handbook")[1].num_tokens
    proof = answer["cag"]
    assert proof["citations"] == alone.to_json()["citations"]
    assert proof["cache"] == {"name": "handbook", "digest": alone.cache.digest, "tier": "disk"}
    assert (again["cag"]["cache"]["tier"], again["cag"]["timings"]["load_s"]) == ("device", 0.0)
    assert again["choices"] == answer["choices"]


async def test_drafts_are_said_and_change_no_answer(serving, engine, monkeypatch):
    monkeypatch.setattr(engine.model, "stop_ids", frozenset())
    alone = engine.ask("handbook", QUESTION, max_tokens=60, speculate=False)
    async with serving(speculate=True) as served:
        answer = (await served.client.post(URL, json=body(max_tokens=60))).json()
        metrics = (await served.client.get("/metrics")).text.splitlines()
    assert answer["choices"][0]["message"]["content"] == alone.text
    details, proof = answer["usage"]["completion_tokens_details"], answer["cag"]["usage"]
    assert answer["usage"]["completion_tokens"] == 60
    assert proof["drafted_tokens"] > 0
    assert details["accepted_prediction_tokens"] == proof["accepted_tokens"]
    assert details["rejected_prediction_tokens"] == proof["drafted_tokens"] - proof["accepted_tokens"]
    for outcome in ("accepted", "rejected"):
        count = details[f"{outcome}_prediction_tokens"]
        assert f'cag_drafted_tokens_total{{outcome="{outcome}"}} {count}' in metrics


async def test_a_stream_is_the_completion_in_pieces(serving):
    async with serving() as served:
        whole = (await served.client.post(URL, json=body())).json()
        response = await served.client.post(URL, json=body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        == whole["choices"][0]["message"]["content"]
    )
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["cag"]["cache"]["digest"] == whole["cag"]["cache"]["digest"]
    assert len({c["id"] for c in chunks}) == 1
    assert all("usage" not in c and c["object"] == "chat.completion.chunk" for c in chunks)


async def test_include_usage_adds_one_chunk_that_holds_it(serving):
    async with serving() as served:
        whole = (await served.client.post(URL, json=body())).json()
        response = await served.client.post(URL, json=body(stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks_of(response)
    assert all(c["usage"] is None and "cag" not in c for c in chunks)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert last["cag"]["citations"] == whole["cag"]["citations"]


async def test_null_is_as_if_it_were_not_there(serving):
    async with serving() as served:
        whole = (await served.client.post(URL, json=body())).json()
        null = await served.client.post(URL, json=body(stream=None, stream_options={"include_usage": None}))
    assert null.json()["choices"] == whole["choices"]


async def test_sampling_fields_reach_the_engine(serving, engine):
    alone = engine.ask("handbook", QUESTION, max_tokens=9, temperature=0.8, top_p=0.9, seed=5)
    greedy = engine.ask("handbook", QUESTION, max_tokens=9)
    stop = greedy.text[3]
    async with serving() as served:
        sampled = await served.client.post(
            URL, json=body(max_tokens=3, max_completion_tokens=9, temperature=0.8, top_p=0.9, seed=5)
        )
        stopped = await served.client.post(URL, json=body(stop=[stop, "never"]))
    assert sampled.json()["choices"][0]["message"]["content"] == alone.text
    assert sampled.json()["usage"]["completion_tokens"] == alone.usage.completion_tokens
    choice = stopped.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (greedy.text.partition(stop)[0].strip(), "stop")


async def test_the_default_of_max_tokens_is_a_setting(serving):
    async with serving(default_max_tokens=2) as served:
        answer = (await served.client.post(URL, json={"model": "handbook", "messages": [user(QUESTION)]})).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (2, "length")


async def test_earlier_turns_and_system_messages_are_read(serving, engine):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Who keeps the code?"),
        {"role": "assistant", "content": "Nobody says."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "And the"}, {"type": "text", "text": "gate?"}]},
    ]
    history = [("Be brief.\n\nBe kind.\n\nWho keeps the code?", "Nobody says.")]
    with engine.open("handbook") as prefix:
        alone = prefix.session().ask("And the\ngate?", SamplingOptions(max_tokens=12), history=history)
    async with serving() as served:
        answer = (await served.client.post(URL, json=body(messages=messages))).json()
    assert answer["usage"]["prompt_tokens"] == alone.usage.prompt_tokens
    assert answer["choices"][0]["message"]["content"] == alone.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "structured_outputs"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"allowed_token_ids": [3]}, "allowed_token_ids"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"documents": [{"text": "a"}]}, "documents"),
        ({"verbosity": "low"}, "verbosity"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "5"}, "seed"),
        ({"seed": True}, "seed"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_completion_tokens": "2"}, "max_completion_tokens"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"stream": "false"}, "stream"),
        ({"stream": 0}, "stream"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"messages": []}, "messages"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, "messages[0].content"),
        ({"messages": [user("\ud800")]}, "messages[0].content"),
        (
            {"messages": [user("a"), {"role": "assistant", "content": "b", "tool_calls": [{}]}, user("c")]},
            "messages[1]",
        ),
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{}]}, user("c")]}, "messages[1]"),
        ({"model": None}, "model"),
        ({"stop": ["x", ""]}, "stop[1]"),
        ({"think": "yes"}, "think"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"builtin_tools": []}}, "chat_template_kwargs.builtin_tools"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"think": True, "reasoning_effort": "none"}, "think"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(serving, change, param):
    async with serving() as served:
        response = await served.client.post(URL, content=json.dumps(body() | change), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_request")
    assert error["type"] == "invalid_request_error"
    assert param in error["message"] or param == "messages"
    assert "{" not in error["message"]


async def test_fields_that_ask_for_nothing_and_unknown_ones_are_ignored(serving):
    neutral = {
        "max_tokens": float(body()["max_tokens"]),
        "n": 1,
        "tools": [],
        "response_format": {"type": "text"},
        "logprobs": False,
        "stop_token_ids": [],
        "ignore_eos": False,
        "min_tokens": 0,
        "length_penalty": 1.0,
        "guided_json": None,
        "user": "x",
        "novel": {},
    }
    async with serving() as served:
        plain = (await served.client.post(URL, json=body())).json()
        answer = (await served.client.post(URL, json=body(**neutral, temperature=0, stop=None))).json()
    assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"model": "a/b"}, 404, "model_not_found"),
        ({"messages": [user("  ")]}, 400, "invalid_request"),
        ({"messages": [user("far too long " * 1000)]}, 400, "context_length_exceeded"),
    ],
)
async def test_errors_before_the_first_token_are_statuses_in_streams_too(serving, stream, change, status, code):
    async with serving() as served:
        response = await served.client.post(URL, json=body(stream=stream) | change)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_of_a_name_that_none_can_have_the_beginning_is_quoted(serving):
    async with serving() as served:
        response = await served.client.post(URL, json=body(model="a/" * 10_000))
    assert response.json()["error"]["code"] == "model_not_found"
    assert len(response.json()["error"]["message"]) < 500


async def test_models_are_the_caches_that_the_model_can_serve(serving, engine, copy_of):
    copy_of("manual", "gone")
    engine.store.set_ttl("gone", -1)
    async with serving() as served:
        listed = (await served.client.get("/v1/models")).json()
        one = (await served.client.get("/v1/models/manual")).json()
        gone = await served.client.get("/v1/models/gone")
    assert [model["id"] for model in listed["data"]] == ["handbook", "manual"]
    assert one in listed["data"]
    assert one | {"created": 0} == {"id": "manual", "object": "model", "created": 0, "owned_by": "cag"}
    assert gone.status_code == 404
