"""The steps of a first question and of its answer, run and recorded before anybody asks.

A step of a size that was not there before runs operator by operator and may compile kernels; the second one is
recorded. Where nothing is recorded, on a CPU say, there is nothing to do.
"""

from __future__ import annotations

from cag.forward.replays import MIN_PAGES, MIN_QUESTION_ROWS, ROWS
from cag.forward.state import SequenceState
from cag.model import LanguageModel
from cag.residency.resident import ResidentPrefix

MAX_QUESTION_ROWS = 64
TAIL_PAGES = (16, 8, MIN_PAGES)  # of a session, the most first: a pool that grows forgets what was recorded before


def record_first_steps(model: LanguageModel, prefix: ResidentPrefix) -> None:
    """Tokens of one answer, and questions of up to `MAX_QUESTION_ROWS` tokens. Waits for the prefix.

    Raises:
        StoreError: what went wrong while loading the prefix.
    """
    prefix.wait()
    if model.replays is None or not model.replays.records:
        return
    room = model.window_tokens - prefix.num_tokens
    for num_tokens in (num_pages * model.pages.page_tokens for num_pages in TAIL_PAGES):
        if num_tokens <= room:
            state = model.new_session_state(prefix)
            model.forward([0] * (num_tokens - 2), state)
            _run_twice(model, state, 1)
    for rows in ROWS:
        if MIN_QUESTION_ROWS <= rows <= min(room, MAX_QUESTION_ROWS):
            _run_twice(model, model.new_session_state(prefix), rows)


def _run_twice(model: LanguageModel, state: SequenceState, rows: int) -> None:
    for _ in range(2):
        model.forward([0] * rows, state)
        state.rewind(state.num_tail - rows)
