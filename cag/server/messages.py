"""OpenAI's `messages` -> earlier turns and the question. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, Literal, NamedTuple

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError

from cag.errors import UsageError
from cag.server.bodies import Body, Text

SYSTEM_ROLES = ("system", "developer")


class Message(Body):
    """One message; content parts are joined to one text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_calls(cls, message: Any) -> Any:
        for name in ("tool_calls", "function_call", "audio") if isinstance(message, dict) else ():
            if message.get(name):
                raise PydanticCustomError("unsupported", "{name} of messages are not supported", {"name": name})
        return message

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return "\n".join(_part_text(part) for part in content)


class Conversation(NamedTuple):
    """What a model reads: (question, answer) turns, then the question."""

    history: tuple[tuple[str, str], ...]
    question: str


def conversation_of(messages: Iterable[Message]) -> Conversation:
    """Turns and question of a request.

    Neighbours of one role are one turn, their texts apart by an empty line. System and developer messages stand, in
    their order, before the first question's text: the system role of the prompt is the cache's own.

    Raises:
        UsageError: the turns do not begin or do not end with a user's message.
    """
    messages = list(messages)
    system = [message.content for message in messages if message.role in SYSTEM_ROLES]
    turns = [message for message in messages if message.role not in SYSTEM_ROLES]
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise UsageError("messages must begin and end with a user's message, system messages aside.", param="messages")
    texts = ["\n\n".join(turn.content for turn in group) for _, group in groupby(turns, key=lambda turn: turn.role)]
    texts[0] = "\n\n".join([*system, texts[0]])
    return Conversation(tuple(zip(texts[0::2], texts[1::2], strict=False)), texts[-1])


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and part.get("type") == "text":
        raise PydanticCustomError("no_text", "a content part of type 'text' needs a string as its `text`")
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise PydanticCustomError(
        "unsupported_part", "content parts of type '{kind}' are not supported, only 'text'", {"kind": str(kind)}
    )
