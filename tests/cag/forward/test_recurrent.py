"""Networks with recurrent layers give in pieces, in company and behind a snapshot what plain transformers gives."""

import pytest
import torch
from hybrids import FAMILIES, REFUSED
from transformers import AutoModelForCausalLM, LlamaConfig

from cag.errors import UnsupportedModel
from cag.forward.recurrent import KeptStates, RecurrentLayers, RecurrentStep
from cag.forward.recurrent_probe import find_recurrent_layers
from cag.model import LanguageModel, ModelOptions
from cag.model_files import refuse_unsupported
from cag.residency.resident import ResidentPrefix
from tiny import tiny_config, write_tiny_model

IDS = torch.randint(0, 250, (90,), generator=torch.Generator().manual_seed(2))
PARTS = (40, 20, 20, *[1] * 10)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def both(request, tmp_path_factory):
    """A model, and the logits of transformers' own forward over all of `IDS`."""
    directory = write_tiny_model(tmp_path_factory.mktemp(request.param), config=FAMILIES[request.param]())
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = plain(input_ids=IDS[None]).logits[0].float()
    return LanguageModel.load(directory, model_id=request.param), expected


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("qwen3_5"), config=FAMILIES["qwen3_5_text"]())
    return LanguageModel.load(directory, model_id="qwen3_5")


def in_parts(model, state, ids=IDS, parts=PARTS):
    return torch.cat([model.forward(part.tolist(), state, num_logits=0) for part in torch.split(ids, list(parts))])


def close(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item() < 1e-3


def prefix_of(model, num_tokens):
    state = model.new_state(capacity=num_tokens)
    model.forward(IDS[:num_tokens].tolist(), state)
    prefix = ResidentPrefix.from_tail(state.tail, IDS[:num_tokens].numpy())
    prefix.recurrent = state.recurrent
    return prefix


def test_pieces_give_the_logits_of_the_whole(both):
    model, expected = both
    for state in (model.new_state(), model.new_session_state()):
        assert close(in_parts(model, state), expected)
    assert {name: tuple(value.shape) for name, value in state.recurrent.items()} == {
        name: shape for name, (shape, _) in model.recurrent.shapes.items()
    }


def test_sessions_behind_one_snapshot_do_not_see_each_other(both):
    model, expected = both
    prefix = prefix_of(model, 60)
    kept = {name: value.clone() for name, value in prefix.recurrent.items()}
    first, second = model.new_session_state(prefix), model.new_session_state(prefix)
    found = [model.forward_together([(IDS[60:70].tolist(), first), (IDS[60:65].tolist(), second)], num_logits=[10, 5])]
    for place in range(5):  # one row of each: they go on from other places
        chunks = [([int(IDS[70 + place])], first), ([int(IDS[65 + place])], second)]
        found.append(model.forward_together(chunks, num_logits=[1, 1]))
    assert close(found[0], torch.cat([expected[60:70], expected[60:65]]))
    assert close(torch.cat(found[1:])[::2], expected[70:75]) and close(torch.cat(found[1:])[1::2], expected[65:70])
    assert all(bool((prefix.recurrent[name] == value).all()) for name, value in kept.items())


def test_sequences_with_as_many_new_tokens_run_in_one_forward(both, monkeypatch):
    """Rows of one forward, whatever their order, how far they are, and which of them are long or new."""
    model, expected = both
    shapes, run = [], model.network.forward

    def counted(*arguments, **named):
        shapes.append(tuple(named["input_ids"].shape))
        return run(*arguments, **named)

    starts = [60, 0, 45, 70, 0, 58, 12]
    counts = [1, 4, 1, 4, 4, 1, 3]
    states = [model.new_session_state(prefix_of(model, start) if start else None) for start in starts]
    monkeypatch.setattr(model.network, "forward", counted)
    for again in range(2):
        places = [range(s + again * c, s + again * c + c) for s, c in zip(starts, counts, strict=True)]
        chunks = [(IDS[place.start : place.stop].tolist(), s) for place, s in zip(places, states, strict=True)]
        found = model.forward_together(chunks, num_logits=[1, 4, 1, 2, 4, 1, 3])
        wanted = [row for place, most in zip(places, (1, 4, 1, 2, 4, 1, 3), strict=True) for row in place[-most:]]
        assert close(found, expected[wanted])
    # single tokens; four at the beginning, then behind four; four of which two are wanted; three
    assert shapes == [(3, 1), (2, 4), (1, 4), (1, 3)] * 2


def test_branches_stand_behind_the_snapshot_each(both):
    model, expected = both
    branches = [IDS[60:70].tolist(), IDS[60:66].tolist()]
    found = model.forward_branches(branches, prefix_of(model, 60), [0, 9, 10, 15])
    assert close(found, expected[[60, 69, 60, 65]])


def test_what_the_engine_sees_are_attention_layers(both):
    model, _ = both
    assert list(model.recurrent.numbers.values()) == list(range(len(model.kv_shapes)))
    assert model.decoder is None and model.device_decoder is None and model.replays is None
    assert model.most_rows(model.new_session_state(), exactly=False) == 1


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid"])
def test_checkpoints_in_16_bits(tmp_path, family, compute_dtype):
    directory = write_tiny_model(tmp_path, config=FAMILIES[family](), dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = plain(input_ids=IDS[None]).logits[0].float()
    model = LanguageModel.load(directory, model_id=family, options=ModelOptions(compute_dtype=compute_dtype))
    for found in (
        in_parts(model, model.new_session_state()),
        model.forward_branches([IDS[60:].tolist()], prefix_of(model, 60), list(range(30))),
    ):
        wanted = expected[-len(found) :]
        assert float((found - wanted).norm() / wanted.norm()) < (0.01 if compute_dtype == "float32" else 0.2)


def test_a_forward_that_fails_leaves_no_trace(model, monkeypatch):
    state, other = model.new_session_state(), model.new_session_state()
    model.forward(IDS[:60].tolist(), state), model.forward(IDS[:60].tolist(), other)
    before = {name: value.clone() for name, value in state.recurrent.items()}
    last = model.network.model.layers[-1]
    forward, calls = last.forward, []

    def failing(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:  # of the second forward: the first one went through all layers
            raise RuntimeError("no memory")
        return forward(*arguments, **named)

    monkeypatch.setattr(last, "forward", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        model.forward_together([([1], state), ([1, 2], other)], num_logits=[1, 1])
    assert state.num_tail == other.num_tail == 60
    assert all(bool((state.recurrent[name] == value).all()) for name, value in before.items())
    again, fresh = model.forward([1], state), model.new_session_state()
    model.forward(IDS[:60].tolist(), fresh)
    assert bool((again == model.forward([1], fresh)).all())


def test_a_sequence_goes_back_to_its_mark_only(model):
    state = model.new_session_state()
    model.forward(IDS[:40].tolist(), state)
    state.mark()
    expected = in_parts(model, state, IDS[40:60], (12, 1, 7))
    state.rewind(40)
    assert bool((in_parts(model, state, IDS[40:60], (12, 1, 7)) == expected).all())
    with pytest.raises(AssertionError, match="nothing of that place"):
        state.rewind(50)


def test_a_prefix_without_its_states_is_not_attended_to(model):
    prefix = prefix_of(model, 60)
    prefix.recurrent = {}
    with pytest.raises(AssertionError, match="states are missing"):
        model.forward([1], model.new_session_state(prefix))
    with pytest.raises(AssertionError, match="states are missing"):
        model.forward_branches([[1], [2]], prefix, [0, 1])


def test_states_are_kept_for_the_number_of_tokens_that_is_counted():
    """Between `add` and the new count an interrupt may come."""
    kept = KeptStates({})
    kept.add(5, {"a": torch.ones(1)})
    assert kept.behind(0) == {} and kept.has(5)
    kept.settle(5, mark=True)
    kept.add(6, {})
    kept.settle(6)
    kept.add(7, {})
    kept.settle(7)
    assert [place for place in range(8) if kept.has(place)] == [5, 7]


def test_snapshots_stay_a_small_share_of_a_prefix():
    layers = RecurrentLayers({}, {"a": ((1, 1000), torch.float32)})  # 4,000 bytes
    assert list(layers.places(1300, 64, 512)) == [512, 1024, 1300]
    assert list(layers.places(1300, 16, 512)) == [1300]  # 8 snapshots are as large as 2,000 tokens
    assert list(layers.places(5000, 16, 512)) == [2048, 4096, 4608, 5000]
    assert list(layers.places(4096, 16, 512)) == [2048, 3584, 4096]
    assert list(layers.places(1, 64, 512)) == [1]


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_layers_that_cannot_be_resumed_are_refused(tmp_path, family):
    build, message = REFUSED[family]
    directory = write_tiny_model(tmp_path, config=build())
    with pytest.raises(UnsupportedModel, match=message):
        LanguageModel.load(directory, model_id=family)


def test_layers_that_say_nothing_of_their_state_are_refused(model):
    class Silent(torch.nn.Module):
        config = FAMILIES["lfm2"]()

        def forward(self, cag_state, **_):
            cag_state.attend(2, *[torch.zeros(1, 2, 4)] * 3)

    with pytest.raises(UnsupportedModel, match=r"lfm2 keeps the state of its layers \[0, 1, 3\]"):
        find_recurrent_layers(Silent(), model.device)


def test_other_kinds_of_layers_are_refused_by_name():
    config = FAMILIES["qwen3_5_text"]()
    config.layer_types = ["linear_attention", "full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        refuse_unsupported(config)


def test_other_networks_are_given_no_cache(tmp_path):
    model = LanguageModel.load(write_tiny_model(tmp_path, config=tiny_config()), model_id="llama")
    seen = []
    model.network.register_forward_pre_hook(lambda _module, _given, named: seen.append(set(named)), with_kwargs=True)
    state = model.new_session_state()
    model.forward([1, 2, 3], state)
    assert isinstance(model.network.config, LlamaConfig) and model.recurrent is None
    assert all("past_key_values" not in names for names in seen) and state.recurrent == {}


def test_layers_of_the_cache_are_views_of_the_same_states():
    """Networks of transformers up to 5.20 reach for states there, and write to them."""
    before = {"layers.003.conv.0": torch.zeros(1, 2, 4), "layers.003.recurrent.1": torch.zeros(1, 2)}
    step = RecurrentStep([before], attention=None)
    layer = step.layers[3]
    layer.conv_states[0].add_(1)
    layer.recurrent_states[1].add_(2)
    assert layer.conv_states[0] is step.get_conv_state(3) and layer.recurrent_states[0] is None
    assert not layer.record_past
    assert {name: float(state.mean()) for name, state in step.states[0].items()} == {
        "layers.003.conv.0": 1, "layers.003.recurrent.1": 2,
    }  # fmt: skip
    assert not any(state.any() for state in before.values())
