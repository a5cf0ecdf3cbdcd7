"""Drafts change when tokens come, and nothing else: the tokens, text, usage and state of single steps."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from test_scheduler import APART, CONFIGS, KINDS, SHARED, engine_of, play
from transformers import MistralConfig

from cag.engine import Engine
from cag.forward.step_cost import ARITHMETIC, SHARED_READING
from cag.generation.generate import Generation, SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.generation.speculation import MAX_DRAFT_TOKENS, ROW_COUNTS, Drafter, share_rows
from cag.home import cag_home as user_home
from cag.ngrams import NgramIndex

USER_HOME = user_home()
HANDBOOK = Path(__file__).parents[3] / "examples" / "handbook"


class Copying:
    """A drafter that knows the answer, and is wrong in every `wrong_every`-th place."""

    def __init__(self, answer, wrong_every=None):
        self.answer, self.wrong_every, self.done = list(answer), wrong_every, 0

    def append(self, _token):
        self.done += 1

    def guess(self, limit):
        places = range(self.done, min(self.done + limit, len(self.answer)))
        return [self.answer[p] if not self._wrong(p) else (self.answer[p] + 1) % 250 for p in places]

    def chances(self):
        return [0.99**place for place in range(MAX_DRAFT_TOKENS)]

    def _wrong(self, place):
        return self.wrong_every is not None and place % self.wrong_every == self.wrong_every - 1


@pytest.fixture
def engine(tmp_path, monkeypatch):
    return engine_of(APART, CONFIGS["llama"](), tmp_path, monkeypatch)


def generation(prefix, question, options, drafter=None):
    """An answer in the making in a session of its own, its drafts those of `drafter`."""
    stream = prefix.session().stream(question, options)
    stream._generation.drafter = drafter
    return stream._generation


def facts(made):
    """All that single steps leave behind, times aside."""
    return made.token_ids, made.text, made.finish_reason, made.state.num_tail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_drafts_of_any_quality_leave_the_answer_as_it_is(kind, architecture, tmp_path, monkeypatch):
    """Over the architectures each codec meets each quality, and each architecture too."""
    engine = engine_of(kind, CONFIGS[architecture](), tmp_path, monkeypatch)
    engine.model.stop_ids = frozenset()
    options = SamplingOptions(max_tokens=70, speculate=True)
    qualities, is_odd = [(None, 2, 7), (1, 3)], list(CONFIGS).index(architecture) % 2
    for number, name in enumerate(("alpha-lossless", "beta-int8")):
        with engine.open(name) as prefix:
            alone = generation(prefix, "Who?", options).run()
            for wrong_every in qualities[number ^ is_odd]:
                drafted = generation(prefix, "Who?", options, Copying(alone.token_ids, wrong_every)).run()
                assert facts(drafted) == facts(alone)
                assert drafted.drafted_tokens > 10
                assert (drafted.accepted_tokens == 0) == (wrong_every == 1)
                assert (drafted.accepted_tokens == drafted.drafted_tokens) == (wrong_every is None)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_answers_in_company_are_those_without_drafts(architecture, tmp_path, monkeypatch):
    """Joins, leaves and cancellations; the pool is whole after every step (`play`)."""
    kind = APART if architecture in ("llama", "qwen3") else "float32"
    engine = engine_of(kind, CONFIGS[architecture](), tmp_path, monkeypatch)
    engine.model.stop_ids = frozenset()
    monkeypatch.setattr("test_scheduler.SamplingOptions", lambda **given: SamplingOptions(speculate=True, **given))
    asked = play(engine, random.Random(architecture), 16)[1]
    drafted = 0
    for prefix, question, options, stream, request in asked:
        answer = stream.finish(request)
        if answer is not None:
            alone = prefix.ask(
                question, SamplingOptions(options.max_tokens, options.temperature, seed=options.seed, speculate=False)
            )
            assert (answer.token_ids, answer.text, answer.usage) == (alone.token_ids, alone.text, alone.usage)
            assert alone.usage.drafted_tokens == 0
            drafted += answer.usage.drafted_tokens
    assert drafted > 20


def test_sampled_answers_are_those_of_the_same_seed(engine):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        for seed in range(6):
            options = SamplingOptions(max_tokens=40, temperature=0.7, top_p=0.9, seed=seed, speculate=True)
            alone = generation(prefix, "Who?", options).run()
            drafted = generation(prefix, "Who?", options, Copying(alone.token_ids, 4)).run()
            assert facts(drafted) == facts(alone)
            assert 0 < drafted.accepted_tokens < drafted.drafted_tokens


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 9, 20])
def test_the_limit_of_tokens_cuts_inside_of_a_draft(engine, max_tokens):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        whole = generation(prefix, "Who?", SamplingOptions(max_tokens=60)).run()
        options = SamplingOptions(max_tokens=max_tokens, speculate=True)
        drafted = generation(prefix, "Who?", options, Copying(whole.token_ids)).run()
        assert drafted.token_ids == whole.token_ids[:max_tokens]
        assert facts(drafted) == facts(generation(prefix, "Who?", options).run())


def test_stop_tokens_and_stop_strings_cut_inside_of_a_draft(engine):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        whole = generation(prefix, "Who?", SamplingOptions(max_tokens=60)).run()
        for place in (1, 5, 8, 13, 30):
            token = whole.token_ids[place]
            engine.model.stop_ids = frozenset({token})
            single, drafted = (
                generation(prefix, "Who?", SamplingOptions(max_tokens=60, speculate=True), drafter).run()
                for drafter in (None, Copying(whole.token_ids))
            )
            assert facts(drafted) == facts(single)
            assert drafted.finish_reason == "stop"
            assert drafted.token_ids == whole.token_ids[: whole.token_ids.index(token)]
            engine.model.stop_ids = frozenset()
            stop = whole.text[place : place + 3]
            options = SamplingOptions(max_tokens=60, stop=(stop,), speculate=True)
            made = generation(prefix, "Who?", options, Copying(whole.token_ids))
            pieces = list(made)
            assert facts(made) == facts(generation(prefix, "Who?", options).run())
            assert "".join(pieces) == made.text == whole.text[: whole.text.index(stop)]


def test_the_window_of_the_model_is_kept(engine):
    engine.model.stop_ids = frozenset()
    engine.model.network.config.max_position_embeddings = 790
    with engine.open("beta-lossless") as prefix:
        made = [
            generation(prefix, "Who?", SamplingOptions(max_tokens=400, speculate=True), drafter).run()
            for drafter in (None, Drafter(lambda: prefix.resident.ngrams, []))
        ]
        assert facts(made[0]) == facts(made[1])
        assert made[0].state.num_tokens <= 790
        assert made[0].max_tokens == len(made[0].token_ids) < 400


def test_an_answer_and_its_turns_are_the_same_with_drafts_and_without(engine):
    """Sessions go on behind what drafts have left in the tail; what was guessed is said in the usage and only there."""
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        sessions = prefix.session(), prefix.session()
        for question in ("Who?", "The beta pump", "And then?"):
            plain, drafted = (
                session.ask(question, SamplingOptions(max_tokens=50, speculate=speculate))
                for session, speculate in zip(sessions, (False, True), strict=True)
            )
            assert (plain.token_ids, plain.text, plain.usage) == (drafted.token_ids, drafted.text, drafted.usage)
            assert plain.usage.drafted_tokens == plain.usage.accepted_tokens == 0
            assert drafted.usage.drafted_tokens >= drafted.usage.accepted_tokens
        assert sessions[0]._state.num_tail == sessions[1]._state.num_tail
        assert sessions[1]._read == sessions[0]._read
        assert len(sessions[1]._read) == sessions[1]._state.num_tail
        assert drafted.usage.drafted_tokens > 0


def test_who_is_interrupted_before_a_draft_was_judged_can_go_on(engine, monkeypatch):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        options = SamplingOptions(max_tokens=40, speculate=True)
        whole = prefix.session().ask("Who?", options)
        session = prefix.session()
        stream = session.stream("Who?", options)
        stream._generation.drafter = Copying(whole.token_ids)
        judge = Generation._take_while_drafted

        def interrupted(self, chosen):
            if len(self.token_ids) > 3:
                raise KeyboardInterrupt
            return judge(self, chosen)

        monkeypatch.setattr(Generation, "_take_while_drafted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        monkeypatch.undo()
        other = prefix.session()
        cut = SamplingOptions(max_tokens=len(stream._generation.token_ids), speculate=False)
        assert other.ask("Who?", cut).token_ids == tuple(stream._generation.token_ids)
        assert session.ask("And?", options).token_ids == other.ask("And?", options).token_ids


def test_a_cancelled_answer_gives_all_its_pages_back(engine):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        scheduler, options = Scheduler(engine.model), SamplingOptions(max_tokens=90, speculate=True)
        whole = prefix.ask("Who?", options).token_ids
        stream = prefix.session().stream("Who?", options)
        stream._generation.drafter = Copying(whole)
        request = stream.submit(scheduler, lambda _piece: None)
        for _ in range(4):
            scheduler.step()
        assert stream._generation.accepted_tokens > 20
        request.cancel()
        scheduler.run()
        assert stream.finish(request) is None
        del stream, request
        engine.model.pages.check_integrity([])


def test_an_error_in_the_midst_of_a_draft_leaves_a_state_of_single_steps(engine):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        options = SamplingOptions(max_tokens=60, speculate=True)
        whole = generation(prefix, "Who?", options).run()
        made = generation(prefix, "Who?", options, Copying(whole.token_ids))
        chosen = iter(whole.token_ids)

        def failing(_logits):
            if len(made.token_ids) == 20:
                raise ArithmeticError("no number")
            return next(chosen)

        made.sampler = type("Sampler", (), {"greedy": False, "__call__": staticmethod(failing)})()
        with pytest.raises(ArithmeticError):
            made.run()
        assert len(made.token_ids) == 20
        assert made.state.num_tail - len(made.suffix_ids) in (19, 20)  # the last token was run, or will be


def test_no_drafts_where_a_row_may_round_otherwise(tmp_path, monkeypatch):
    """Unless they are asked for."""
    engine = engine_of("float32", CONFIGS["llama"](), tmp_path, monkeypatch)
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        for speculate, any_drafts in ((None, False), (False, False), (True, True)):
            answer = prefix.ask("The beta pump", max_tokens=40, speculate=speculate)
            assert bool(answer.usage.drafted_tokens) == any_drafts


@pytest.mark.skipif(APART == "float32", reason="no products of bfloat16")
def test_drafts_cross_the_end_of_a_window(tmp_path, monkeypatch):
    """Where the first tokens of the prefix begin to be hidden, rows of a step see different ones."""
    engine = engine_of(APART, MistralConfig(**SHARED, sliding_window=760), tmp_path, monkeypatch)
    model = engine.model
    model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        left = 760 - prefix.resident.num_tokens
        options = SamplingOptions(max_tokens=left + 40)
        alone = generation(prefix, "W", options).run()
        drafted = generation(prefix, "W", options, Copying(alone.token_ids)).run()
        assert facts(drafted) == facts(alone)
        assert drafted.state.num_tokens > 760 + 20
        assert drafted.drafted_tokens > left


def test_rows_of_long_tails_are_few(engine):
    """Several rows see a long tail as a segment, with other bits than a single one."""
    with engine.open("alpha-lossless") as prefix:
        state = engine.model.new_session_state(prefix.resident)
        for num_tail, most in ((16, 128), (512, 128), (1024, 64), (4000, 16), (32769, 1), (70000, 1)):
            state.num_tail = num_tail
            assert engine.model.most_rows(state, exactly=False) == most


def test_steps_have_few_numbers_of_rows(engine, monkeypatch):
    engine.model.stop_ids = frozenset()
    with engine.open("beta-lossless") as prefix:
        scheduler, sizes = Scheduler(engine.model), set()
        forward = engine.model.choose_together

        def counted(chunks, **more):
            if all(len(tokens) <= MAX_DRAFT_TOKENS + 1 for tokens, _ in chunks):
                sizes.add((len(chunks), sum(len(tokens) for tokens, _ in chunks)))
            return forward(chunks, **more)

        monkeypatch.setattr(engine.model, "choose_together", counted)
        options = SamplingOptions(max_tokens=50, speculate=True)
        streams = [prefix.session().stream("The beta pump " * (4 + i), options) for i in range(3)]
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
        scheduler.run()
        assert all(request.error is None for request in requests)
    assert {size for _, size in sizes} <= {1, 2, 3, *ROW_COUNTS}
    assert any(size > count for count, size in sizes)


def test_rows_go_to_the_likeliest_tokens():
    assert share_rows([], 3) == []
    assert share_rows([[]], 1) == [0]
    assert share_rows([[0.9] * 15], 1) == [15]
    assert share_rows([[0.9, 0.9, 0.9]], 1) == [2]  # a step has 1, 2, 3, 5, ... rows
    assert share_rows([[0.02, 0.01]], 1) == [0]  # not worth a row
    assert share_rows([[0.9] * 15, [0.1]], 2) == [14, 0]
    assert sum(share_rows([[0.9] * 15] * 16, 16)) == 48
    assert share_rows([[0.2] * 15] * 16, 16) == [0] * 16  # a row that costs the same brings too little there
    assert share_rows([[0.2] * 15], 1) != [0]
    assert share_rows([[0.9] * 15] * 2, 100) == [0, 0]
    assert share_rows([[0.2] * 2], 1) == [2]
    assert share_rows([[0.2] * 2], 1, ARITHMETIC[16]) == [0]  # a second token costs more there than it brings
    assert share_rows([[0.2] * 2] * 2, 2, ARITHMETIC[16]) == [1, 2]  # where there are several anyway
    falling = [0.8**place for place in range(1, 16)]
    assert [share_rows([falling], 1, ARITHMETIC[lanes]) for lanes in (8, 16)] == [[4], [9]]


@pytest.mark.parametrize("cost", [SHARED_READING, *ARITHMETIC.values()])
def test_rows_are_those_with_most_tokens_for_the_time(cost):
    chance = random.Random(4)
    for _ in range(200):
        chances = [
            sorted((chance.random() for _ in range(chance.choice([0, 1, 5, 15]))), reverse=True)
            for _ in range(chance.choice([1, 2, 7]))
        ]
        counts, num_rows = share_rows(chances, len(chances), cost), len(chances)
        likely = sorted((one for of_one in chances for one in of_one), reverse=True)
        sizes = [size for size in (num_rows, *ROW_COUNTS) if 0 <= size - num_rows <= len(likely)]
        rates = {s: (num_rows + sum(likely[: s - num_rows])) / cost.of(s) for s in sizes}
        assert rates[num_rows + sum(counts)] == pytest.approx(max(rates.values()))
        assert all(count <= len(of_one) for count, of_one in zip(counts, chances, strict=True))


def test_a_drafter_learns_from_guesses_that_were_never_run():
    """Wrong ones make the chances sink until no row is spent; right ones bring them back."""
    corpus = np.array([1, 2, 3, 4, 5, 6, 7, 8] * 4)
    drafter = Drafter(lambda: NgramIndex(corpus), [50])
    for token in range(100, 300):
        for one in (2, token):
            drafter.append(one)
            drafter.guess(15)
    drafter.append(2)
    assert drafter.guess(15)
    assert share_rows([drafter.chances()], 1) == [0]
    for token in (3, 4, 5, 6, 7, 8, 1) * 6:
        drafter.append(token)
        drafter.guess(15)
    assert sum(share_rows([drafter.chances()], 1)) >= 9


def test_own_words_come_before_equally_long_ones_of_the_corpus():
    drafter = Drafter(lambda: NgramIndex(np.array([1, 2, 3, 4, 5])), [2, 3, 70])
    drafter.append(2)
    drafter.append(3)
    assert drafter.guess(2) == [70, 2]
    longer = Drafter(lambda: NgramIndex(np.array([1, 2, 3, 4, 5])), [2, 3, 70, 1])
    longer.append(2)
    longer.append(3)
    assert longer.guess(9) == [4, 5]


def test_the_index_is_made_once_a_resident_prefix(engine):
    with engine.open("beta-lossless") as one, engine.open("beta-lossless") as other:
        assert one.resident.ngrams is other.resident.ngrams
        assert one.resident.ngrams.token_ids.tolist() == one.token_ids.tolist()


@pytest.fixture
def real_home(monkeypatch):
    """The user's own home: the models are there, or are pulled there."""
    monkeypatch.setenv("CAG_HOME", str(USER_HOME))
    monkeypatch.delenv("CAG_THREADS", raising=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_answers_about_the_handbook_are_the_same(codec, tmp_path, real_home):
    """All 30 questions and the same asked for quotes, one by one and 16 at once."""
    engine = Engine.load("smollm2-135m-instruct", store=tmp_path / "store")
    engine.build([HANDBOOK / "docs"], name="handbook", codec=codec)
    lines = (HANDBOOK / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    questions += [f"{question} Quote the sentences that say so, word for word." for question in questions]
    with engine.open("handbook") as prefix:
        begin = time.perf_counter()
        plain = prefix.ask_all(questions, max_tokens=64, speculate=False)
        for start in range(0, len(questions), 16):
            for answer, alone in zip(
                prefix.ask_all(questions[start : start + 16], max_tokens=64, speculate=True),
                plain[start : start + 16],
                strict=True,
            ):
                assert (answer.token_ids, answer.text, answer.usage) == (alone.token_ids, alone.text, alone.usage)
        drafted = [prefix.ask(question, max_tokens=64, speculate=True) for question in questions]
        assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
        accepted = sum(answer.usage.accepted_tokens for answer in drafted)
        total = sum(answer.usage.completion_tokens for answer in drafted)
        print(f"{accepted} of {total} tokens were guessed; {time.perf_counter() - begin:.0f} s")
        assert accepted > total / 3
