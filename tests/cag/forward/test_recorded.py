"""Recorded forwards give the bits of the same steps taken one by one, whatever has changed since they were recorded."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_weights import CONFIGS, HAS_OWN, OWN_PRODUCT, bfloat16_model, random_ids, use_plan

from cag.forward.pages import PAGE_TOKENS, SLAB_PAGES
from cag.forward.recorded import MAX_RECORDINGS, attends_rounded, attention_dtype
from cag.forward.state import SequenceState
from cag.residency.resident import ResidentPrefix
from cag_kernels import DensePrefix, has_compiler, has_tiles, quantize_prefix
from cag_kernels.cpu.tape import Tape
from cag_store.errors import CorruptEntry

pytestmark = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")

OWN = pytest.param(OWN_PRODUCT, marks=pytest.mark.skipif(not HAS_OWN, reason="no products of bfloat16"))


@pytest.fixture(params=["packed", OWN, "transposed"])
def product(request, monkeypatch):
    use_plan(monkeypatch, "float32" if request.param == "packed" else "bfloat16", request.param)
    return request.param


@pytest.fixture(params=["llama", "llama with biases", "qwen3", "gemma3", "phi3", "olmo3"])
def model(request, tmp_path, product):
    return bfloat16_model(tmp_path, CONFIGS[request.param]())


def prefix_of(model, num_tokens, seed=0, bits=None, recent=0):
    """Random keys and values: numbers, or codes with exact tokens behind them."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for shape in model.kv_shapes:
        sides = [torch.randn(shape.num_kv_heads, num_tokens, shape.head_dim, generator=generator) for _ in range(2)]
        keys, values = (side.bfloat16() for side in sides)
        coded = num_tokens - recent
        segments = [DensePrefix(keys, values)]
        if bits is not None:
            head, rest = (keys[:, :coded], values[:, :coded]), (keys[:, coded:], values[:, coded:])
            codes = quantize_prefix(*head, key_bits=bits, value_bits=bits, group_channels=32)
            segments = [codes, *([DensePrefix(*(side.contiguous() for side in rest))] if recent else [])]
        layers.append(tuple(segments))
    prefix = ResidentPrefix(layers, np.arange(num_tokens))
    prefix.mark_loaded()
    return prefix


def both(model, chunks_of, monkeypatch):
    """Logits of the same forwards, recorded and step by step."""
    found = [model.forward_together(chunks).clone() for chunks in chunks_of()]
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder._recorded, "forward", lambda *_: None)
        expected = [model.forward_together(chunks).clone() for chunks in chunks_of()]
    return found, expected


NOWHERE = SimpleNamespace(arrived=lambda layer: None)


def assert_equal(found, expected):
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_networks_attend_in():
    """In bfloat16 where compiled code does, over bfloat16, and where nothing of ours serves; else in float32."""
    half, single, compiled = torch.bfloat16, torch.float32, torch.bfloat16 if HAS_OWN else torch.float32
    found = [attention_dtype(half, head_dim, half) for head_dim in (32, 64, 576, 16, 48, 80, 20, 608)]
    assert found == [*[compiled] * 3, *[single] * 3, *[half] * 2]
    assert attention_dtype(half, 64, torch.float16) == attention_dtype(half, 20, torch.float32) == single
    assert attention_dtype(single, 64, half) == single


@pytest.mark.parametrize("num_queries", [1, 9])
def test_rows_are_rounded_where_products_of_bfloat16_meet_the_prefix(num_queries):
    query, keys = torch.randn(4, num_queries, 64), torch.randn(2, 100, 64).bfloat16()
    numbers, codes = DensePrefix(keys, keys), quantize_prefix(keys, keys, key_bits=8, value_bits=8)
    assert not attends_rounded(query, numbers, torch.float32)
    assert not attends_rounded(query, codes, torch.float32)
    assert attends_rounded(query, numbers, torch.bfloat16) == (HAS_OWN or num_queries > 1)
    assert attends_rounded(query, codes, torch.bfloat16) == has_tiles()


@pytest.mark.parametrize(("bits", "recent"), [(None, 0), (8, 0), (4, 0), (4, 40)])
def test_a_session_behind_a_prefix(model, product, monkeypatch, bits, recent):
    prefix = prefix_of(model, 200, bits=bits, recent=recent)

    def chunks_of():
        state = model.new_session_state(prefix)
        pieces = [random_ids(9), random_ids(1, 1), random_ids(1, 2), random_ids(9, 3), *random_ids(60, 4).split(1)]
        return ([(piece, state)] for piece in pieces)

    found, expected = both(model, chunks_of, monkeypatch)
    assert_equal(found, expected)
    assert bool(model.decoder._recorded._found) == model.decoder._recorded._recordable == (product != "transposed")


def test_another_thread_that_reads_a_model_changes_nothing(model, product):
    """Meanwhile torch's default type, which is the process's, is that of the model which is read."""
    prefix = prefix_of(model, 200, bits=8)

    def forwards():
        state = model.new_session_state(prefix)
        return [model.forward_together([(random_ids(count, count), state)]).clone() for count in (9, 1, 1)]

    expected, found = forwards(), []
    model.decoder._recorded._found.clear()
    if product == "tiles":
        from cag_kernels.cpu.products.tile_linear import no_bias

        no_bias.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        thread = threading.Thread(target=lambda: found.extend(forwards()))  # with scratch of its own
        thread.start()
        thread.join()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(found, expected)


def test_many_sessions_that_change_places(model, monkeypatch):
    prefix = prefix_of(model, 150, bits=8)

    def chunks_of():
        states = [model.new_session_state(prefix) for _ in range(4)]
        yield [(random_ids(5, seed), state) for seed, state in enumerate(states)]
        for seed in range(6):
            order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
            yield [(random_ids(1, 10 * seed + place), states[place]) for place in order]

    assert_equal(*both(model, chunks_of, monkeypatch))


@pytest.mark.parametrize("bits", [None, 8])
def test_the_last_layer_for_wanted_rows_alone(model, product, bits):
    """The last row of each sequence has the bits that it has among all rows; what later tokens see, too."""
    prefix, counts = prefix_of(model, 150, bits=bits), [5, 1, 9]

    def forwards(num_logits):
        states = [model.new_session_state(prefix) for _ in counts]
        chunks = [(random_ids(count, count), state) for count, state in zip(counts, states, strict=True)]
        first = model.forward_together(chunks, num_logits=num_logits).clone()
        again = [(random_ids(1, seed), state) for seed, state in enumerate(states)]
        return first, model.forward_together(again).clone()

    (last, behind_last), (every, behind_every) = forwards([1, 1, 1]), forwards(counts)
    taken = [recording._last is not recording._all for recording in model.decoder._recorded._found.values()]
    assert sorted(taken) == ([False, False, True] if product != "transposed" else [])
    if product != "transposed":
        assert torch.equal(last, every[[4, 5, 14]])
        assert torch.equal(behind_last, behind_every)


def test_two_prefixes_in_turn_and_none(model, monkeypatch):
    prefixes = [prefix_of(model, 150), prefix_of(model, 90, seed=1), None]

    def chunks_of():
        states = [model.new_session_state(prefix) for prefix in prefixes]
        for seed in range(3):
            for state in states:
                yield [(random_ids(4, seed), state)]

    assert_equal(*both(model, chunks_of, monkeypatch))


def test_a_tail_of_its_own_that_moves_when_it_grows(model, monkeypatch):
    prefix = prefix_of(model, 100)

    def chunks_of():
        state = model.new_state(prefix)
        assert isinstance(state, SequenceState)
        return ([(piece, state)] for piece in random_ids(300).split(3))

    assert_equal(*both(model, chunks_of, monkeypatch))


def test_a_prefix_that_is_gone_takes_its_recordings_along(model):
    recorded = model.decoder._recorded
    prefix = prefix_of(model, 120)
    memory = weakref.ref(prefix.segments(0)[0].keys)
    model.forward_together([(random_ids(3), model.new_session_state(prefix))])
    assert any(key[1] == id(prefix) for key in recorded._found) == bool(recorded._recordable)
    place = id(prefix)
    del prefix
    gc.collect()
    assert not any(key[1] == place for key in recorded._found)
    assert memory() is None


def test_pages_that_move_leave_no_memory_behind(model):
    """Whatever was recorded over them, when the pool grows and when it gives its memory back."""
    pool, state = model.pages, model.new_session_state(prefix_of(model, 64))

    def left_by(move):
        model.forward_together([(random_ids(3), model.new_session_state(state.prefix))])
        before = [weakref.ref(side) for side in (*pool.keys, *pool.values)]
        move()
        return [side for side in before if side() is not None]

    assert left_by(lambda: state.begin(4 * SLAB_PAGES * PAGE_TOKENS)) == []
    state.tail.close()
    assert left_by(model.settle_pages) == []
    assert pool.num_pages == SLAB_PAGES


def test_only_so_many_are_kept(model):
    recorded, prefix = model.decoder._recorded, prefix_of(model, 64)
    for _ in range(2):  # those that were dropped are recorded again
        for count in range(1, MAX_RECORDINGS + 5):
            model.forward_together([(random_ids(count), model.new_session_state(prefix))])
    assert len(recorded._found) == (MAX_RECORDINGS if recorded._recordable else 0)
    entries = weakref.finalize._registry.values()
    mine = [entry for entry in entries if any(argument is recorded._found for argument in entry.args or ())]
    assert len(mine) <= 3  # the pool, the prefix, and the tail of the check at loading: not one a recording


def test_all_have_scratch_in_common(model):
    """It grows with rows and prefix: 16 of them would be gigabytes for a large network behind a long one."""
    prefix = prefix_of(model, 1100)
    for count in (12, 3, 7):
        model.forward_together([(random_ids(count), model.new_session_state(prefix))])
    recordings = model.decoder._recorded._found.values()
    assert len({recording._tape.scratch(1).data_ptr() for recording in recordings}) <= 1


def loading(prefix, shares_cores):
    """As if its layers were still on their way."""
    prefix.shares_cores = shares_cores
    for event in prefix._ready:
        event.clear()
    return prefix


@pytest.mark.parametrize("shares_cores", [False, True])
def test_layers_that_arrive_one_by_one(model, shares_cores):
    """A forward is recorded before they are there, and uses none of them too early; the next one waits no more."""
    whole = prefix_of(model, 64)
    expected = model.forward_together([(random_ids(3), model.new_session_state(whole))]).clone()
    prefix = loading(prefix_of(model, 64), shares_cores)
    keys = [segments[0].keys for segments in prefix._layers]
    values = [tensor.clone() for tensor in keys]
    for tensor in keys:
        tensor.fill_(torch.nan)

    def arrive():
        for layer, (tensor, value) in enumerate(zip(keys, values, strict=True)):
            time.sleep(0.1)
            tensor.copy_(value)
            prefix._arrived(layer, NOWHERE)
        prefix.mark_loaded()

    threading.Thread(target=arrive).start()
    for _ in range(2):
        assert torch.equal(model.forward_together([(random_ids(3), model.new_session_state(prefix))]), expected)


def test_a_prefix_that_cannot_be_loaded_says_so(model):
    prefix = loading(prefix_of(model, 64), shares_cores=True)
    prefix._error = CorruptEntry("cut")
    prefix.mark_loaded()
    with pytest.raises(CorruptEntry, match="cut"):
        model.forward_together([(random_ids(3), model.new_session_state(prefix))])


def test_who_shares_its_cores_with_loading_computes_alone_until_all_is_there(model, monkeypatch):
    """The first layers run on one thread as soon as they are there, and all others wait for all layers."""
    prefix, alone = loading(prefix_of(model, 64), shares_cores=True), []
    run = Tape.run

    def seen(tape, *span, **how):
        alone.append(how.get("alone", False))
        run(tape, *span, **how)
        if len(alone) == 2:
            assert not prefix.is_loaded
            prefix.mark_loaded()

    monkeypatch.setattr(Tape, "run", seen)
    prefix._arrived(0, NOWHERE)
    waiting = threading.Thread(target=prefix.segments, args=(0,), daemon=True)
    waiting.start()
    timer = threading.Timer(30, prefix.mark_loaded)  # where nothing is recorded, somebody has to
    timer.start()
    if model.decoder._recorded._recordable:
        waiting.join(0.1)
        assert waiting.is_alive()
        model.forward_together([(random_ids(3), model.new_session_state(prefix))])
        assert alone == [True, True, False]
    prefix.mark_loaded()
    timer.cancel()
    waiting.join(10)
    assert not waiting.is_alive()
