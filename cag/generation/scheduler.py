"""Continuous batching: many answers at once, one forward a step, joining and leaving between steps.

    submit -> waiting -> [ step: schedule -> run -> postprocess ] -> pieces of text to each request's listener

A step has one row of every answer under way, and questions as far as they fit beside them, so nobody's next token waits
for more than one block of somebody's prompt; then drafts (`cag.generation.speculation`) where they are worth their
rows. What an answer says does not depend on who else is there: blocks of a prompt are cut by its own length, and rows
of a batch do not see each other (docs/design/011-many-sessions.md).

Knows a model and generations; knows no HTTP and no caches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from cag.forward.waiting import WaitGivenUp, waiting_while
from cag.generation.answer import Piece
from cag.generation.generate import Generation, choices
from cag.generation.speculation import share_rows
from cag.model import LanguageModel
from cag_kernels import FEW_ROWS

logger = logging.getLogger(__name__)

MAX_STEP_ROWS = FEW_ROWS  # tokens of a step, but for a single question that is longer

Listener = Callable[[Piece], None]
"""Told each piece of an answer, on the thread that steps."""


@dataclass(eq=False)
class Request:
    """One answer on its way. `error` is what went wrong, until `check`; `cancel` lets it leave at the next step."""

    generation: Generation
    on_piece: Listener
    error: Exception | None = None
    cancelled: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Leave at the next step."""
        self.cancelled = True

    @property
    def ended(self) -> bool:
        """Whether it has left."""
        return self._ended.is_set()

    def wait(self) -> None:
        """Until it has left."""
        self._ended.wait()

    def check(self) -> None:
        """Raises: what went wrong, once: its traceback holds this request, which must not hold it then."""
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error

    def leave(self, error: Exception | None = None) -> None:
        """It takes part in no further step."""
        self.error = error
        self._ended.set()

    @property
    def is_whole_step(self) -> bool:
        """Whether its next block is too long to share a step."""
        return self.generation.num_next > FEW_ROWS

    @property
    def is_ready(self) -> bool:
        """Whether its prefix is there, so that no forward would wait for it."""
        prefix = self.generation.state.prefix
        return prefix is None or prefix.is_loaded


def _place(request: Request) -> tuple[int, int]:
    """Of a request in a step: beside those of its model (one of two, `cag.short_model`) and of its prefix."""
    generation = request.generation
    return id(generation.model), id(generation.state.prefix)


_Outcome = tuple[Request, Iterable[int]]
"""Who took part in a forward, and what is chosen behind its rows."""


class Scheduler:
    """Steps through the answers of one model, those of its short sequences (`cag.short_model`) in forwards of their
    own. `submit` and `cancel` from any thread; `step` from one at a time.

    Attributes:
        num_steps, num_rows: forwards so far, and tokens in them.
        largest_batch: most answers that shared a step.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.num_steps = self.num_rows = self.largest_batch = 0
        self._arriving: deque[Request] = deque()
        self._reading: deque[Request] = deque()  # prompts, in the order in which they came
        self._answering: list[Request] = []
        self._shared_fails = False  # as the last shared step has
        self._gave_turn = False  # a long block had the last step: answers have this one
        self._news = threading.Condition()

    def submit(self, generation: Generation, on_piece: Listener) -> Request:
        """Let an answer join at the next step."""
        request = Request(generation, on_piece)
        with self._news:
            self._arriving.append(request)
            self._news.notify_all()
        return request

    @property
    def num_requests(self) -> int:
        """Answers that have not left."""
        return len(self._arriving) + len(self._reading) + len(self._answering)

    def step(self) -> int:
        """Schedule, run, postprocess. Returns how many answers took part; 0 when there is nothing to do."""
        batch = self._schedule()
        for _, found in groupby(batch, lambda request: id(request.generation.model)):
            together = list(found)
            self.num_steps += 1
            self.largest_batch = max(self.largest_batch, len(together))
            self._draft([request.generation for request in together])
            self._postprocess(self._run(together))
        return len(batch)

    def run(self) -> None:
        """Step until nobody is left."""
        while self.num_requests:
            self.step()

    def wait_for_work(self, stopping: Callable[[], bool]) -> None:
        """Until there is a request, or `stopping` says so (see `wake`)."""
        if not self.num_requests:
            self.model.settle_pages()
        with self._news:
            self._news.wait_for(lambda: bool(self.num_requests) or stopping())

    def abandon(self, error: Exception) -> None:
        """Everybody leaves with `error`."""
        with self._news:
            for request in (*self._answering, *self._reading, *self._arriving):
                request.leave(error)
            self._answering, self._reading, self._arriving = [], deque(), deque()

    def wake(self) -> None:
        """Let `wait_for_work` look again."""
        with self._news:
            self._news.notify_all()

    def _schedule(self) -> list[Request]:
        """Who takes part in the next step, those behind one prefix side by side."""
        with self._news:
            while self._arriving:
                self._reading.append(self._arriving.popleft())
        for request in [r for r in (*self._answering, *self._reading) if r.cancelled]:
            self._leave(request)
        prompts = self._readable()
        long = next((request for request in prompts if request.is_whole_step), None)
        batch = [*self._answering, *self._fitting([request for request in prompts if not request.is_whole_step])]
        self._gave_turn = long is not None and not (self._gave_turn and batch)
        if self._gave_turn and long is not None:
            return [long]
        return sorted(batch, key=_place)

    def _readable(self) -> list[Request]:
        """Prompts whose prefix is there. Without any, and while nobody answers, the first prompt may compute as its
        layers arrive, as long as there is nobody to wait with it."""
        ready = [request for request in self._reading if request.is_ready]
        return ready if ready or self._answering else list(self._reading)[:1]

    def _may_wait(self, batch: list[Request]) -> bool:
        """Whether a batch may go on waiting for its prefix: nobody wants to leave, and nobody else could compute."""
        with self._news:
            every = (*self._reading, *self._arriving)
        return not any(request.cancelled or (request.is_ready and request not in batch) for request in every)

    def _fitting(self, prompts: list[Request]) -> list[Request]:
        """As many of them, in order, as fit beside the answers under way; the first one always does."""
        chosen: list[Request] = []
        num_rows = len(self._answering)
        for request in prompts:
            num_rows += request.generation.num_next
            if chosen and num_rows > MAX_STEP_ROWS:
                break
            chosen.append(request)
        return chosen

    def _draft(self, batch: list[Generation]) -> None:
        """Share out the rows of drafts among the answers under way."""
        answering = [generation for generation in batch if generation.is_answering]
        chances = [generation.draft() for generation in answering]
        num_rows = sum(generation.num_next for generation in batch)
        counts = share_rows(chances, num_rows, self.model.step_cost) if any(chances) else []
        for generation, count in zip(answering, counts, strict=False):
            generation.run_along(count)

    def _run(self, batch: list[Request]) -> list[_Outcome]:
        """Of those that got through the forward. After an error everybody is run alone, so that it hits only those
        whose it is. A forward that waits for its prefix is given up for others, and run again later."""
        generations = [request.generation for request in batch]
        self.num_rows += sum(generation.num_next for generation in generations)
        try:
            with waiting_while(partial(self._may_wait, batch)):
                outcomes = list(zip(batch, choices(generations), strict=True))
        except WaitGivenUp:
            return []
        except Exception as error:
            if len(batch) == 1:
                self._leave(batch[0], error)
                return []
            if not self._shared_fails:  # or the log would have as many as there are tokens
                logger.exception("a step of %d answers failed; each is computed alone", len(batch))
            self._shared_fails = True
            return [outcome for request in batch for outcome in self._run([request])]
        self._shared_fails = self._shared_fails and len(batch) == 1
        return outcomes

    def _postprocess(self, outcomes: list[_Outcome]) -> None:
        """Choose tokens, tell the listeners, let those leave whose answer is whole."""
        for request, chosen in outcomes:
            generation = request.generation
            try:
                if any(piece := generation.advance(chosen)):
                    request.on_piece(piece)
            except Exception as error:  # of a listener, a sampler or a tokenizer: nobody else's business
                self._leave(request, error)
                continue
            if generation.finished:
                self._leave(request)
            elif generation.is_answering and request in self._reading:
                self._reading.remove(request)
                self._answering.append(request)

    def _leave(self, request: Request, error: Exception | None = None) -> None:
        for place in (self._answering, self._reading):
            if request in place:
                place.remove(request)
        request.leave(error)
