"""Conversations as clients of OpenAI hold them: each question comes with all turns before."""

from __future__ import annotations

URL = "/v1/chat/completions"
QUESTIONS = ["When does the alpha gate open?", "What is its code?", "And who paints it?"]


def messages_of(turns, question):
    said = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*said, {"role": "user", "content": question}]


async def asked(client, turns, question, **more):
    body = {"model": "handbook", "messages": messages_of(turns, question), "max_tokens": 9} | more
    response = await client.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text(completion):
    return completion["choices"][0]["message"]["content"]


def counts(completion):
    usage = completion["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert completion["cag"]["usage"]["cached_tokens"] == cached
    assert completion["cag"]["usage"]["computed_tokens"] == usage["prompt_tokens"] - cached
    return cached, usage["prompt_tokens"]


def said(completion):
    """All that a conversation's answer says, but for what was read for it and how long that took."""
    usage, proof = completion["usage"], completion["cag"]
    return (
        completion["choices"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        proof["citations"],
        proof["cache"]["digest"],
    )


async def conversation(client, questions, **more):
    """Completions of questions that each come with all turns before."""
    turns, found = [], []
    for question in questions:
        found.append(await asked(client, turns, question, **more))
        turns.append((question, text(found[-1])))
    return found, turns
