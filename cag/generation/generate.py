"""The token loop: suffix in, tokens out, with sampling and stop rules. The same steps serve every path of the engine,
an answer by itself and many at once.

Knows a model and a sequence state; knows no documents, no store and no templates beyond their stop strings and the form
of their answers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral, Real

import torch
from torch import Tensor

from cag.errors import RequestTooLong, UsageError
from cag.forward.state import SequenceState
from cag.generation.answer import Piece, Timings, joined
from cag.generation.speculation import MAX_DRAFT_TOKENS, Drafter, share_rows
from cag.generation.thoughts import AnswerReader, held_back
from cag.model import LanguageModel
from cag.thinking import AnswerForm

DEFAULT_MAX_TOKENS = 128
THOUGHT_TOKENS = 4096  # that an answer with thoughts may have besides, where nobody says how many in all
_LIKELY = 1024  # tokens among which those of `top_p` mostly are
GREEDY_BELOW = 1e-5  # a temperature: logits over less may leave the range of float32
SHARED_BLOCK_TOKENS = 64  # of a question, read in a step with others' tokens
WHOLE_BLOCK_TOKENS = 256  # the same in a step of its own


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. Temperature 0 is greedy, and so is one below `GREEDY_BELOW`; `seed` makes sampling
    repeatable. One stop string may stand without a tuple; they are looked for in the answer, not in thoughts.

    `think`: let the model think before it answers (`cag.thinking`); `max_tokens` counts thoughts, too, and None is
    `DEFAULT_MAX_TOKENS`, or `THOUGHT_TOKENS` more.

    `speculate`: run guesses from the corpus and the conversation along, which makes tokens come sooner and other ones
    never; None: where that holds to the bit (`LanguageModel.rows_stay_apart`).
    """

    max_tokens: int = None  # type: ignore[assignment]  # a number once it is made
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    speculate: bool | None = None
    think: bool = False

    def __post_init__(self) -> None:
        _check("think", self.think, isinstance(self.think, bool), "True or False")
        if self.max_tokens is None:
            object.__setattr__(self, "max_tokens", DEFAULT_MAX_TOKENS + self.think * THOUGHT_TOKENS)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))  # not a stop string a character
        strings = isinstance(self.stop, tuple | list) and all(isinstance(text, str) and text for text in self.stop)
        _check("stop", self.stop, strings, "a string that is not empty, or several")
        _check(
            "max_tokens", self.max_tokens, _is_whole(self.max_tokens) and self.max_tokens >= 1, "a whole number above 0"
        )
        heat = _is_number(self.temperature) and 0 <= self.temperature < math.inf
        _check("temperature", self.temperature, heat, "a finite number from 0 on")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]")
        fits = self.seed is None or (_is_whole(self.seed) and -(2**63) <= self.seed < 2**64)
        _check("seed", self.seed, fits, "a whole number of 64 bits, or None")
        _check("speculate", self.speculate, self.speculate in (None, True, False), "True, False or None")


def _check(name: str, value: object, is_right: bool, right: str) -> None:
    if not is_right:
        raise UsageError(f"{name} is {value!r}; it must be {right}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class Sampler:
    """Chooses a token id from logits `[vocab_size]`."""

    def __init__(self, options: SamplingOptions, device: torch.device) -> None:
        self.greedy = options.temperature < GREEDY_BELOW
        self.temperature, self.top_p = float(options.temperature), float(options.top_p)
        self.generator = torch.Generator(device=device)
        if options.seed is not None:
            self.generator.manual_seed(options.seed)
        else:
            self.generator.seed()

    def __call__(self, logits: Tensor) -> int:
        """The greedy choice takes the lowest id of equal logits."""
        if self.greedy:
            return int(logits.argmax())
        chances = (logits / self.temperature).softmax(dim=-1)
        if self.top_p == 1:
            return int(torch.multinomial(chances, 1, generator=self.generator))
        likely, ids = self._nucleus(chances)
        return int(ids[torch.multinomial(likely, 1, generator=self.generator)])

    def _nucleus(self, chances: Tensor) -> tuple[Tensor, Tensor]:
        """The fewest most likely tokens that have `top_p` of the chances together: their chances and ids.

        They are looked for among a few before the whole vocabulary is sorted.
        """
        for count in (min(_LIKELY, len(chances)), len(chances)):
            likely, ids = chances.topk(count)
            before = likely.cumsum(0) - likely
            inside = before < self.top_p
            if not inside[-1]:
                break
        return likely[inside], ids[inside]


class Generation:
    """One answer in the making, step by step: `next_tokens` are run behind the state, then `advance` takes what was
    chosen behind them (`choices`).

    With a `drafter`, tokens that it guesses are run behind the last one (`draft`, then `run_along`). `advance` chooses
    from each row as from that of a step of its own and goes on while the choice is what was guessed; then the state
    is as single steps leave it. So guesses show in the times and in nothing else, sampled answers included.

    Iterating does so to the end and yields pieces of text; `cag.generation.scheduler.Scheduler` does so for many at
    once.

    Attributes:
        token_ids: tokens of the answer, the stop token left out; thoughts before it included.
        text: the whole answer so far.
        reasoning: what was thought before it so far.
        reasoning_tokens: how many of `token_ids` are thoughts and their marks.
        prefill_s, ttft_s, tpot_s, total_s, answer_ttft_s: seconds, as in `Timings`.
        drafted_tokens, accepted_tokens: guesses that were run, and those that were right.
        finish_reason: "stop" or "length".
        finished: whether nothing is left to do.
        was_cut: whether `token_ids` say more than `text`, which ends before a stop string.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: SequenceState,
        suffix_ids: list[int],
        options: SamplingOptions,
        *,
        started_at: float | None = None,
        block_tokens: int | None = None,
        drafter: Drafter | None = None,
        form: AnswerForm | None = None,
    ) -> None:
        """`form`: what the suffix was laid out with; without it nothing is taken for a thought."""
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
        self.block_tokens = question_block_tokens(model) if block_tokens is None else block_tokens
        self.max_tokens = min(options.max_tokens, room)
        self.sampler = Sampler(options, model.device)
        self.drafter = drafter
        self.drafted_tokens = self.accepted_tokens = 0
        self.stop_strings = (*model.template.stop_strings, *options.stop)
        self.started_at = time.perf_counter() if started_at is None else started_at
        self.token_ids: list[int] = []
        self.text = self.reasoning = ""
        self.reasoning_tokens = 0
        self.finish_reason = "length"
        self.finished = self.was_cut = False
        self.prefill_s = self.ttft_s = self.tpot_s = self.total_s = self.answer_ttft_s = 0.0
        self._exactly = options.speculate is None  # drafts only where a row's bits do not depend on others
        self._guess: list[int] = []
        self._draft: list[int] = []  # of the guess, what the next step runs
        self._num_read = 0  # of the suffix
        self._begun_at = self._first_at = 0.0
        self._reader = AnswerReader(model.tokenizer, form)
        self._num_shown = 0  # characters

    def __iter__(self) -> Iterator[Piece]:
        while not self.finished:
            self.run_along(*share_rows([self.draft()], self.num_next, self.model.step_cost))
            if any(piece := self.advance(choices([self])[0])):
                yield piece

    def run(self) -> Generation:
        """Generate to the end, for callers that do not stream."""
        for _ in self:
            pass
        return self

    def timings(self, load_s: float = 0.0) -> Timings:
        """Of the whole answer, behind a cache that took `load_s` to load."""
        times = (self.prefill_s, self.ttft_s, self.tpot_s, self.total_s)
        return Timings(load_s, *times, answer_ttft_s=self.answer_ttft_s)

    @property
    def is_answering(self) -> bool:
        """Whether the next step is one of the answer's own tokens."""
        return self._num_read == len(self.suffix_ids)

    @property
    def is_thinking(self) -> bool:
        """Whether thoughts are under way, to which there is no answer yet."""
        return self._reader.splitter.is_thinking

    @property
    def num_next(self) -> int:
        """Tokens of the next step."""
        if self.is_answering:
            return 1 + len(self._draft)
        return min(self.block_tokens, len(self.suffix_ids) - self._num_read)

    @property
    def num_choices(self) -> int:
        """Of how many of them, the last ones, `advance` wants choices."""
        return 1 + len(self._draft)

    def draft(self) -> list[float]:
        """Guess how the answer goes on: for each token the chance that a step with the guess makes it one of the
        answer's. Nothing is run unless `run_along` says so."""
        self._guess, self._draft = [], []
        if self.drafter is None or not self.is_answering:
            return []
        most = min(self.model.most_rows(self.state, exactly=self._exactly), self.max_tokens - len(self.token_ids)) - 1
        if most < 1:
            return []
        self._guess = self.drafter.guess(min(most, MAX_DRAFT_TOKENS))
        ends = (index for index, token in enumerate(self._guess, start=1) if token in self.model.stop_ids)
        self._guess = self._guess[: next(ends, None)]
        return self.drafter.chances()[: len(self._guess)]

    def run_along(self, count: int) -> None:
        """Let the next step run the first `count` guessed tokens behind the last one."""
        self._draft = self._guess[:count]

    def next_tokens(self) -> list[int]:
        """What the next forward runs behind the state: a block of the suffix, later the last token and its draft.

        Blocks depend on the suffix alone, so that whoever else is answered does not show in the result.
        """
        self._begun_at = self._begun_at or time.perf_counter()
        if self.is_answering:
            return self.token_ids[-1:] + self._draft
        return self.suffix_ids[self._num_read : self._num_read + self.block_tokens]

    def advance(self, chosen: Iterable[int]) -> Piece:
        """Take the tokens that are chosen behind the last `num_choices` of `next_tokens`; a sampler's are made one by
        one, as far as they are needed.

        Returns the text that can be shown now: maybe none.
        """
        if not self.is_answering:
            self._num_read = min(self._num_read + self.block_tokens, len(self.suffix_ids))
            if not self.is_answering:
                return Piece()
        return joined(self._take_while_drafted(chosen))

    def _take_while_drafted(self, chosen: Iterable[int]) -> Iterator[Piece]:
        """Tokens as single steps would choose them, as long as the next row stands behind just these."""
        draft, self._draft = self._draft, []
        self.drafted_tokens += len(draft)
        num_unused = len(draft)  # rows behind the last one that was chosen from
        try:
            for token, drafted in zip(chosen, [*draft, None], strict=True):
                yield self._take(token)
                self.accepted_tokens += token == drafted
                if token != drafted or self.finished:
                    break
                num_unused -= 1
        finally:
            self.state.rewind(self.state.num_tail - num_unused)

    def _take(self, token: int) -> Piece:
        self._count_time()
        thought, thinks = len(self.reasoning), self.is_thinking
        ends = token in self.model.stop_ids and not self._reader.thinks_on(token)
        if self.drafter is not None:
            self.drafter.append(token)
        if not ends:
            self.token_ids.append(token)
            self._add(self._reader.read(token))
        if thinks or self.is_thinking:
            self.reasoning_tokens, self.answer_ttft_s = len(self.token_ids), 0.0
        stopped = self._cut_at_stop()
        if not stopped and (ends or len(self.token_ids) >= self.max_tokens):
            self._add(self._reader.end())
            stopped = self._cut_at_stop() or ends
            self.finished = True
        if stopped:
            self.finish_reason, self.finished = "stop", True
        if self.finished:
            self.total_s = time.perf_counter() - self.started_at
        return Piece(self._shown(), self.reasoning[thought:])

    def _count_time(self) -> None:
        now = time.perf_counter()
        if not self.token_ids:
            self._first_at = now
            self.prefill_s, self.ttft_s = now - self._begun_at, now - self.started_at
        else:
            self.tpot_s = (now - self._first_at) / len(self.token_ids)
        self.answer_ttft_s = self.answer_ttft_s or now - self.started_at

    def _add(self, piece: Piece) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning

    def _cut_at_stop(self) -> bool:
        """End the text before the first stop string, if one is there."""
        found = [at for at in (self.text.find(stop) for stop in self.stop_strings) if at >= 0]
        if found:
            self.text, self.was_cut = self.text[: min(found)], True
        return bool(found)

    def _shown(self) -> str:
        """Text that was not shown yet and certainly is no beginning of a stop string."""
        begin = self._num_shown
        safe = len(self.text) - (0 if self.finished else held_back(self.text, self.stop_strings))
        self._num_shown = max(begin, safe)
        return self.text[begin : self._num_shown]


def question_block_tokens(model: LanguageModel) -> int:
    """Tokens of what is asked behind a cache that one forward reads: others wait for it at most. Where few rows have a
    forward of their own, short blocks are read as quickly as long ones, and answers go on in the same steps."""
    return SHARED_BLOCK_TOKENS if model.decoder is not None else WHOLE_BLOCK_TOKENS


def choices(generations: Sequence[Generation]) -> list[Iterable[int]]:
    """Run the next tokens of answers of one model in one forward, and choose behind them: of each what `advance` takes.

    Logits are computed only where somebody samples.
    """
    model, counts = generations[0].model, [generation.num_choices for generation in generations]
    chunks = [(generation.next_tokens(), generation.state) for generation in generations]
    if all(generation.sampler.greedy for generation in generations):
        best = iter(model.choose_together(chunks, num_choices=counts))
        return [list(islice(best, count)) for count in counts]
    logits = model.forward_together(chunks, num_logits=counts)
    best = iter(logits.argmax(dim=-1).tolist())  # the lowest of equal ones, as `Sampler` has it
    chosen: list[Iterable[int]] = []
    for generation, rows in zip(generations, torch.split(logits, counts), strict=True):
        greedy = list(islice(best, len(rows)))
        chosen.append(greedy if generation.sampler.greedy else map(generation.sampler, rows))
    return chosen
