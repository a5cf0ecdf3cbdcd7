"""Sessions of a model with recurrent layers: turns, company, answers that are cut off, prefixes that leave memory."""

import pytest
from hybrids import FAMILIES

from cag.engine import Engine
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.model import LanguageModel
from cag_store import Store
from tiny import write_tiny_model

OPTIONS = SamplingOptions(max_tokens=10)


@pytest.fixture(scope="module", params=["qwen3_5_text", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def engine(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hybrid")
    model = LanguageModel.load(
        write_tiny_model(directory / "model", config=FAMILIES[request.param]()), model_id="hybrid"
    )
    model.stop_ids = frozenset()
    (directory / "a.txt").write_text("\n".join(f"The pump number {i} runs at {i * 7} bar." for i in range(30)))
    engine = Engine(model, Store.open(directory / "store"))
    engine.build([directory / "a.txt"], name="pumps")
    return engine


@pytest.fixture
def prefix(engine):
    with engine.open("pumps") as opened:
        yield opened


def told(session, *questions):
    return [session.ask(question, OPTIONS).token_ids for question in questions]


def test_answers_in_company_are_those_alone(prefix):
    questions = ["How?", "Why is pump number 3 at 21 bar? " * 9, "And number 4?", "x"]
    alone = [prefix.ask(question, OPTIONS).token_ids for question in questions]
    assert [answer.token_ids for answer in prefix.ask_all(questions, OPTIONS)] == alone


def test_a_session_owns_states_behind_its_own_tokens_only(prefix):
    session, one = prefix.session(), prefix.model.recurrent.num_bytes
    assert session.recurrent_bytes == 0
    told(session, "How?")
    assert session.recurrent_bytes == one
    pieces = iter(session.stream("And why?", OPTIONS))
    next(pieces)
    assert session.recurrent_bytes == 2 * one  # it may have to go back to where the question began
    assert list(pieces)
    assert session.recurrent_bytes == one


def test_sessions_join_and_leave_between_steps(prefix):
    scheduler = Scheduler(prefix.model)
    alone = [prefix.ask(question, OPTIONS).token_ids for question in ("one", "two", "three")]
    first, second, third = (prefix.session() for _ in range(3))
    one = first.stream("one", OPTIONS)
    asked = one.submit(scheduler, lambda _: None)
    for _ in range(3):
        scheduler.step()
    two, three = second.stream("two", OPTIONS), third.stream("three", OPTIONS)
    also, leaves = two.submit(scheduler, lambda _: None), three.submit(scheduler, lambda _: None)
    for _ in range(4):
        scheduler.step()
    leaves.cancel()
    scheduler.run()
    assert one.finish(asked).token_ids == alone[0] and two.finish(also).token_ids == alone[1]
    assert three.finish(leaves) is None
    assert told(third, "three") == alone[2:]  # as if it had not been asked before


def test_an_error_of_one_leaves_the_others(prefix, monkeypatch):
    """Everybody is run again, each alone: nobody's states may have moved."""
    alone = [prefix.ask(question, OPTIONS).token_ids for question in ("one", "three")]
    scheduler, model = Scheduler(prefix.model), prefix.model
    streams = [prefix.stream(question, OPTIONS) for question in ("one", "three")]
    requests = [stream.submit(scheduler, lambda _: None) for stream in streams]
    run, calls = model._network_forward, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) in (2, 6):  # the second of two forwards in a step, then one of both together
            raise RuntimeError("no memory")
        return run(*arguments)

    monkeypatch.setattr(model, "_network_forward", failing)
    scheduler.run()
    assert [s.finish(r).token_ids for s, r in zip(streams, requests, strict=True)] == alone


@pytest.mark.parametrize("num_pieces", [0, 1, 4])
def test_a_turn_that_is_cut_off_can_be_forgotten(prefix, num_pieces):
    expected = told(prefix.session(), "one", "three")
    session, scheduler = prefix.session(), Scheduler(prefix.model)
    found = told(session, "one")
    stream = session.stream("two", OPTIONS)
    request = stream.submit(scheduler, lambda _: None)
    for _ in range(num_pieces):
        scheduler.step()
    request.cancel()
    scheduler.run()
    assert stream.finish(request) is None
    assert found + told(session, "three") == expected


def test_a_turn_that_is_cut_off_can_be_kept_as_far_as_it_came(prefix):
    session, other = prefix.session(), prefix.session()
    for piece, _ in zip(session.stream("one", OPTIONS), range(4), strict=False):
        assert isinstance(piece, str)
    begun = session._read, session._unread
    short = len(session._read) + len(session._unread) - len(other.stream("one", OPTIONS)._generation.suffix_ids)
    other.ask("one", SamplingOptions(max_tokens=short))
    assert (other._read, other._unread) == begun
    assert told(session, "two") == told(other, "two")


def test_suspended_sessions_go_on(engine):
    with engine.open("pumps") as prefix:
        expected = told(prefix.session(), "one", "two")
        session, fresh = prefix.session(), prefix.session()
        found = told(session, "one")
        session.suspend(), fresh.suspend()
        assert fresh._state.recurrent == {}  # nobody keeps what belongs to the prefix
    with engine.open("pumps") as prefix:
        session.resume(prefix), fresh.resume(prefix)
        assert found + told(session, "two") == expected
        assert told(fresh, "one") == expected[:1]


def test_room_is_asked_for_what_recurrent_layers_know_too(engine):
    asked = []
    with engine.open("pumps", share=False, make_room=lambda manifest, num_bytes: asked.append(num_bytes)) as prefix:
        assert prefix.resident.recurrent
        assert asked == [prefix.resident.num_bytes]


def test_guesses_are_never_run(prefix):
    answer = prefix.ask("The pump number 3 runs", max_tokens=10, speculate=True)
    assert answer.usage.drafted_tokens == 0
    assert answer.token_ids == prefix.ask("The pump number 3 runs", OPTIONS).token_ids
