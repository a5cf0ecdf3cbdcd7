"""Building, reloading and answering on a CUDA device (`make test-gpu`); on a CPU the same in padded steps."""

import gc
import random

import pytest
import torch

from cag.engine import Engine
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.prompt import question_ids

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
WORDS = ["gate", "pump", "who", "ä€", "seven litres", "why not", "4711"]
LONG = "and " * 90  # more than one block


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def engine(request, tiny_model_dir, corpus_dir, tmp_path):
    """A tiny engine in float32 whose sessions run in steps, with two caches; answers do not stop early."""
    engine = Engine.load(str(tiny_model_dir), store=tmp_path / "store", device=request.param, dtype="float32")
    if request.param == "cpu":
        engine.model.run_in_steps(capture=False)
    engine.model.stop_ids = frozenset()
    engine.build([corpus_dir], name="all")
    engine.build([corpus_dir / "alpha.md"], name="alpha", codec="int8")
    return engine


def asked_of(chance):
    words = " ".join(chance.choice(WORDS) for _ in range(chance.choice([1, 3, 9])))
    temperature = chance.choice([0.0, 0.0, 1.5])
    options = SamplingOptions(max_tokens=chance.choice([1, 5, 40]), temperature=temperature, seed=chance.randrange(99))
    return (LONG if chance.random() < 0.1 else "") + words, options


def test_answers_together_are_those_alone(engine):
    """Sessions of two prefixes join and leave; padding, recording and replaying do not show in any answer."""
    chance, scheduler, asked = random.Random(3), Scheduler(engine.model), []
    with engine.open("all") as first, engine.open("alpha") as second:
        for prefix in (first, second):
            prefix.resident.wait()
        left = 30
        while left or scheduler.num_requests:
            for _ in range(min(left, chance.choice([0, 0, 1, 5]))):
                prefix, (question, options) = chance.choice([first, first, second]), asked_of(chance)
                stream = prefix.session().stream(question, options)
                asked.append((prefix, question, options, stream, stream.submit(scheduler, lambda _piece: None)))
                left -= 1
            scheduler.step()
            engine.model.pages.check_integrity([one[3]._session._state.tail.pages for one in asked])
        assert scheduler.largest_batch > 4
        for prefix, question, options, stream, request in asked:
            answer = stream.finish(request)
            assert answer.token_ids == prefix.ask(question, options).token_ids
    if engine.model.device.type == "cuda":
        assert engine.model.replays.refusal is None
        assert engine.model.replays.num_replayed > 50


def test_recorded_steps_give_the_tokens_of_steps_that_are_not(engine):
    with engine.open("all") as prefix:
        questions = ["When does the gate open?", "Who?", "How many litres a minute?"]
        expected = [[answer.token_ids for answer in prefix.ask_all(questions, max_tokens=30)] for _ in range(3)]
        engine.model.replays.forget()
        engine.model.replays._captures = False
        found = [answer.token_ids for answer in prefix.ask_all(questions, max_tokens=30)]
        assert expected == [found] * 3


def test_pages_are_freed_and_sessions_cost_their_tails(engine):
    with engine.open("all") as prefix:
        sessions = [prefix.session() for _ in range(12)]
        for session in sessions:
            session.ask("Who?", SamplingOptions(max_tokens=3))
        pool = engine.model.pages
        held = [session._state.tail.num_bytes for session in sessions]
        assert max(held) <= -(-60 // pool.page_tokens) * pool.page_bytes
        pool.check_integrity([session._state.tail.pages for session in sessions])
        del sessions, session
        gc.collect()
        pool.check_integrity([])
        assert pool.num_free == pool.num_pages - 1  # all but the scratch page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_reloaded_cache_gives_the_logits_of_the_build(tiny_model_dir, corpus_dir, tmp_path):
    engine = Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cuda")
    report = engine.build([corpus_dir], name="a")
    assert report.fidelity.mean_kl == 0
    on_cpu = Engine.load(str(tiny_model_dir), store=tmp_path / "other", device="cpu")
    on_cpu.build([corpus_dir], name="a")
    with engine.open("a") as prefix, on_cpu.open("a") as expected:
        assert prefix.keys_values(0)[0].is_cuda
        suffix = question_ids(engine.model.tokenizer, prefix.template, "When does the gate open?")
        found = engine.model.forward(suffix, engine.model.new_state(prefix.resident), num_logits=0)
        want = on_cpu.model.forward(suffix, on_cpu.model.new_state(expected.resident), num_logits=0)
        assert (found.cpu() - want).abs().max() < 1e-2 * want.abs().max()
        assert prefix.ask("When does the gate open?", max_tokens=4).usage.cached_tokens == report.num_tokens
