"""The measuring loop: for each question all arms, in an order drawn anew for each question, so that drift hits all.

Arms and questions in, samples out. A sample holds raw seconds and counts; nothing is averaged here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cag.errors import RequestTooLong
from cag.generation.generate import SamplingOptions
from cag_bench.arm_names import FULL_PREFILL
from cag_bench.arms import ArmAnswer, BenchArm
from cag_bench.provenance import load_average
from cag_bench.questions import Question
from cag_bench.text_metrics import containment, exact_match, rouge_l, token_f1

WARM_UP_TOKENS = 2  # the first token and one behind it run all code that a longer answer runs


@dataclass(frozen=True)
class Sample:
    """One question answered by one arm.

    Seconds end in `_s`; `tpot_s` is None when no second token was computed. `position` is the arm's place among the
    arms of the question, from 0. Scores are None for questions without accepted `answers`. What only RAG arms have
    (`retrieved_*`, `gold_retrieved`: all gold documents are among them) and only `cag-disk` has is None elsewhere.
    """

    arm: str
    question_index: int
    position: int
    qid: str
    question: str
    answer: str
    finish_reason: str
    retrieve_s: float
    load_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float | None
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    em: float | None
    f1: float | None
    rouge_l: float | None
    containment: float | None
    answers: tuple[str, ...]
    retrieved_doc_ids: tuple[str, ...] | None
    retrieved_passage_ids: tuple[str, ...] | None
    gold_retrieved: bool | None
    page_cache_dropped: bool | None
    read_s: float | None
    load_average: tuple[float, ...]
    measured_at: float

    def to_json(self) -> dict[str, Any]:
        """The sample's part of a row."""
        return asdict(self)


@dataclass(frozen=True)
class Refused:
    """A question that left an arm no room in the model's window, in place of its sample."""

    arm: str
    question_index: int
    position: int
    qid: str
    question: str
    error: str


@dataclass(frozen=True)
class MeasurePlan:
    """How the loop runs. `full_n` limits `full-prefill` to the first questions; `warmed_up` arms need no warm-up."""

    sampling: SamplingOptions
    seed: int
    full_n: int | None = None
    warmed_up: frozenset[str] = frozenset()


def arm_order(names: Sequence[str], question_index: int, plan: MeasurePlan) -> list[str]:
    """The arms that answer question `question_index`, in the order drawn for it from the seed."""
    limit = plan.full_n
    chosen = [name for name in names if name != FULL_PREFILL or limit is None or question_index < limit]
    random.Random(f"{plan.seed}/{question_index}").shuffle(chosen)
    return chosen


def num_samples(names: Sequence[str], num_questions: int, plan: MeasurePlan) -> int:
    """Samples that the loop will take."""
    return sum(len(arm_order(names, index, plan)) for index in range(num_questions))


def warm_up(arms: Sequence[BenchArm], questions: Sequence[Question], plan: MeasurePlan) -> list[str]:
    """Let each arm that is not warm already answer the first of `questions` that leaves it room, uncounted; returns the
    names of these arms. Raises: `RequestTooLong` for an arm that none leaves room."""
    cold = [arm for arm in arms if arm.name not in plan.warmed_up]
    sampling = replace(plan.sampling, max_tokens=min(plan.sampling.max_tokens, WARM_UP_TOKENS))
    for arm in cold:
        _ask_first(arm, questions, sampling)
    return [arm.name for arm in cold]


def _ask_first(arm: BenchArm, questions: Sequence[Question], sampling: SamplingOptions) -> None:
    for place, question in enumerate(questions, start=1):
        try:
            arm.ask(question.question, sampling)
            return
        except RequestTooLong:
            if place == len(questions):
                raise


def measure(
    arms: Sequence[BenchArm],
    questions: Sequence[Question],
    plan: MeasurePlan,
    on_sample: Callable[[Sample], None],
    on_refused: Callable[[Refused], None],
) -> list[Sample]:
    """Ask every question of every arm. `on_sample` gets each sample as soon as it is there, `on_refused` each question
    that leaves an arm no room in the model's window: the arm has no sample of it, and the others go on.

    Raises: `RequestTooLong` when no question left any arm room.
    """
    by_name = {arm.name: arm for arm in arms}
    samples: list[Sample] = []
    refusal: RequestTooLong | None = None
    for index, question in enumerate(questions):
        for position, name in enumerate(arm_order(list(by_name), index, plan)):
            try:
                answered = by_name[name].ask(question.question, plan.sampling)
            except RequestTooLong as error:
                refusal = error
                on_refused(Refused(name, index, position, question.qid, question.question, str(error)))
                continue
            samples.append(to_sample(name, index, position, question, answered))
            on_sample(samples[-1])
    if refusal is not None and not samples:
        raise refusal
    return samples


def to_sample(arm: str, index: int, position: int, question: Question, answered: ArmAnswer) -> Sample:
    """Score an answer and put it beside its times and counts."""
    answer, timings, usage = answered.answer, answered.answer.timings, answered.answer.usage
    return Sample(
        arm=arm,
        question_index=index,
        position=position,
        qid=question.qid,
        question=question.question,
        answer=answer.text,
        finish_reason=answer.finish_reason,
        retrieve_s=timings.retrieve_s,
        load_s=timings.load_s,
        prefill_s=timings.prefill_s,
        ttft_s=timings.ttft_s,
        tpot_s=timings.tpot_s or None,
        total_s=timings.total_s,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        computed_tokens=usage.computed_tokens,
        completion_tokens=usage.completion_tokens,
        **_scores(answer.text, question),
        answers=question.answers,
        **_retrieved(answered, question),
        page_cache_dropped=answered.page_cache_dropped,
        read_s=answered.read_s,
        load_average=tuple(load_average()),
        measured_at=time.time(),
    )


def _scores(text: str, question: Question) -> dict[str, Any]:
    if not question.answers:
        return dict.fromkeys(("em", "f1", "rouge_l", "containment"))
    metrics = {"em": exact_match, "f1": token_f1, "rouge_l": rouge_l}
    scores = {name: metric(text, question.answers) for name, metric in metrics.items()}
    return {**scores, "containment": containment(text, question.answers, question.all_of)}


def _retrieved(answered: ArmAnswer, question: Question) -> dict[str, Any]:
    if answered.passages is None:
        return {"retrieved_doc_ids": None, "retrieved_passage_ids": None, "gold_retrieved": None}
    doc_ids = tuple(dict.fromkeys(passage.doc_id for passage in answered.passages))
    return {
        "retrieved_doc_ids": doc_ids,
        "retrieved_passage_ids": tuple(passage.passage_id for passage in answered.passages),
        "gold_retrieved": set(question.doc_ids) <= set(doc_ids) if question.doc_ids else None,
    }
