"""Bodies of `/v1/chat/completions`, in and out.

Source: https://platform.openai.com/docs/api-reference/chat; for what models think, which is said by its old name, too,
https://docs.vllm.ai/en/latest/features/reasoning_outputs.html
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cag.errors import UsageError
from cag.generation.answer import Answer, Piece, Usage
from cag.generation.generate import THOUGHT_TOKENS, SamplingOptions
from cag.server.bodies import Body, ClosedBody, Integer, Text
from cag.server.messages import Message, conversation_of
from cag.server.running import Question
from cag.server.tenants import CacheKey
from cag.thinking import Thinking

MAX_STOP_STRINGS = 16
MAX_MESSAGES = 10_000

# What would change the answer and is not there is refused; each field with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "bad_words": ([],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "echo": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "verbosity": ("medium",),
}

StopString = Annotated[Text, Field(min_length=1)]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = False


class SamplingFields(Body):
    """Sampling as OpenAI names it. A temperature that is not given is 0: the same question gets the same answer."""

    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: Integer | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: Integer | None = Field(default=None, ge=1)
    stop: list[StopString] | None = Field(default=None, max_length=MAX_STOP_STRINGS)
    stream: bool | None = False
    think: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    def options(self, max_tokens: int | None, default_max_tokens: int, *, think: bool) -> SamplingOptions:
        """As the engine wants them. Thoughts have room of their own where nobody says how many tokens."""
        return SamplingOptions(
            max_tokens=max_tokens or default_max_tokens + think * THOUGHT_TOKENS,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            think=think,
        )


class TemplateChoices(ClosedBody):
    """What clients let a chat template know, by the names that templates have for it."""

    enable_thinking: bool | None = None
    thinking: bool | None = None


class ChatRequest(SamplingFields):
    """A chat completion to be made. `model` is a cache's name; fields nobody knows are ignored, as is usual."""

    model: Text
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    stream_options: StreamOptions | None = None
    chat_template_kwargs: TemplateChoices | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        for name, neutral in UNSUPPORTED.items() if isinstance(body, dict) else ():
            asked = body.get(name)
            if asked is not None and asked not in neutral:
                raise PydanticCustomError("unsupported", "this server does not support it", {"field": name})
        return body

    def thinks(self, thinking: Thinking) -> bool:
        """Whether the model is to think. Raises: UsageError: fields that contradict each other, or an effort that would
        stand in the text before the question, where a cache has the usual one."""
        effort, choices = self.reasoning_effort, self.chat_template_kwargs or TemplateChoices()
        by_effort = None if effort is None else effort != "none"
        said = {self.think, choices.enable_thinking, choices.thinking, by_effort} - {None}
        if len(said) > 1:
            what = "think, chat_template_kwargs and reasoning_effort"
            raise UsageError(f"{what} say both that the model is to think and that it is not.", param="think")
        if effort not in (None, "none", *thinking.efforts):
            raise UsageError(
                f"this model is told before the documents how much to think, and caches do not say {effort!r}.",
                hint=f"Take {', '.join(thinking.efforts)} or none.",
                param="reasoning_effort",
            )
        return True in said

    def question(self, tenant: str, default_max_tokens: int, thinking: Thinking) -> Question:
        """What a tenant asks a model that thinks in this way. Raises: UsageError."""
        conversation = conversation_of(self.messages)
        max_tokens = self.max_completion_tokens or self.max_tokens
        options = self.options(max_tokens, default_max_tokens, think=self.thinks(thinking))
        cache = CacheKey(tenant, self.model)
        return Question(cache, conversation.question, options, conversation.history, goes_on=True)


@dataclass(frozen=True)
class CompletionHead:
    """What all parts of one response share."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answer: Answer) -> dict[str, Any]:
        """A whole response."""
        content = {"content": answer.text} | delta(Piece(answer.text, answer.reasoning))
        message = {"role": "assistant", **content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": usage_json(answer.usage), "cag": proof(answer)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed response."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._object("chat.completion.chunk", [choice])

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The piece that `stream_options.include_usage` asks for."""
        return self._object("chat.completion.chunk", []) | {"usage": usage_json(answer.usage)}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def delta(piece: Piece) -> dict[str, str]:
    """What a piece adds to a message; fields that it adds nothing to are left out."""
    fields = {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning, "content": piece.text}
    return {name: text for name, text in fields.items() if text}


def usage_json(usage: Usage) -> dict[str, Any]:
    """Token counts as OpenAI names them. Rejected predictions, guesses of the engine's own, are in no other count."""
    rejected = usage.drafted_tokens - usage.accepted_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": rejected,
        },
    }


def proof(answer: Answer) -> dict[str, Any]:
    """The extra field `cag`: what the answer rests on, where its time went, which cache and model it came from."""
    whole = answer.to_json()
    return {name: whole[name] for name in ("citations", "usage", "timings", "cache", "model")}
