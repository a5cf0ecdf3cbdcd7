"""A session that lets go of its prefix and goes on, and answers that were cut off."""

import pytest

from cag.errors import UsageError
from cag.forward.pages import PAGE_TOKENS
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Scheduler

SHORT = SamplingOptions(max_tokens=5)
QUESTIONS = ["When does the alpha gate open?", "Why?", "Who checks the valves?"]


@pytest.fixture
def built(tiny_engine, corpus_dir):
    tiny_engine.build([corpus_dir], name="handbook")
    return tiny_engine


def test_a_session_goes_on_behind_the_cache_opened_again(built, corpus_dir):
    with built.open("handbook") as prefix:
        expected = prefix.session()
        answers = [expected.ask(question, SHORT).token_ids for question in QUESTIONS]
        session = prefix.session()
        found = [session.ask(QUESTIONS[0], SHORT).token_ids]
        session.suspend()
        with pytest.raises(UsageError, match="suspended"):
            session.ask(QUESTIONS[1], SHORT)
    version = prefix.manifest
    (corpus_dir / "omega.txt").write_text("Another text.\n")
    built.update("handbook", [corpus_dir])
    with built.open("handbook") as other:
        for wrong in (other, "handbook", None):
            with pytest.raises(UsageError, match="version"):
                session.resume(wrong)
    with built.open("handbook", version=version) as again:
        assert again.digest == prefix.digest
        assert again.resident is not prefix.resident
        for question in QUESTIONS[1:]:
            session.resume(again)
            cached = session.num_cached_tokens
            answer = session.ask(question, SHORT)
            assert answer.usage.cached_tokens == cached > prefix.resident.num_tokens
            found.append(answer.token_ids)
            session.suspend()
    assert found == answers
    assert session.turns == expected.turns


@pytest.mark.parametrize("num_steps", range(5))
def test_a_submitted_answer_that_is_cut_off_was_never_asked(built, num_steps):
    with built.open("handbook") as prefix:
        session, expected = prefix.session(), prefix.session()
        for number, question in enumerate(QUESTIONS):
            scheduler = Scheduler(built.model)
            stream = session.stream("Where to and what for?", SamplingOptions(max_tokens=50))
            request = stream.submit(scheduler, lambda _piece: None)
            with pytest.raises(UsageError, match="still running"):
                session.suspend()
            for _ in range(num_steps):
                scheduler.step()
            request.cancel()
            scheduler.run()
            assert stream.finish(request) is None
            assert (len(session.turns), session.num_cached_tokens) == (number, expected.num_cached_tokens)
            assert session.ask(question, SHORT).token_ids == expected.ask(question, SHORT).token_ids


def test_an_idle_session_has_the_pages_of_its_tail_only(built):
    with built.open("handbook") as prefix:
        session = prefix.session()
        session.ask(QUESTIONS[0], SHORT)
        stream = session.stream("long " * 40, SHORT)
        scheduler = Scheduler(built.model)
        request = stream.submit(scheduler, lambda _piece: None)
        scheduler.step()
        request.cancel()
        scheduler.run()
        stream.finish(request)
        session.suspend()
        tail = session._state.tail
        assert len(tail.pages) == -(-session._state.num_tail // PAGE_TOKENS)
        built.model.pages.check_integrity([tail.pages])
        session.close()
        session.close()
        built.model.pages.check_integrity([])
