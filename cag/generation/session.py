"""A session behind a prefix: turns of question and answer, each answer with its proof.

A session owns only its tail, in pages of the model's pool; the prefix is shared. Later questions stand behind the
earlier ones, whose keys and values are kept, so they count as cached. While nobody asks, a session can let go of the
prefix and go on behind it when it has been opened again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from cag.errors import RequestTooLong, UsageError
from cag.generation.answer import Answer, CacheOrigin, Piece, Usage
from cag.generation.generate import Generation, SamplingOptions
from cag.generation.scheduler import Request, Scheduler
from cag.generation.speculation import Drafter
from cag.generation.thoughts import without_thoughts
from cag.identity import check_weights
from cag.prompt import begins_beyond, conversation_ids, encode, given_answer_ids, next_question_ids
from cag.thinking import AnswerForm

if TYPE_CHECKING:
    from cag.prefix import Prefix


class AnswerStream:
    """Iterates over pieces of the answer's text, once, or over `pieces`, which have what is thought before it, too;
    `answer` is there when the iteration has ended.

    Iterating raises UsageError the second time, while another answer of the session is running, and when one has begun
    since the stream was made: the question stands behind what was there then.
    """

    def __init__(
        self,
        session: Session,
        history: Sequence[tuple[str, str]],
        question: str,
        generation: Generation,
        form: AnswerForm,
        was_resident: bool,
    ) -> None:
        self._session = session
        self._history = history
        self._question = question
        self._generation = generation
        self._form = form
        self._cached_tokens, self._num_answered = session.num_cached_tokens, session.num_answered
        self._was_resident = was_resident
        self._has_begun = False
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        with closing(self.pieces()) as pieces:
            for piece in pieces:
                if piece.text:
                    yield piece.text

    def pieces(self) -> Generator[Piece]:
        """Pieces of the text, and of the reasoning before it. Raises: UsageError: as iterating."""
        self._begin()
        try:
            yield from self._generation
        finally:
            self._session.end_turn(self._generation, self._form)
        self._end()

    def submit(self, scheduler: Scheduler, on_piece: Callable[[Piece], None]) -> Request:
        """Let `scheduler` make the answer, together with others; `finish` behind it.

        Raises: UsageError: as iterating.
        """
        self._begin()
        try:
            return scheduler.submit(self._generation, on_piece)
        except BaseException:
            self._session.end_turn(self._generation, self._form)
            raise

    def finish(self, request: Request) -> Answer | None:
        """Wait until a submitted answer has left the scheduler. None: it was cancelled. Raises what went wrong. Either
        way an answer that is not whole leaves the session as if the question had not been asked."""
        request.wait()
        try:
            request.check()
            if self._generation.finished:
                self._end()
        finally:
            self._session.end_turn(self._generation, self._form, keep=self._answer is not None)
        return self._answer

    def _begin(self) -> None:
        if self._has_begun:
            raise UsageError("this stream was read before.", hint="Make a stream for each question.")
        self._session.begin_turn(self._num_answered)
        self._has_begun = True

    def _end(self) -> None:
        self._answer = self._compose()
        self._session.turns.extend([*self._history, (self._question, self._answer.text)])

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            UsageError: the stream has not been read to its end.
        """
        if self._answer is None:
            raise UsageError("the answer is not complete yet.", hint="Read the stream to its end first.")
        return self._answer

    def _compose(self) -> Answer:
        generation, prefix = self._generation, self._session.prefix
        resident = prefix.resident
        tier, load_s = ("device", 0.0) if self._was_resident else (resident.tier, resident.load_s)
        computed = len(generation.suffix_ids)
        return Answer(
            text=generation.text.strip(),
            citations=prefix.cite(self._question, generation.text),
            usage=Usage(
                self._cached_tokens + computed,
                self._cached_tokens,
                computed,
                len(generation.token_ids),
                generation.drafted_tokens,
                generation.accepted_tokens,
                generation.reasoning_tokens,
            ),
            timings=generation.timings(load_s),
            cache=CacheOrigin(prefix.name, prefix.digest, tier),
            model=prefix.model.model_id,
            finish_reason=generation.finish_reason,
            token_ids=tuple(generation.token_ids),
            reasoning=generation.reasoning.strip(),
        )


class Session:
    """Turns behind one prefix. Not for use by several threads at once; open one session for each.

    Attributes:
        turns: (question, answer) pairs so far.
        num_answered: turns that later questions stand behind, interrupted ones included.
    """

    def __init__(self, prefix: Prefix) -> None:
        self._prefix: Prefix | None = prefix
        self._digest = prefix.digest
        self.turns: list[tuple[str, str]] = []
        self._state = prefix.model.new_session_state(prefix.resident)
        self._busy = False
        self._begun_at = 0  # tokens of the tail before the running answer
        self.num_answered = 0
        self._read: list[int] = []  # tokens of the tail
        self._unread: list[int] = []  # tokens of the last turn that no forward has seen yet

    @property
    def prefix(self) -> Prefix:
        """What it stands behind. Raises: UsageError: it has let go of it."""
        if self._prefix is None:
            raise UsageError("the session was suspended or closed.", hint="Resume it, or open another one.")
        return self._prefix

    def suspend(self) -> None:
        """Keep the tail and nothing else, until `resume`: the prefix may leave memory meanwhile.

        Raises:
            UsageError: an answer is running.
        """
        self._check_idle()
        self._prefix = None
        self._state.leave_prefix()
        self._state.tail.shrink(self._state.num_tail)

    def resume(self, prefix: Prefix) -> None:
        """Go on behind `prefix`, the same version of the cache in whatever memory it is now.

        Raises:
            UsageError: another version, or no prefix.
            ModelError: the weights were written over since they were loaded.
        """
        if getattr(prefix, "digest", None) != self._digest:
            raise UsageError("a session can only go on behind the version of the cache that it was opened with.")
        check_weights(prefix.model)
        self._prefix = prefix
        self._state.join_prefix(prefix.resident)

    def start_over(self) -> None:
        """Forget all turns: the next question brings its history. As far as its tokens are those that were read, they
        are not read again.

        Raises:
            UsageError: an answer is running.
        """
        self._check_idle()
        self.turns, self.num_answered, self._unread = [], 0, []

    def close(self) -> None:
        """Give the tail's pages back; without, they go back when nothing refers to the session any more.

        Raises:
            UsageError: an answer is running.
        """
        self._check_idle()
        self._prefix = None
        self._state.leave_prefix()
        self._state.tail.close()

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prefix and of earlier turns whose keys and values are there."""
        return self._state.num_tokens

    @property
    def tail_bytes(self) -> int:
        """Bytes of its own keys and values, and of what recurrent layers know behind them."""
        return self._state.tail.num_bytes + self.recurrent_bytes

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of what recurrent layers know behind its own tokens; keys and values lie in pages of the model."""
        return self._state.recurrent_bytes

    def begin_turn(self, num_answered: int) -> None:
        """Before an answer to a question that was laid out behind `num_answered` turns; `end_turn` behind it.

        Raises:
            UsageError: another answer of the session is still running, or has begun since.
        """
        self._check_idle()
        if self.num_answered != num_answered:
            raise UsageError(
                "another answer of the session has begun since this stream was made.",
                hint="Make the stream of a question when the answer before it is there.",
            )
        self._state.mark()  # the answer may have to be forgotten
        self._busy, self._begun_at = True, self._state.num_tail

    def end_turn(self, generation: Generation, form: AnswerForm, *, keep: bool = True) -> None:
        """However an answer has ended, the session is ready for the next question. What has been said so far is
        remembered, unless `keep` is False; of thoughts and of what a stop string has cut nothing is, and who was
        interrupted in thoughts said nothing."""
        forwarded = self._state.num_tail - self._begun_at - len(generation.suffix_ids)
        unsaid = generation.is_thinking and not generation.finished
        if forwarded < 0 or unsaid or not keep:  # not all of the question was read, or nobody heard: it was not asked
            self._state.rewind(self._begun_at)
        else:
            self.num_answered += 1
            forwarded = min(forwarded, len(generation.token_ids))  # more if an interrupt came before a draft was judged
            read = generation.suffix_ids + generation.token_ids[:forwarded]
            turn = self._remembered(generation, form)
            stays = _num_common(read, turn)
            if stays < len(read) and self.prefix.model.recurrent is not None:
                stays = 0  # these can go back to the beginning of the turn alone
            self._state.rewind(self._begun_at + stays)
            self._read += turn[:stays]
            self._unread = turn[stays:]
        self._state.mark()
        self._busy = False

    def _remembered(self, generation: Generation, form: AnswerForm) -> list[int]:
        """The question and its answer as later ones are to see them. Of one with thoughts, or that a stop string has
        cut, the text is left, read as the template has answers that were given."""
        asked, tokenizer = generation.suffix_ids, self.prefix.model.tokenizer
        if not (generation.reasoning_tokens or generation.was_cut):
            return asked + generation.token_ids
        asked = asked[: len(asked) - len(encode(tokenizer, form.template.after, special=True))]
        return asked + given_answer_ids(tokenizer, form.given, generation.text)

    def ask(
        self,
        question: str,
        options: SamplingOptions | None = None,
        *,
        started_at: float | None = None,
        history: Sequence[tuple[str, str]] = (),
        **sampling: Any,
    ) -> Answer:
        """Answer a question behind the prefix and the earlier turns. Arguments and errors as of `stream`."""
        stream = self.stream(question, options, started_at=started_at, history=history, **sampling)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        question: str,
        options: SamplingOptions | None = None,
        *,
        started_at: float | None = None,
        history: Sequence[tuple[str, str]] = (),
        **sampling: Any,
    ) -> AnswerStream:
        """Start an answer; iterate over the result for its text.

        Args:
            question: the user's words.
            options: sampling and stop rules; or give its fields as keywords (`max_tokens=64`).
            started_at: `time.perf_counter()` from which the first token is counted; the time of the call if None.
            history: (question, answer) turns that were held elsewhere, to be read before the question.
            **sampling: fields of `SamplingOptions`, in place of `options`.

        Raises:
            UsageError: a question that is empty or no text, options out of their range or given in both ways, a
                history that is none, or one for a session that has turns of its own; or thoughts that this prefix
                leaves no room for (`cag.thinking`).
            RequestTooLong: no room left in the model's window.
        """
        begin = time.perf_counter() if started_at is None else started_at
        _check_asked(question, history, begin)
        if history and self.num_answered:
            raise UsageError("the session has turns of its own.", hint="Replay a history in a new session.")
        self.prefix.check_open()
        was_resident = started_at is None and self.prefix.resident.is_loaded
        options = _sampling(options, sampling)
        form = self.prefix.model.thinking.form(self.prefix.template, think=options.think)
        suffix = self._suffix(form, question, history)
        suffix = suffix[self._recall(form, suffix) :]
        generation = Generation(
            self.prefix.model,
            self._state,
            suffix,
            options,
            started_at=begin,
            drafter=self._drafter(suffix, options.speculate),
            form=form,
        )
        return AnswerStream(self, history, question, generation, form, was_resident)

    def _recall(self, form: AnswerForm, suffix: Sequence[int]) -> int:
        """How many tokens of a whole conversation are in the tail already, which goes back to just these. What the
        template has behind the question is always read: `end_turn` looks for it."""
        if self.num_answered or not self._read:
            return 0
        self._check_idle()
        model = self.prefix.model
        behind = len(encode(model.tokenizer, form.template.after, special=True))
        stays = min(_num_common(self._read, suffix), len(suffix) - max(1, behind))
        if stays < len(self._read) and model.recurrent is not None:  # whose states cannot go back
            stays = 0
            self._state.tail.close()
            self._state = model.new_session_state(self.prefix.resident)
        self._state.rewind(stays)
        self._state.mark()
        del self._read[stays:]
        return stays

    def _check_idle(self) -> None:
        if self._busy:
            raise UsageError("another answer of the session is still running.", hint="Open a second session.")

    def _drafter(self, suffix: list[int], speculate: bool | None) -> Drafter | None:
        model, resident = self.prefix.model, self.prefix.resident
        wanted = model.rows_stay_apart if speculate is None else speculate
        return Drafter(lambda: resident.ngrams, [*self._read, *suffix]) if wanted else None

    def _suffix(self, form: AnswerForm, question: str, history: Sequence[tuple[str, str]]) -> list[int]:
        tokenizer = self.prefix.model.tokenizer
        turns = [(asked, without_thoughts(answer, form.marks)) for asked, answer in history]
        self._refuse_beyond("".join(text.strip() for text in (*(text for turn in turns for text in turn), question)))
        if self.num_answered:
            return self._unread + next_question_ids(tokenizer, form.template, question)
        return conversation_ids(tokenizer, form.template, turns, question, given=form.given)

    def _refuse_beyond(self, text: str) -> None:
        """What is far longer than the window is not tokenized: that may take long. Raises: RequestTooLong."""
        model = self.prefix.model
        room = model.window_tokens - (self._state.num_tokens if self.num_answered else self._state.num_prefix)
        if begins_beyond(model.tokenizer, text, room):
            raise RequestTooLong(
                f"the question has more than the {room} tokens that are left of a window of {model.window_tokens}.",
                hint="Shorten the question, start a new session, or use fewer documents.",
            )


def _num_common(some: Sequence[int], others: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = zip(some, others, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))


def _check_asked(question: object, history: object, started_at: object) -> None:
    """Raises: UsageError: what is no text, no turns or no time."""
    if not isinstance(question, str):
        raise UsageError(f"the question is {question!r}; it must be text.")
    if not question.strip():
        raise UsageError("the question is empty.")
    if not isinstance(history, Sequence) or not all(map(_is_turn, history)):
        raise UsageError(f"the history is {repr(history)[:200]}; it must be (question, answer) pairs of texts.")
    if not isinstance(started_at, (int, float)):
        raise UsageError(f"started_at is {started_at!r}; it must be a `time.perf_counter()`.")


def _is_turn(turn: object) -> bool:
    return isinstance(turn, tuple | list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _sampling(options: SamplingOptions | None, fields: dict[str, Any]) -> SamplingOptions:
    if options is None:
        return SamplingOptions(**fields)
    if not isinstance(options, SamplingOptions) or fields:
        raise UsageError("sampling is given as one `SamplingOptions`, or as keywords.")
    return options
