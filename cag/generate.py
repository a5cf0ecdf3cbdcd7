"""The token loop: suffix in, tokens out, with sampling and stop rules. The same loop serves every path of the engine.

Knows a model and a sequence state; knows no documents, no store and no templates beyond their stop strings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from cag.errors import RequestTooLong, UsageError
from cag.model import LanguageModel
from cag.prefill import PROMPT_BLOCK_TOKENS, prefill
from cag.state import SequenceState

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. Temperature 0 is greedy; `seed` makes sampling repeatable."""

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if self.temperature < 0:
            raise UsageError(f"temperature is {self.temperature}; it must not be negative.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}; it must be in (0, 1].")


class Sampler:
    """Chooses a token id from logits `[vocab_size]`."""

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self.greedy = options.temperature == 0
        self.warpers: list[Any] = []
        self.generator = torch.Generator(device=device)
        if options.seed is not None:
            self.generator.manual_seed(options.seed)
        else:
            self.generator.seed()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_p < 1:
                self.warpers.append(TopPLogitsWarper(float(options.top_p)))

    def __call__(self, logits: Tensor) -> int:
        """The greedy choice takes the lowest id of equal logits."""
        if self.greedy:
            return int(logits.argmax())
        scores = logits[None]
        for warper in self.warpers:
            scores = warper(None, scores)
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))


class Generation:
    """One running answer. Iterating yields pieces of text; afterwards the counts and times are set.

    Attributes:
        token_ids: tokens of the answer, the stop token left out.
        text: the whole answer so far.
        prefill_s, ttft_s, tpot_s, total_s: seconds, counted from `started_at`.
        finish_reason: "stop" or "length".
    """

    def __init__(
        self,
        model: LanguageModel,
        state: SequenceState,
        suffix_ids: list[int],
        options: SamplingOptions,
        *,
        started_at: float | None = None,
    ) -> None:
        room = model.window_tokens - state.num_tokens - len(suffix_ids)
        if room < 1:
            raise RequestTooLong(
                f"prompt of {state.num_tokens + len(suffix_ids)} tokens leaves no room in a window of "
                f"{model.window_tokens}.",
                hint="Shorten the question, start a new session, or use fewer documents.",
            )
        self.model = model
        self.state = state
        self.suffix_ids = suffix_ids
        self.max_tokens = min(options.max_tokens, room)
        self.sampler = Sampler(options, model.device)
        self.stop_strings = (*model.template.stop_strings, *options.stop)
        self.started_at = time.perf_counter() if started_at is None else started_at
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason = "length"
        self.prefill_s = self.ttft_s = self.tpot_s = self.total_s = 0.0

    def __iter__(self) -> Iterator[str]:
        emitted = 0
        for piece in self._pieces():
            self.text += piece
            cut = self._find_stop()
            if cut is not None:
                self.text, self.finish_reason = self.text[:cut], "stop"
                break
            safe = max(emitted, len(self.text) - self._held_back())
            if safe > emitted:
                yield self.text[emitted:safe]
                emitted = safe
        self.total_s = time.perf_counter() - self.started_at
        if emitted < len(self.text):
            yield self.text[emitted:]

    def run(self) -> Generation:
        """Generate to the end, for callers that do not stream."""
        for _ in self:
            pass
        return self

    def _pieces(self) -> Iterator[str]:
        """Text as soon as whole characters are there; empty pieces are kept so that stop strings are checked."""
        stream = DecodeStream(skip_special_tokens=True)
        backend = self.model.tokenizer.backend_tokenizer
        decoded = 0
        for token in self._tokens():
            piece = stream.step(backend, token) or ""
            decoded += len(piece)
            yield piece
        rest = self.model.tokenizer.decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(rest) > decoded:  # bytes of a character that the last token left open
            yield rest[decoded:]

    def _tokens(self) -> Iterator[int]:
        begin = time.perf_counter()
        logits = prefill(self.model, self.state, self.suffix_ids, block_tokens=PROMPT_BLOCK_TOKENS)
        token = self.sampler(logits)
        first_at = time.perf_counter()
        self.prefill_s, self.ttft_s = first_at - begin, first_at - self.started_at
        while True:
            if token in self.model.stop_ids:
                self.finish_reason = "stop"
                return
            self.token_ids.append(token)
            yield token
            if len(self.token_ids) >= self.max_tokens:
                return
            token = self.sampler(self.model.forward([token], self.state)[-1])
            self.tpot_s = (time.perf_counter() - first_at) / len(self.token_ids)

    def _find_stop(self) -> int | None:
        found = [at for at in (self.text.find(stop) for stop in self.stop_strings) if at >= 0]
        return min(found, default=None)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self.stop_strings:
            for length in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:length]):
                    longest = max(longest, length)
                    break
        return longest
