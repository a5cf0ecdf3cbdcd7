"""Latent attention: what is proven and what is not, one side in memory and on disk, and the numbers that come of it."""

import math

import pytest
import torch
from hybrids import FAMILIES as HYBRIDS
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from cag.engine import Engine
from cag.errors import CacheMismatch
from cag.forward.attention_hook import ATTENTION_NAME
from cag.forward.latent import LATENT, find_latent_layers
from cag.generation.generate import SamplingOptions
from cag.model import LanguageModel, ModelOptions
from cag.model_files import prepared
from cag.residency.buffers import HostBuffers
from cag.residency.load_plan import plan_load
from cag.residency.resident import ResidentPrefix
from cag_store import Store
from tiny import write_tiny_model

SHAPE = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
SHAPE |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16}
SHAPE |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
SHAPE |= {"n_shared_experts": 1, "pad_token_id": 257, "eos_token_id": 257, "bos_token_id": 256}
# as of the models that people run
WIDE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
OPTIONS = SamplingOptions(max_tokens=8)
TEXT = "".join(f"The pump number {number} runs at {number * 7} bar.\n" for number in range(40))


def config(**changes):
    return DeepseekV3Config(**SHAPE | changes)


def network_of(directory):
    return prepared(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))


@pytest.fixture
def directory(tmp_path):
    return write_tiny_model(tmp_path / "model", config=config())


@pytest.fixture
def engine(directory, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    engine = Engine.load(str(directory), store=tmp_path / "store", device="cpu")
    engine.model.stop_ids = frozenset()
    return engine


@pytest.fixture
def expanded(monkeypatch):
    """Models that are loaded attend to keys and values, as before there were latents."""
    from cag.forward import latent

    def use():
        monkeypatch.setattr(latent, "find_latent_layers", lambda *_: False)

    yield use


def latents_in(network):
    return [module for module in network.modules() if hasattr(module, LATENT)]


def test_all_layers_are_proven(directory):
    network = network_of(directory)
    assert find_latent_layers(network, ATTENTION_NAME)
    assert len(latents_in(network)) == 2
    assert network.config._attn_implementation == ATTENTION_NAME


@pytest.mark.parametrize("part", ["keys", "values", "shared"])
def test_a_layer_that_makes_something_else_of_its_latents_keeps_keys_and_values(directory, part, monkeypatch):
    """A norm behind the projection, a rotated part that differs between heads: right as it is, if large."""

    def expand(self, latents, rotated):
        keys, values = whole(self, latents, rotated)
        if self.layer_idx == 1:
            keys, values = keys.clone(), values * (1 + 1e-6 * (part == "values"))
            keys[..., :4] *= 1 + 1e-6 * (part == "keys")
            keys[:, 1:, :, -1] += part == "shared"
        return keys, values

    whole = DeepseekV3Attention.expand_kv
    monkeypatch.setattr(DeepseekV3Attention, "expand_kv", expand)
    network = network_of(directory)
    assert not find_latent_layers(network, ATTENTION_NAME)
    assert not latents_in(network)
    model = LanguageModel.load(directory, model_id="other")
    assert [(shape.num_kv_heads, shape.sides) for shape in model.kv_shapes] == [(4, 2)] * 2
    ids = list(range(30))
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(model.forward(ids, model.new_state(), num_logits=0), expected, atol=1e-4, rtol=1e-4)


def test_a_bias_is_not_absorbed(directory):
    network = network_of(directory)
    for layer in network.model.layers:
        layer.self_attn.kv_b_proj.bias = torch.nn.Parameter(torch.ones(4 * 32))
    assert not find_latent_layers(network, ATTENTION_NAME)


def test_latents_that_are_larger_than_keys_and_values_are_not_kept(tmp_path):
    directory = write_tiny_model(tmp_path / "m", config=config(kv_lora_rank=200, num_hidden_layers=1))
    assert not find_latent_layers(network_of(directory), ATTENTION_NAME)


def test_one_side_is_held_once_while_tails_grow(directory):
    model = LanguageModel.load(directory, model_id="latent")
    state, other, paged = model.new_state(), model.new_state(), model.new_session_state()
    ids, states = torch.arange(300) % 250, (state, paged)
    for part in torch.split(ids, [100, 1, 199]):
        found = [model.forward(part.tolist(), one) for one in states]
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    expected = model.forward(ids.tolist(), other)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert all(keys is values for keys, values in zip(state.tail.keys, state.tail.values, strict=True))
    assert all(keys is values for keys, values in zip(model.pages.keys, model.pages.values, strict=True))
    assert state.tail.num_bytes == state.tail.capacity * model.kv_bytes_per_token
    assert model.pages.page_bytes == 32 * model.kv_bytes_per_token == 32 * 2 * 24 * 4
    prefix = ResidentPrefix.from_tail(state.tail, ids.numpy())
    assert prefix.num_bytes == state.tail.num_bytes


@pytest.mark.parametrize("codec", ["lossless", "int8", "int4"])
def test_a_cache_is_held_once_wherever_it_is(engine, codec, tmp_path):
    report = engine.build([tmp_path / "a.txt"], name="a", codec=codec)
    told = []
    with engine.open("a", make_room=lambda manifest, num_bytes: told.append(num_bytes)) as prefix:
        assert told == [prefix.resident.num_bytes]
        keys, values = prefix.resident.layer(0)
        assert keys is values and keys.shape == (1, report.num_tokens, 24)
        assert prefix.resident.num_bytes == report.num_tokens * engine.model.kv_bytes_per_token
        answer = prefix.ask("Why?", OPTIONS)
        with engine.store.reader(prefix.manifest) as reader:
            sizes = [(1, reader.num_tokens, 24)] * 2
            memory = HostBuffers.of(sizes, torch.float32, torch.device("cpu"), sides=1)
            sent = HostBuffers(memory._device, through_host=True)
            reader.load(sent.views(), sent.arrived)
            again = sent.host_copy()
            assert again.num_bytes == prefix.resident.num_bytes
            plan = plan_load(reader, engine.model.kv_shapes, torch.float32, torch.device("cpu"))
            promoted = ResidentPrefix.promote(again, plan)
            promoted.wait()
        assert promoted.num_bytes == prefix.resident.num_bytes
        assert torch.equal(promoted.layer(1)[0], prefix.resident.layer(1)[0])
        prefix.resident = promoted
        assert prefix.ask("Why?", OPTIONS).token_ids == answer.token_ids


def test_gradients_pass_through_latents(tmp_path):
    """As calibration asks for them, in a model whose weights were widened for latents."""
    model = LanguageModel.load(write_tiny_model(tmp_path, config=config(), dtype=torch.bfloat16), model_id="m")
    layer = getattr(latents_in(model.network)[0], LATENT)
    query = torch.ones(4, 3, 24, requires_grad=True)
    layer.found(layer.asked(query)).sum().backward()
    assert query.grad[..., :16].all() and not query.grad[..., 16:].any()  # rotated parts are no values


def test_inspection_shows_keys_and_values(engine, directory, tmp_path, monkeypatch):
    engine.build([tmp_path / "a.txt"], name="a", codec="lossless")
    made = {}

    def expand(self, latents, rotated):
        made[self.layer_idx] = whole(self, latents, rotated)
        return made[self.layer_idx]

    whole = DeepseekV3Attention.expand_kv
    with engine.open("a") as prefix:
        monkeypatch.setattr(DeepseekV3Attention, "expand_kv", expand)
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.inference_mode():
            plain(input_ids=torch.tensor(prefix.token_ids)[None], use_cache=False)
        for layer in range(2):
            for found, expected in zip(prefix.keys_values(layer), made[layer], strict=True):
                torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)


def test_a_cache_of_before_is_refused_and_made_again(directory, tmp_path, expanded):
    """Its keys are not looked for among latents, nor its chunks taken for theirs."""
    (tmp_path / "a.txt").write_text(TEXT)
    store = Store.open(tmp_path / "store")
    now = LanguageModel.load(directory, model_id="latent")
    expanded()
    before = LanguageModel.load(directory, model_id="latent")
    assert [shape.sides for shape in before.kv_shapes] == [2, 2]
    old = Engine(before, store).build([tmp_path / "a.txt"], name="a", codec="lossless")
    with pytest.raises(CacheMismatch, match="shape of keys and values"):
        Engine(now, store).open("a")
    new = Engine(now, store).build([tmp_path / "a.txt"], name="a", codec="lossless")
    assert (new.reused_tokens, new.num_tokens) == (0, old.num_tokens)
    assert new.stored_bytes < old.stored_bytes / 2
    with Engine(now, store).open("a") as prefix:
        assert prefix.ask("Why?", OPTIONS).usage.cached_tokens == new.num_tokens
    with pytest.raises(CacheMismatch, match="shape of keys and values"):
        Engine(before, store).open("a")


def test_updates_and_resumed_builds_go_on_behind_latents(engine, tmp_path):
    first = engine.build([tmp_path / "a.txt"], name="a", codec="lossless")
    _, before = engine.store.resolve("a")
    (tmp_path / "b.txt").write_text("The valve closes at nine.\n" * 30)
    report = engine.build([tmp_path / "a.txt", tmp_path / "b.txt"], name="a", codec="lossless")
    _, after = engine.store.resolve("a")
    whole = first.num_tokens // 512
    assert whole >= 2 and report.reused_tokens >= whole * 512 - 512
    fresh = Engine(engine.model, Store.in_memory())
    fresh.build([tmp_path / "a.txt", tmp_path / "b.txt"], name="a", codec="lossless")
    _, alone = fresh.store.resolve("a")
    assert [chunk.header_checksum for chunk in alone.chunks] == [chunk.header_checksum for chunk in after.chunks]
    assert before.chunks[0] == after.chunks[0]


@pytest.mark.parametrize("compute_dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_wide_latents_alone_and_in_company(compute_dtype, tmp_path):
    """As they are in use: of 576 numbers in 16 bits."""
    (tmp_path / "a.txt").write_text(TEXT)
    directory = write_tiny_model(tmp_path / "m", config=config(**WIDE), dtype=torch.bfloat16, scale=0.1)
    options = ModelOptions(device="cpu", compute_dtype=compute_dtype)
    model = LanguageModel.load(directory, model_id="wide", options=options)
    assert model.kv_bytes_per_token == 2 * 576 * 2
    engine = Engine(model, Store.in_memory())
    model.stop_ids = frozenset()
    engine.build([tmp_path / "a.txt"], name="a", codec="int8")
    questions = ["Why?", "At how many bar does pump number 7 run, and who says so? " * 4, "x"]
    with engine.open("a") as prefix:
        alone = [prefix.ask(question, OPTIONS).token_ids for question in questions]
        assert [answer.token_ids for answer in prefix.ask_all(questions, OPTIONS)] == alone


def test_in_16_bits_no_more_is_lost_than_by_keys_and_values(tmp_path, expanded):
    """Against the network in float64, over the same weights in bfloat16."""
    directory = write_tiny_model(tmp_path / "m", config=config(**WIDE), dtype=torch.bfloat16, scale=0.1)
    options = ModelOptions(device="cpu", compute_dtype="bfloat16")
    ids = torch.randint(0, 250, (200,), generator=torch.Generator().manual_seed(1))
    oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.inference_mode():
        wanted = oracle(input_ids=ids[None], use_cache=False).logits[0]

    def error():
        model = LanguageModel.load(directory, model_id="m", options=options)
        state = model.new_state()
        parts = [model.forward(part.tolist(), state, num_logits=0) for part in torch.split(ids, 50)]
        return ((torch.cat(parts) - wanted).norm() / wanted.norm()).item(), model.kv_shapes[0].sides

    latent, sides = error()
    expanded()
    plain, others = error()
    assert (sides, others) == (1, 2)
    assert latent <= 1.1 * plain and math.isfinite(latent)


def test_hybrids_have_latents_too(tmp_path):
    directory = write_tiny_model(tmp_path / "m", config=HYBRIDS["kimi_linear"]())
    (tmp_path / "a.txt").write_text(TEXT)
    engine = Engine.load(str(directory), store=tmp_path / "store", device="cpu")
    (shape,) = engine.model.kv_shapes
    assert (shape.num_kv_heads, shape.head_dim, shape.sides) == (1, 16 + 8, 1)
    engine.build([tmp_path / "a.txt"], name="a", codec="int8")
    _, manifest = engine.store.resolve("a")
    assert manifest.to_json()["schema"] == 3 and manifest.states is not None
    with engine.open("a") as prefix:
        assert prefix.ask("Why?", OPTIONS).usage.cached_tokens == manifest.num_tokens
    engine.store.verify("a").raise_first()


def test_layers_that_give_way_keep_their_own_latents(directory, monkeypatch):
    """A build pauses in each layer, and the forward of an answer runs all of them meanwhile."""
    model = LanguageModel.load(directory, model_id="latent")
    ids, others = torch.arange(40) % 250, torch.arange(7) + 3
    alone = model.forward(ids.tolist(), model.new_state(), num_logits=0)
    beside = model.forward(others.tolist(), model.new_state(), num_logits=0)
    found = []

    def pause(_num_tokens):
        if not pauses:
            return
        pauses.pop()
        state = model.new_state()
        state.begin(len(others))
        found.append(model._network_forward(others, torch.arange(len(others)), state, 0))

    pauses = [1]
    monkeypatch.setattr(model.turns, "pause", pause)
    assert torch.equal(model.forward(ids.tolist(), model.new_state(), num_logits=0), alone)
    assert torch.equal(found[0], beside)
