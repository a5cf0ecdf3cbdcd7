"""Greedy choices are those of the largest logits, whether a copy of the output matrix in 8 bits is there or not."""

import threading
import time

import pytest
from test_recorded import prefix_of
from test_weights import CONFIGS, bfloat16_model, random_ids, use_plan

from cag.forward import choices as choices_module
from cag.forward.choices import GreedyChoice, resting
from cag.forward.weights import plain_weight
from cag.generation.generate import Generation, SamplingOptions, choices
from cag_kernels import has_compiler, has_dots, has_numba, has_tiles
from cag_kernels import largest as largest_module
from cag_kernels.cpu.processor import has_byte_tiles

pytestmark = pytest.mark.skipif(not has_compiler() or not has_numba(), reason="llvmlite or numba is not there")
by_tiles = pytest.mark.skipif(not has_byte_tiles(), reason="this processor has no tiles of bytes (AMX)")
by_pairs = pytest.mark.skipif(not largest_module._has_pairs(), reason="this processor does not multiply pairs")
by_dots = pytest.mark.skipif(not has_dots() or has_tiles(), reason="other products come first, or there are none")
PLANS = [
    pytest.param(("bfloat16", "tiles"), marks=by_tiles, id="tiles"),
    pytest.param(("bfloat16", "dots"), marks=[by_dots, by_pairs], id="dots"),
    pytest.param(("float32", "packed"), marks=by_pairs, id="packed"),
]


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    monkeypatch.setattr(largest_module, "_LEAST_FEATURES", 32)
    monkeypatch.setattr(GreedyChoice, "_prepare_behind_others", lambda _: None)  # where a test does not want it


@pytest.fixture(params=PLANS)
def plan(request):
    """What products compute in, and how."""
    return request.param


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def model(request, plan, tmp_path, monkeypatch):
    use_plan(monkeypatch, *plan)
    return bfloat16_model(tmp_path, CONFIGS[request.param]())


def chunks_of(model, prefix, seed):
    """Questions and single tokens of three sessions behind a prefix."""
    states = [model.new_session_state(prefix) for _ in range(3)]
    yield [(random_ids(5 + index, seed + index), state) for index, state in enumerate(states)], [1, 1, 1]
    yield [(random_ids(count, seed), state) for count, state in zip((1, 4, 1), states, strict=True)], [1, 4, 1]
    for step in range(6):
        yield [(random_ids(1, seed + 10 * step + index), state) for index, state in enumerate(states)], [1, 1, 1]


def test_choices_are_those_of_the_logits(model):
    prefix = prefix_of(model, 200)
    model.decoder.choice.prepare()
    assert model.decoder.choice.quick is not None
    for seed in range(4):
        expected = [
            model.forward_together(chunks, num_logits=counts).argmax(-1).tolist()
            for chunks, counts in chunks_of(model, prefix, seed)
        ]
        found = [model.choose_together(chunks, num_choices=counts) for chunks, counts in chunks_of(model, prefix, seed)]
        assert found == expected
    assert set(model.decoder.choice.quick._choices) == {3, 6}


def generation(model, prefix, question, **options):
    return Generation(
        model,
        model.new_session_state(prefix),
        random_ids(7, question).tolist(),
        SamplingOptions(max_tokens=20, **options),
    )


def run_together(generations):
    while not all(generation.finished for generation in generations):
        waiting = [generation for generation in generations if not generation.finished]
        for generation, chosen in zip(waiting, choices(waiting), strict=True):
            generation.advance(chosen)
    return [generation.token_ids for generation in generations]


def test_answers_together_and_alone_with_a_copy_and_without(model):
    prefix, seeds = prefix_of(model, 150), range(4)
    without = [generation(model, prefix, seed).run().token_ids for seed in seeds]
    model.decoder.choice.prepare()
    assert [generation(model, prefix, seed).run().token_ids for seed in seeds] == without
    assert run_together([generation(model, prefix, seed) for seed in seeds]) == without


def test_who_samples_changes_nothing_for_who_does_not(model):
    prefix = prefix_of(model, 150)
    model.decoder.choice.prepare()
    greedy = generation(model, prefix, 0).run().token_ids
    sampled = generation(model, prefix, 1, temperature=1.5, seed=3).run().token_ids
    both = [generation(model, prefix, 0), generation(model, prefix, 1, temperature=1.5, seed=3)]
    assert run_together(both) == [greedy, sampled]


def test_no_logits_are_computed_for_greedy_answers(model, monkeypatch):
    model.decoder.choice.prepare()
    monkeypatch.setattr(model.decoder, "_head", None)
    assert generation(model, prefix_of(model, 90), 0).run().token_ids
    with pytest.raises(TypeError):
        generation(model, prefix_of(model, 90), 0, temperature=1.0).run()


def test_there_is_no_copy_where_memory_is_short(model, monkeypatch):
    choice, num_bytes = model.decoder.choice, plain_weight(model.decoder._head).nbytes // 2
    monkeypatch.setattr(choices_module, "available_memory_bytes", lambda: 8 * num_bytes - 8)
    choice.prepare()
    assert choice.quick is None
    monkeypatch.setattr(choices_module, "available_memory_bytes", lambda: 8 * num_bytes)
    choice.prepare()
    assert choice.quick.num_bytes >= num_bytes


def test_the_first_choice_begins_the_copy(model, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(largest_module, "_LEAST_FEATURES", 32)
    prefix = prefix_of(model, 90)
    expected = [generation(model, prefix, question).run().token_ids for question in range(3)]
    for thread in threading.enumerate():
        if thread.name == "cag-choices":
            thread.join()
    assert model.decoder.choice.quick is not None
    assert [generation(model, prefix, question).run().token_ids for question in range(3)] == expected


def test_other_products_have_no_copy(tmp_path, monkeypatch):
    use_plan(monkeypatch, "bfloat16", "plain")
    model = bfloat16_model(tmp_path, CONFIGS["llama"]())
    assert plain_weight(model.decoder._head) is None
    model.decoder.choice.prepare()
    assert model.decoder.choice.quick is None
    assert generation(model, prefix_of(model, 90), 0).run().token_ids


def test_a_copy_arrives_between_two_tokens(model):
    prefix = prefix_of(model, 150)
    expected = generation(model, prefix, 0).run().token_ids
    answer = generation(model, prefix, 0)
    steps = iter(answer)
    next(steps, None)
    thread = threading.Thread(target=model.decoder.choice.prepare)
    thread.start()
    for _ in steps:
        time.sleep(0.001)
    thread.join()
    assert model.decoder.choice.quick is not None
    assert answer.token_ids == expected


def test_a_copy_rests_between_its_pieces_and_ends_with_the_process():
    now, rests, alive = [0.0], [], [True]

    def sleep(seconds):
        rests.append(seconds)
        now[0] += seconds

    goes_on = resting(lambda: alive[0], clock=lambda: now[0], sleep=sleep)
    for piece in (0.002, 0.003):
        assert goes_on()
        now[0] += piece
    assert goes_on()
    assert rests == pytest.approx([0.014, 0.021])
    alive[0] = False
    assert not goes_on()
    assert len(rests) == 2
