from __future__ import annotations

from collections import Counter

import pytest

from cag.errors import RequestTooLong
from cag.generation.answer import Answer, CacheOrigin, Timings, Usage
from cag.generation.generate import SamplingOptions
from cag.retrieval import Passage
from cag_bench.arms import ArmAnswer, BenchArm
from cag_bench.arms.cached import check_usage
from cag_bench.errors import PrefixRecomputed
from cag_bench.measure import MeasurePlan, arm_order, measure, num_samples, to_sample, warm_up
from cag_bench.questions import Question

NAMES = ["cag-hot", "cag-disk", "full-prefill", "rag-bm25@3"]
PLAN = MeasurePlan(SamplingOptions(max_tokens=4), seed=0)


def an_answer(text="green", tpot_s=0.02):
    timings = Timings(load_s=0.1, prefill_s=0.2, ttft_s=0.4, tpot_s=tpot_s, total_s=0.5, retrieve_s=0.03)
    return Answer(text, (), Usage(110, 100, 10, 2), timings, CacheOrigin("c", "d", "disk"), "tiny")


class CountingArm(BenchArm):
    """Answers at once and remembers what it was asked."""

    def __init__(self, name, log):
        super().__init__(name)
        self.log = log

    def ask(self, question, options):
        self.log.append((self.name, question))
        self.max_tokens = options.max_tokens
        return ArmAnswer(an_answer())


class NarrowArm(CountingArm):
    """One that some questions leave no room."""

    def __init__(self, name, log, too_long):
        super().__init__(name, log)
        self.too_long = too_long

    def ask(self, question, options):
        if question in self.too_long:
            raise RequestTooLong("no room.")
        return super().ask(question, options)


def questions(count):
    return [Question(f"q{i}", f"Question {i}?", ("green",), (), ()) for i in range(count)]


def test_each_question_is_asked_of_every_arm_once_in_an_order_of_its_own():
    orders = [arm_order(NAMES, index, PLAN) for index in range(200)]
    assert all(sorted(order) == sorted(NAMES) for order in orders)
    firsts = Counter(order[0] for order in orders)
    assert all(firsts[name] > 25 for name in NAMES)
    assert orders == [arm_order(NAMES, index, PLAN) for index in range(200)]
    other = MeasurePlan(PLAN.sampling, seed=1)
    assert orders != [arm_order(NAMES, index, other) for index in range(200)]


def test_full_n_limits_only_full_prefill_and_only_to_the_first_questions():
    plan = MeasurePlan(PLAN.sampling, seed=0, full_n=2)
    has_full = ["full-prefill" in arm_order(NAMES, index, plan) for index in range(5)]
    assert has_full == [True, True, False, False, False]
    assert num_samples(NAMES, 5, plan) == 17


def test_the_loop_interleaves_and_hands_over_every_sample():
    log, seen = [], []
    arms = [CountingArm(name, log) for name in NAMES]
    samples = measure(arms, questions(3), PLAN, seen.append, seen.append)
    assert seen == samples
    assert [question for _, question in log] == [f"Question {i}?" for i in range(3) for _ in NAMES]
    assert [name for name, _ in log] == [name for i in range(3) for name in arm_order(NAMES, i, PLAN)]
    assert [(sample.arm, sample.position) for sample in samples[:4]] == [
        (name, position) for position, name in enumerate(arm_order(NAMES, 0, PLAN))
    ]


def test_warm_up_leaves_out_what_is_warm():
    log = []
    plan = MeasurePlan(PLAN.sampling, 0, warmed_up=frozenset({"full-prefill"}))
    arms = [CountingArm(name, log) for name in NAMES]
    names = warm_up(arms, questions(2), plan)
    assert names == [name for name, _ in log] == ["cag-hot", "cag-disk", "rag-bm25@3"]
    assert arms[0].max_tokens == 2


def test_a_question_that_leaves_an_arm_no_room_is_no_sample_of_it_and_stops_nobody():
    refused = []
    arms = [CountingArm("cag-hot", []), NarrowArm("rag-bm25@3", [], {"Question 1?"})]
    samples = measure(arms, questions(3), PLAN, lambda _: None, refused.append)
    assert Counter(sample.arm for sample in samples) == {"cag-hot": 3, "rag-bm25@3": 2}
    (one,) = refused
    assert (one.arm, one.question_index, one.qid, one.error) == ("rag-bm25@3", 1, "q1", "no room.")
    assert one.position == arm_order(["cag-hot", "rag-bm25@3"], 1, PLAN).index("rag-bm25@3")


def test_questions_that_leave_no_arm_room_are_an_error():
    arm = NarrowArm("rag-bm25@3", [], {"Question 0?", "Question 1?"})
    with pytest.raises(RequestTooLong):
        measure([arm], questions(2), PLAN, lambda _: None, lambda _: None)
    with pytest.raises(RequestTooLong):
        warm_up([arm], questions(2), PLAN)
    assert warm_up([arm], questions(3), PLAN) == ["rag-bm25@3"]
    assert arm.log == [("rag-bm25@3", "Question 2?")]


def test_a_sample_holds_every_time_and_score():
    sample = to_sample("cag-disk", 4, 1, Question("q", "?", ("green paint",), (), ()), ArmAnswer(an_answer(), True))
    times = (sample.retrieve_s, sample.load_s, sample.prefill_s, sample.ttft_s, sample.tpot_s, sample.total_s)
    assert times == (0.03, 0.1, 0.2, 0.4, 0.02, 0.5)
    assert (sample.em, sample.f1, sample.containment) == (0.0, pytest.approx(2 / 3), 0.0)
    assert (sample.prompt_tokens, sample.cached_tokens, sample.computed_tokens) == (110, 100, 10)
    assert sample.page_cache_dropped is True
    assert sample.retrieved_doc_ids is None
    assert sample.gold_retrieved is None


def test_an_unanswerable_question_is_not_scored_and_a_single_token_has_no_tpot():
    answered = ArmAnswer(an_answer(tpot_s=0.0))
    sample = to_sample("cag-hot", 0, 0, Question("q", "?", (), (), ()), answered)
    assert (sample.em, sample.f1, sample.rouge_l, sample.containment, sample.tpot_s) == (None,) * 5


@pytest.mark.parametrize(("gold", "found"), [(("a",), True), (("a", "b"), True), (("a", "c"), False), ((), None)])
def test_gold_counts_as_retrieved_when_every_gold_document_is_there(gold, found):
    passages = tuple(Passage(f"{doc}#{i}", doc, "", "text", 0, 4) for i, doc in enumerate(["a", "b", "a"]))
    sample = to_sample("rag-bm25@3", 0, 0, Question("q", "?", ("x",), gold, ()), ArmAnswer(an_answer(), None, passages))
    assert sample.gold_retrieved is found
    assert sample.retrieved_doc_ids == ("a", "b")
    assert sample.retrieved_passage_ids == ("a#0", "b#1", "a#2")


def test_counts_of_a_cache_are_accepted():
    check_usage("cag-hot", Usage(110, 100, 10, 5), prefix_tokens=100, question_tokens=10)


@pytest.mark.parametrize("counts", [(110, 0, 110), (110, 99, 11), (110, 100, 9), (120, 100, 10)])
def test_a_recomputed_prefix_or_wrong_counts_refuse_the_run(counts):
    usage = Usage(*counts, completion_tokens=5)
    with pytest.raises(PrefixRecomputed, match="expected 110 prompt tokens, 100 of them cached"):
        check_usage("cag-hot", usage, prefix_tokens=100, question_tokens=10)
