"""The search over the ladder: what it takes, what it leaves, and in how many trials."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cag.building.fidelity import Fidelity
from cag.building.ladder import (
    CLOSE_TO_BOUND,
    MAX_STEP_TRIALS,
    NARROW_STEPS,
    CodecChoice,
    Rung,
    Trial,
    choose,
    describe_codec,
    next_step,
)

FIRST, LAST = -576, -320
STEPPED = Rung({"id": "transform", "step": -520}, (FIRST, LAST))
LOSSLESS = Trial({"id": "lossless"}, 1_000_000, 0, Fidelity(0.0, 0.0, 1.0, 256, 0.0, {}, "bits"), "within")


class Codecs:
    """Codecs given by size and KL. `transform` has both as functions of its step."""

    def __init__(self, max_kl, codecs=(), kl_at_520=0.004, slope=2 / 64):
        self.max_kl = max_kl
        self.codecs = dict(codecs)
        self.kl_at_520 = kl_at_520
        self.slope = slope
        self.tried = []

    def facts(self, codec):
        if codec["id"] != "transform":
            return self.codecs[codec["id"]]
        octaves = (codec["step"] + 520) * self.slope
        return int(100_000 * 2 ** (-(codec["step"] + 520) / 96)), self.kl_at_520 * 2**octaves

    def __call__(self, codec, limit_bytes):
        self.tried.append(codec)
        size, kl = self.facts(codec)
        if kl is None:
            return Trial(codec, None, 0, None, "refused")
        if limit_bytes is not None and size >= limit_bytes:
            return Trial(codec, None, 0, None, "larger")
        outcome = "within" if kl <= self.max_kl else "over"
        return Trial(codec, size, 0, Fidelity(kl, kl, 1.0, 256, 0.0, {}), outcome)


def test_the_smallest_within_the_bound_is_taken():
    codecs = Codecs(0.005, {"int4": (280_000, 0.0065), "int8": (530_000, 0.00003)})
    choice = choose(codecs, [Rung({"id": "int4"}), Rung({"id": "int8"})], LOSSLESS, 0.005)
    assert choice.trial.codec == {"id": "int8"}
    assert [trial.outcome for trial in choice.tried] == ["within", "over", "within"]


def test_a_coarser_bound_takes_a_smaller_codec_and_stops_looking_at_larger_ones():
    codecs = Codecs(0.01, {"int4": (280_000, 0.0065), "int8": (530_000, 0.00003)})
    choice = choose(codecs, [Rung({"id": "int4"}), Rung({"id": "int8"})], LOSSLESS, 0.01)
    assert choice.trial.codec == {"id": "int4"}
    assert choice.tried[-1].outcome == "larger"
    assert choice.tried[-1].stored_bytes is None


def test_lossless_is_left_where_nothing_else_holds():
    codecs = Codecs(0.0, {"int4": (280_000, 0.0065), "int8": (530_000, None)})
    choice = choose(codecs, [STEPPED, Rung({"id": "int4"}), Rung({"id": "int8"})], LOSSLESS, 0.0)
    assert choice.trial is LOSSLESS
    assert "int8 cannot hold the values" in choice.reason


def test_the_reason_is_one_line_with_every_figure():
    codecs = Codecs(0.01, {"int4": (280_000, 0.0065), "int8": (530_000, 0.00003)})
    choice = choose(codecs, [Rung({"id": "int4"}), Rung({"id": "int8"})], LOSSLESS, 0.01)
    assert choice.reason == (
        "auto chose int4, 0.3 MB, mean KL 0.0065: the smallest of 3 tried that stays within 0.01; "
        "lossless within (1.0 MB, mean KL 0); int8 is larger"
    )


def test_what_cannot_be_judged_is_told():
    choice = CodecChoice(LOSSLESS, 0.01, (LOSSLESS,), few_probes=20)
    assert choice.reason == (
        "auto chose lossless, 1.0 MB, mean KL 0: a loss is judged at 256 positions or more, and so short a text has 20"
    )


@given(
    kl_at_520=st.floats(1e-5, 0.1),
    slope=st.floats(1.2 / 64, 2.8 / 64),
    max_kl=st.floats(1e-4, 0.05),
)
def test_a_step_is_found_near_the_bound_in_few_trials(kl_at_520, slope, max_kl):
    codecs = Codecs(max_kl, kl_at_520=kl_at_520, slope=slope)
    choice = choose(codecs, [STEPPED], LOSSLESS, max_kl)
    steps = [codec["step"] for codec in codecs.tried]
    assert len(steps) == len(set(steps)) <= MAX_STEP_TRIALS
    assert all(FIRST <= step <= LAST for step in steps)
    best = math.floor(-520 + math.log2(max_kl / kl_at_520) / slope)
    if best < FIRST:
        assert choice.trial is LOSSLESS
    else:
        found = choice.trial.codec["step"]
        assert choice.trial.mean_kl <= max_kl
        assert found >= min(best, LAST) - max(NARROW_STEPS, 1 - math.log2(CLOSE_TO_BOUND) / slope)


@pytest.mark.parametrize(
    "measured, left",
    [
        ({-400: 0.006, -404: 0.004}, {-404}),  # close to each other on both sides of the bound
        ({LAST: 0.001}, {LAST}),  # within at the coarsest
        ({FIRST: 0.1}, {FIRST - 1}),  # over at the finest
    ],
)
def test_nothing_is_left_to_try(measured, left):
    assert next_step(measured, 0.005, FIRST, LAST) in left


@pytest.mark.parametrize("least", range(7))
def test_the_first_finer_configuration_within_the_bound_is_found(least):
    """Of six finer ones; with six none is within."""
    finer = [{"id": "int4", "wide_key_layers": list(range(count))} for count in range(1, 7)]

    class Finer(Codecs):
        def facts(self, codec):
            wide = len(codec.get("wide_key_layers", ()))
            return 280_000 + 1000 * wide, 0.001 if wide > least else 0.05

    codecs = Finer(0.005)
    asked = []
    refine = lambda codec: asked.append(codec) or finer  # noqa: E731
    choice = choose(codecs, [Rung({"id": "int4"}, refines=True)], LOSSLESS, 0.005, refine)
    assert asked == [{"id": "int4"}]
    assert choice.trial.codec == (finer[least] if least < 6 else LOSSLESS.codec)
    assert len(codecs.tried) <= 4


def test_no_finer_one_is_tried_where_the_codec_is_within_or_larger():
    for bound, size in ((0.1, 280_000), (0.005, 2_000_000)):
        codecs = Codecs(bound, {"int4": (size, 0.05)})
        choose(codecs, [Rung({"id": "int4"}, refines=True)], LOSSLESS, bound, lambda codec: pytest.fail("asked"))


def test_wide_layers_are_told():
    assert describe_codec({"id": "int4", "wide_key_layers": [7, 18]}) == "int4 with 8-bit keys in layers 7, 18"


def test_a_search_with_a_step_on_both_sides_of_the_bound_goes_between_them():
    """Two steps over the bound with nearly the same KL say nothing of the slope below them (SmolLM2, SQuAD)."""
    measured = {-540: 0.0075, -561: 0.0071, -596: 0.0026}
    assert -592 < next_step(measured, 0.005, -620, LAST) < -565
    assert next_step({-400: 0.3, -416: 0.00499}, 0.005, FIRST, LAST) == -414


def test_a_stepped_codec_that_is_larger_than_another_is_not_searched():
    class Small(Codecs):
        def facts(self, codec):
            return 2_000_000, 0.001

    codecs = Small(0.005)
    assert choose(codecs, [STEPPED], LOSSLESS, 0.005).trial is LOSSLESS
    assert len(codecs.tried) == 1
