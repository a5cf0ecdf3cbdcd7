"""First tokens and decoding: behind a resident prefix, against reading retrieved text, against attending one by one.

A model in, rows out. Everything runs through the engine's own token loop and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cag.forward.decoder_layers import relative_difference
from cag.forward.replays import StepReplays
from cag.forward.state import AttentionRule, SequenceState
from cag.forward.step_tensors import StepState, StepTensors
from cag.generation.generate import Generation, SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.model import LanguageModel
from cag.residency.resident import ResidentPrefix
from cag_bench.errors import KernelWrong
from cag_bench.figures import percentiles
from cag_bench.gpu.clock import Budget, median_of, wall_samples
from cag_bench.gpu.model import random_ids, random_prefix, weight_bytes
from cag_bench.gpu.shapes import GpuOptions
from cag_bench.gpu.ways import step_way_row
from cag_kernels import merge_segments, paged_attention, prefix_attention

MAX_DIFFERENCE = 0.1  # of the logits' norm, between ways to run the same step in bfloat16
WAY_SAMPLES = 9  # of each way of launches
PROMPT_BLOCKS = (2048, 256)  # how a prompt without a cache is read: the quicker one counts

Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What these rows are measured with. `bandwidth`: bytes a second that a copy moves, read and written."""

    model: LanguageModel
    options: GpuOptions
    budget: Budget
    bandwidth: float

    def floor_s(self, prefix: ResidentPrefix) -> float:
        """Seconds in which weights and prefix can be read once."""
        return (weight_bytes(self.model) + prefix.num_bytes) / self.bandwidth

    def first_token(self, kind: str, prefix: ResidentPrefix) -> Row:
        """A question behind a resident prefix, from its ids to the id of the first token on the host."""
        samples = self._first_tokens(prefix, self.options.samples)
        return timed(f"first token, {kind}", samples, self.floor_s(prefix)) | {
            "shape": {"num_tokens": prefix.num_tokens, "question_tokens": self.options.question_tokens},
            "few_launches": self.model.device_decoder is not None,
            "replayed_steps": self._replays.num_replayed,
            "refusal": self._replays.refusal,
        }

    def first_token_ways(self, kind: str, prefix: ResidentPrefix) -> Row:
        """The same by each way of launches, recorded anew for each."""
        count = min(self.options.samples, WAY_SAMPLES)
        name = f"launch ways, first token, {kind}"
        return step_way_row(name, lambda: self._first_tokens(prefix, count), self._replays.forget, self.budget)

    def _first_tokens(self, prefix: ResidentPrefix, count: int) -> list[float]:
        question = random_ids(self.options.question_tokens, 1)

        def ask() -> None:
            self._answer(self.model.new_session_state(prefix), question)

        return wall_samples(ask, self.model.device, count, self.budget)

    def rag_first_token(self, retrieve_s: float | None) -> Row:
        """The same question behind `rag_tokens` that nothing is cached of, retrieval added."""
        prompt = random_ids(self.options.rag_tokens + self.options.question_tokens, 2)
        by_block = {}
        for block in PROMPT_BLOCKS:

            def ask(block: int = block) -> None:
                self._answer(self.model.new_state(capacity=len(prompt)), prompt, block)

            by_block[block] = wall_samples(ask, self.model.device, self.options.samples, self.budget)
        block = min(by_block, key=lambda size: median_of(by_block[size]))
        samples = [seconds + (retrieve_s or 0.0) for seconds in by_block[block]]
        row = timed("first token, RAG", samples, weight_bytes(self.model) / self.bandwidth)
        return row | {"shape": {"prompt_tokens": len(prompt), "block_tokens": block}, "retrieve_s": retrieve_s}

    def decoding(self, kind: str, prefix: ResidentPrefix) -> Row:
        """Steps of all sessions at once, each with its own tail behind one prefix."""
        states = self._sessions(prefix)
        samples = self._steps_of(states, self.options.steps)
        tail_bytes = sum(state.tail.num_bytes for state in states)
        row = timed(f"decode, {kind}", samples, self.floor_s(prefix) + tail_bytes / self.bandwidth)
        return row | self._speed(samples) | {"tail_bytes": tail_bytes, "replayed_steps": self._replays.num_replayed}

    def decoding_apart(self, prefix: ResidentPrefix) -> Row:
        """The same steps, but every session attends to the prefix by itself, with the same kernel."""
        states = self._sessions(prefix)
        together = self._step(states)
        with self._attending_apart():
            apart = self._step(states)
            difference = relative_difference(together, apart)
            if not difference <= MAX_DIFFERENCE:
                raise KernelWrong(f"logits of sessions together are off by {difference:.3g} from those apart.")
            samples = self._steps_of(states, max(2, self.options.steps // 4))
        floor_s = (weight_bytes(self.model) + len(states) * prefix.num_bytes) / self.bandwidth
        return timed("decode, session by session", samples, floor_s) | self._speed(samples) | {"difference": difference}

    def scheduled(self, prefix: ResidentPrefix) -> Row:
        """Answers of all sessions through the scheduler: questions join, tokens become text."""
        model, count = self.model, self.options.steps

        def answer_all() -> None:
            scheduler = Scheduler(model)
            for session in range(self.options.sessions):
                ids = random_ids(self.options.question_tokens, session)
                generation = Generation(model, model.new_session_state(prefix), ids, SamplingOptions(max_tokens=count))
                scheduler.submit(generation, lambda _piece: None)
            scheduler.run()

        samples = wall_samples(answer_all, model.device, 3, self.budget, warm_up=2)
        tokens = self.options.sessions * count
        shape = {"sessions": self.options.sessions, "answer_tokens": count}
        rates = [tokens / seconds for seconds in samples]
        return {
            "name": "answers through the scheduler",
            "shape": shape,
            "samples_s": samples,
            "tokens_per_s": median_of(rates),
        }

    @property
    def _replays(self) -> StepReplays:
        assert self.model.replays is not None, "steps run padded here, also on a CPU"
        return self.model.replays

    def _answer(self, state: SequenceState, ids: list[int], block_tokens: int = 256) -> None:
        Generation(self.model, state, ids, SamplingOptions(max_tokens=1), block_tokens=block_tokens).run()

    def _sessions(self, prefix: ResidentPrefix) -> list[SequenceState]:
        states: list[SequenceState] = [self.model.new_session_state(prefix) for _ in range(self.options.sessions)]
        for index, state in enumerate(states):
            self.model.forward(random_ids(self.options.tail_tokens, index), state)
        return states

    def _step(self, states: list[SequenceState]) -> Tensor:
        """Logits of one step whose tokens are forgotten again."""
        logits = self.model.forward_together([([7 + index % 200], state) for index, state in enumerate(states)])
        for state in states:
            state.rewind(state.num_tail - 1)
        return logits

    def _steps_of(self, states: list[SequenceState], count: int) -> list[float]:
        """Seconds of steps that follow each other, each token chosen from the logits before it."""
        tokens = [7 + index % 200 for index in range(len(states))]

        def step() -> None:
            nonlocal tokens
            logits = self.model.forward_together(
                [([token], state) for token, state in zip(tokens, states, strict=True)]
            )
            tokens = logits.argmax(dim=-1).tolist()

        return wall_samples(step, self.model.device, count, self.budget)

    def _speed(self, samples: list[float]) -> Row:
        sessions = self.options.sessions
        shape = {
            "sessions": sessions,
            "num_tokens": self.options.prefix_tokens,
            "tail_tokens": self.options.tail_tokens,
        }
        return {"shape": shape, "tokens_per_s": sessions / median_of(samples)}

    @contextmanager
    def _attending_apart(self) -> Iterator[None]:
        """Inside, a step's sessions attend to their prefix one by one."""
        model, usual = self.model, self._replays

        def run(tensors: StepTensors, state: StepState) -> Tensor:
            return model.run_step(tensors, AttendingApart(tensors, state))

        model.replays = StepReplays(run, model.pages, model.device, capture=model.device.type == "cuda")
        try:
            yield
        finally:
            model.replays = usual


class AttendingApart(StepState):
    """A step's state whose rows attend to the prefix one by one, as if it were each session's own."""

    def __init__(self, tensors: StepTensors, state: Any) -> None:
        self.tensors, self._state = tensors, state

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `cag.forward.step_tensors.StepState`."""
        found: tuple[Tensor, Tensor] = self._state.sides(layer)
        return found

    def attend_stored(self, layer: int, query: Tensor, rule: AttentionRule, sinks: Tensor | None = None) -> Tensor:
        """See `cag.forward.step_tensors.StepState`."""
        assert sinks is None
        parts = [paged_attention(query, self.tensors.tails(*self.sides(layer)), scale=rule.scale)]
        for segment in self._state.segments(layer):
            found = [prefix_attention(row, segment, scale=rule.scale) for row in torch.split(query, 1, dim=1)]
            parts.append((torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)))
        return merge_segments(parts).to(query.dtype)


def check_steps(model: LanguageModel, kind: str, num_tokens: int) -> float:
    """How far steps behind codes or numbers are from the network's own forward; before anything is timed.

    Raises:
        KernelWrong: too far.
    """
    prefix = random_prefix(model, num_tokens, kind, 5)
    worst = 0.0
    for counts in ([1], [5], [1, 1, 1], [3, 1, 4]):
        chunks = [(random_ids(count, count), model.new_session_state(prefix)) for count in counts]
        found = model.forward_together(chunks)
        replays, decoder = model.replays, model.device_decoder
        model.replays = model.device_decoder = None
        try:
            own = [model.forward(ids, model.new_session_state(prefix)) for ids, _ in chunks]
        finally:
            model.replays, model.device_decoder = replays, decoder
        worst = max(worst, relative_difference(torch.cat(own), found))
    if not worst <= MAX_DIFFERENCE:
        raise KernelWrong(f"logits of steps behind {kind} are off by {worst:.3g} of their norm.")
    return worst


def timed(name: str, samples: list[float], floor_s: float) -> Row:
    """A row of a figure with the floor beside it."""
    spread = percentiles(samples) or {}
    over = spread["p50"] / floor_s
    return {"name": name, "seconds": spread, "floor_s": floor_s, "p50_over_floor": over, "samples_s": samples}


Part = Callable[[], Iterator[Row]]
