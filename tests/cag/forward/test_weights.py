"""Weights packed or side by side, and the quick forward for few rows, against plain transformers in float32."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from cag import model as model_module
from cag.forward import batch
from cag.forward.batch import TAIL_PAIRS
from cag.forward.decoder import recognize
from cag.forward.decoder_layers import SeenLayer, Turning
from cag.forward.state import AttentionRule
from cag.forward.weights import (
    LibraryProduct,
    PackedLinear,
    WidenedEmbedding,
    join_network,
    joined_product,
    pack_network,
    plain_weight,
)
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel, ModelOptions
from cag.residency.resident import ResidentPrefix
from cag_kernels import DensePrefix, dot_linear, has_compiler, has_dots, has_tiles, pack_weight, tile_linear
from cag_store.scratch import HUGE_PAGE_BYTES
from tiny import write_tiny_model

pytestmark = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")

SHARED = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 257, "eos_token_id": 257}
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]
SHORT_TAIL_PAIRS = 2048  # for tails that are attended to in two parts here
SHARED_PHI3 = {key: value for key, value in SHARED.items() if key != "head_dim"} | {"hidden_size": 128}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHARED, tie_word_embeddings=True),
    "llama with biases": lambda: LlamaConfig(**SHARED, attention_bias=True, mlp_bias=True),
    "llama3 rope": lambda: LlamaConfig(
        **SHARED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**SHARED, sliding_window=150),
    "qwen2": lambda: Qwen2Config(**SHARED),
    "qwen3": lambda: Qwen3Config(**SHARED),
    "gemma3": lambda: Gemma3TextConfig(**SHARED, sliding_window=40, layer_types=LAYER_TYPES),
    "phi3": lambda: Phi3Config(**SHARED_PHI3),
    "olmo2": lambda: Olmo2Config(**SHARED),
    "olmo3": lambda: Olmo3Config(**SHARED, sliding_window=40, layer_types=LAYER_TYPES),
    "smollm3": lambda: SmolLM3Config(**SHARED, no_rope_layers=[1, 1, 0]),
}
HAS_OWN = has_tiles() or has_dots()
OWN_PRODUCT = "dots" if has_dots() and not has_tiles() else "tiles"  # our own of plain weights
FINER = {torch.float16: 2**-3, torch.float32: 2**-9}  # types besides bfloat16, and what they round of what that does
OTHERS = {
    "gemma2": lambda: Gemma2Config(**SHARED, sliding_window=400),
}


def use_plan(monkeypatch, compute_dtype, product):
    """Whatever this machine computes best with, a test runs this."""
    plan = RuntimePlan("cpu", compute_dtype, 1, 1, product, {}, "for tests")
    monkeypatch.setattr(model_module, "plan_runtime", lambda _device: plan)


@pytest.fixture(autouse=True)
def packed_plan(monkeypatch):
    """Packed weights, where a test asks for nothing else."""
    use_plan(monkeypatch, "float32", "packed")


@pytest.fixture(params=["packed", "plain", "transposed", OWN_PRODUCT])
def each_product(request, monkeypatch):
    """Packed weights, and each kind of product in bfloat16 (tiles, where there are no others, are transposed)."""
    if request.param != "packed":
        use_plan(monkeypatch, "bfloat16", request.param)
    return request.param


def bfloat16_model(directory, config, seed=0):
    """A random model saved in bfloat16, as the engine loads it."""
    write_tiny_model(directory, config=config, seed=seed, dtype=torch.bfloat16)
    return LanguageModel.load(directory, model_id="tiny")


def plain_logits(directory, ids):
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return plain(input_ids=ids[None]).logits[0]


def random_ids(count, seed=0):
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed))


def assert_same(found, expected, roundings=1):
    """Keys and values are kept in bfloat16, so a little is lost on the way; more where products are of bfloat16."""
    difference = (found.log_softmax(-1) - expected.log_softmax(-1)).abs()
    assert difference.mean() < 0.02 * roundings * expected.std()
    assert difference.max() < 0.2 * roundings * expected.std()


@pytest.mark.parametrize("kind", [*CONFIGS, *OTHERS])
def test_logits_are_those_of_plain_transformers(kind, each_product, tmp_path):
    """One after the other: many tokens at once, a question, single tokens; and every token alone."""
    model = bfloat16_model(tmp_path, (CONFIGS | OTHERS)[kind]())
    assert (model.decoder is not None) == (kind in CONFIGS)
    ids = random_ids(190)
    expected = plain_logits(tmp_path, ids)
    state = model.new_state()
    parts = [ids[:140], ids[140:157], ids[157:158], ids[158:159], ids[159:]]
    found = torch.cat([model.forward(part, state, num_logits=0) for part in parts])
    assert_same(found, expected, roundings=1 if each_product == "packed" else 4)


@pytest.mark.parametrize("stored", FINER)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("long", [False, True])
def test_models_stored_in_other_types(kind, stored, long, tmp_path):
    """Finer than bfloat16: so much nearer they are to plain transformers. `long`: also a tail in two parts."""
    write_tiny_model(tmp_path, config=CONFIGS[kind](), dtype=stored)
    model = LanguageModel.load(tmp_path, model_id="tiny")
    assert model.decoder is not None
    assert model.rows_stay_apart
    ids = random_ids(260 if long else 80)
    first = 200 if long else 40
    state, parts = model.new_state(), [ids[:first], ids[first : first + 1], ids[first + 1 :]]
    found = torch.cat([model.forward(part, state, num_logits=0) for part in parts])
    assert_same(found, plain_logits(tmp_path, ids), roundings=FINER[stored])


@pytest.mark.parametrize("product", ["plain", "transposed", OWN_PRODUCT])
def test_float16_where_products_are_of_bfloat16(product, tmp_path, monkeypatch):
    """Rows meet keys in float16 in float32: no product of bfloat16 takes these."""
    use_plan(monkeypatch, "bfloat16", product)
    write_tiny_model(tmp_path, config=CONFIGS["llama"](), dtype=torch.float16)
    model = LanguageModel.load(tmp_path, model_id="tiny")
    assert model.decoder._attends_in == torch.float32
    assert model.kv_dtype == torch.float16
    ids, state = random_ids(80), model.new_state()
    found = torch.cat([model.forward(part, state, num_logits=0) for part in (ids[:40], ids[40:41], ids[41:])])
    assert_same(found, plain_logits(tmp_path, ids), roundings=4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_quick_forward_is_nearer_to_float32_than_a_network_in_bfloat16(kind, tmp_path, monkeypatch):
    use_plan(monkeypatch, "bfloat16", OWN_PRODUCT)
    model = bfloat16_model(tmp_path, CONFIGS[kind]())
    ids = random_ids(60, seed=1)
    expected = plain_logits(tmp_path, ids)
    quick = model.forward(ids, model.new_state(), num_logits=0)
    model.decoder = None
    own = model.forward(ids, model.new_state(), num_logits=0)
    assert (quick - expected).norm() <= 1.05 * (own - expected).norm()


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_quick_forward_gives_the_networks_own_logits(kind, tmp_path):
    """The same weights, the same cached keys: only the order of sums differs."""
    model = bfloat16_model(tmp_path, CONFIGS[kind]())
    prefix, ids = random_ids(60, seed=1), random_ids(30, seed=2)
    quick, own = model.new_state(), model.new_state()
    for state in (quick, own):
        model.forward(prefix, state)
    decoder, model.decoder = model.decoder, None
    expected = torch.cat([model.forward(part, own, num_logits=0) for part in (ids[:20], ids[20:21], ids[21:])])
    model.decoder = decoder
    found = torch.cat([model.forward(part, quick, num_logits=0) for part in (ids[:20], ids[20:21], ids[21:])])
    assert_same(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 0.02)
    assert quick.num_tokens == own.num_tokens == 90


def test_a_long_tail_is_attended_in_two_parts(tmp_path, monkeypatch):
    """Above `TAIL_PAIRS` the tail's earlier tokens are a segment of their own."""
    monkeypatch.setattr(batch, "TAIL_PAIRS", SHORT_TAIL_PAIRS)
    model = bfloat16_model(tmp_path, CONFIGS["llama"]())
    ids = random_ids(SHORT_TAIL_PAIRS // 8 + 40)
    state = model.new_state()
    parts = [ids[: SHORT_TAIL_PAIRS // 8], ids[SHORT_TAIL_PAIRS // 8 :]]
    found = torch.cat([model.forward(part, state, num_logits=0) for part in parts])
    assert_same(found, plain_logits(tmp_path, ids))


WINDOWS = {  # shorter than what is asked
    "mistral": lambda: MistralConfig(**SHARED, sliding_window=50),
    "gemma3": lambda: Gemma3TextConfig(**SHARED, sliding_window=40, layer_types=LAYER_TYPES),
    "olmo3": lambda: Olmo3Config(**SHARED, sliding_window=33, layer_types=LAYER_TYPES),
    "phi3": lambda: Phi3Config(**{**SHARED_PHI3, "sliding_window": 64}),
}


@pytest.mark.parametrize("tail_pairs", [TAIL_PAIRS, SHORT_TAIL_PAIRS])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_are_those_of_plain_transformers(kind, each_product, tail_pairs, tmp_path, monkeypatch):
    """Question and answer cross the window, behind nothing: in one part, with a long tail apart, token by token."""
    monkeypatch.setattr(batch, "TAIL_PAIRS", tail_pairs)
    model = bfloat16_model(tmp_path, WINDOWS[kind]())
    assert model.decoder is not None
    assert any(rule.window is not None for rule in model.rules)
    ids = random_ids(300)
    state = model.new_session_state()
    parts = [ids[:20], ids[20:100], ids[100:228], ids[228:260], *ids[260:].split(1)]
    found = torch.cat([model.forward(part, state, num_logits=0) for part in parts])
    assert_same(found, plain_logits(tmp_path, ids), roundings=1 if each_product == "packed" else 4)


@pytest.mark.parametrize("num_prefix", [20, 90, 200])
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_reach_into_a_prefix(kind, num_prefix, each_product, tmp_path):
    """Or end behind it, once an answer is long enough; the prefix in two segments, of which the second is short."""
    model = bfloat16_model(tmp_path, WINDOWS[kind]())
    ids = random_ids(num_prefix + 100)
    state = model.new_state()
    model.forward(ids[:num_prefix], state)
    sides = [state.tail.gathered(layer, num_prefix) for layer in range(len(model.kv_shapes))]
    cuts = slice(None, num_prefix - 8), slice(num_prefix - 8, None)
    layers = [tuple(DensePrefix(*(side[:, cut].contiguous() for side in pair)) for cut in cuts) for pair in sides]
    prefix = ResidentPrefix(layers, ids[:num_prefix].numpy())
    prefix.mark_loaded()
    behind = model.new_session_state(prefix)
    parts = [ids[num_prefix : num_prefix + 30], *ids[num_prefix + 30 :].split(1)]
    found = torch.cat([model.forward(part, behind, num_logits=0) for part in parts])
    recorded = each_product == "packed" or (each_product == OWN_PRODUCT and HAS_OWN)
    assert bool(model.decoder._recorded._found) == recorded
    expected = plain_logits(tmp_path, ids)[num_prefix:]
    assert_same(found, expected, roundings=1 if each_product == "packed" else 4)


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_head_dimensions_that_are_attended_in_float32(head_dim, monkeypatch, tmp_path):
    """By compiled code: no product of bfloat16 takes them, and a library's is slower."""
    use_plan(monkeypatch, "bfloat16", OWN_PRODUCT)
    model = bfloat16_model(tmp_path, LlamaConfig(**SHARED | {"head_dim": head_dim, "num_attention_heads": 2}))
    assert model.decoder._attends_in == torch.float32
    assert model.rows_stay_apart == HAS_OWN
    ids, state = random_ids(120), model.new_state()
    parts = [ids[:80], ids[80:100], *ids[100:].split(1)]
    found = torch.cat([model.forward(part, state, num_logits=0) for part in parts])
    assert_same(found, plain_logits(tmp_path, ids), roundings=4)


def test_a_window_that_hides_nothing_is_none(tmp_path):
    model = bfloat16_model(tmp_path, MistralConfig(**SHARED, sliding_window=512, max_position_embeddings=512))
    assert [rule.window for rule in model.rules] == [None] * 3
    narrow = bfloat16_model(tmp_path, MistralConfig(**SHARED, sliding_window=511, max_position_embeddings=512))
    assert [rule.window for rule in narrow.rules] == [511] * 3


@pytest.mark.parametrize("part", ["norm", "layers.0.mlp", "layers.1.self_attn.o_proj", "embed_tokens"])
@pytest.mark.parametrize("factor", [0.9, 1.5])
def test_another_formula_is_noticed(part, factor, each_product, tmp_path):
    """A network that has Llama's parts but computes something else keeps its own forward."""
    model = bfloat16_model(tmp_path, CONFIGS["llama"]())
    assert model.decoder is not None
    if part == "embed_tokens":  # whose output the quick forward asks for too: scale what the first layer is given
        layer = model.network.model.layers[0]
        layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor, *inputs[1:]))
    else:
        module = model.network.model.get_submodule(part)
        module.register_forward_hook(lambda _module, _inputs, output: output * factor)
    assert model._checked_decoder() is None


def test_a_cap_of_logits_is_noticed(each_product, tmp_path):
    """Also where the probe's own logits are far below it."""
    model = bfloat16_model(tmp_path, Gemma3TextConfig(**SHARED, layer_types=LAYER_TYPES))
    assert model.decoder is not None
    model.network.config.final_logit_softcapping = 5e3
    assert model._checked_decoder() is None


@pytest.mark.parametrize("kind", ["gemma3", "olmo3"])
def test_another_formula_is_noticed_in_the_only_layer_of_its_kind(kind, each_product, tmp_path):
    """Which is the last one: behind all layers a network in bfloat16 may be far from itself."""
    model = bfloat16_model(tmp_path, CONFIGS[kind]())
    layer = model.network.model.layers[2]
    with torch.no_grad():
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.mul_(0.3)  # a layer that changes little does not show far behind it
    assert model._checked_decoder() is not None
    layer.mlp.register_forward_hook(lambda _module, _inputs, output: output * output.abs())
    assert model._checked_decoder() is None


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_queries_that_positions_scale_are_noticed(kind, tmp_path, monkeypatch):
    """As some networks do beyond the length that they were trained with: no probe token stands there."""
    model = bfloat16_model(tmp_path, CONFIGS[kind]())
    attention = type(model.network.model.layers[2].self_attn)
    own = attention.forward

    def stretched(self, *given, cag_state, **named):
        far = named["position_embeddings"][1].abs().sum(-1, keepdim=True)[:, None] > 0

        class State:
            def attend(_self, layer, query, *others, **rule):
                return cag_state.attend(layer, torch.where(far[0], query * 1.1, query), *others, **rule)

            def __getattr__(_self, name):  # what probes ask
                return getattr(cag_state, name)

        return own(self, *given, cag_state=State(), **named)

    monkeypatch.setattr(attention, "forward", stretched)
    monkeypatch.setenv("CAG_HOME", str(tmp_path / "home without the start that was kept"))
    assert LanguageModel.load(tmp_path, model_id="tiny").decoder is None


def test_an_embedding_that_scales_its_rows_stays_in_16_bits(tmp_path):
    model = bfloat16_model(tmp_path, CONFIGS["gemma3"]())
    embedding = model.network.model.embed_tokens
    assert isinstance(embedding, WidenedEmbedding)
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding.scale == torch.tensor(64**0.5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(embedding(torch.arange(9)), plain.model.embed_tokens(torch.arange(9)))


def test_weights_take_the_bytes_that_were_stored(tmp_path):
    model = bfloat16_model(tmp_path, CONFIGS["qwen2"]())
    linear = [module for module in model.network.modules() if isinstance(module, PackedLinear)]
    assert len(linear) == 7 * 3 + 1
    assert all(module.packed.panels.dtype == torch.bfloat16 for module in linear)
    assert isinstance(model.network.model.embed_tokens, WidenedEmbedding)
    assert model.network.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.network.model.norm.weight.dtype == torch.float32
    assert model.compute_dtype == torch.float32
    attention = model.network.model.layers[0].self_attn
    panels = {layer.packed.panels.untyped_storage().data_ptr() for layer in (attention.q_proj, attention.k_proj)}
    assert len(panels) == 1  # side by side, not twice
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(attention.k_proj.weight, plain.model.layers[0].self_attn.k_proj.weight)


def test_layers_that_are_not_neighbours_are_not_joined():
    left, right = (PackedLinear(pack_weight(torch.ones(16, 16)), None) for _ in range(2))
    assert joined_product([left, right], "packed") is None
    assert joined_product([left, torch.nn.Linear(16, 16)], "packed") is None
    plain = [torch.nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(2)]
    assert joined_product(plain, "plain") is None
    assert joined_product(plain[:1], "plain") is not None
    assert joined_product([torch.nn.Linear(16, 16)], "plain") is None


@pytest.mark.skipif(not HAS_OWN, reason="no products of bfloat16")
def test_plain_weights_are_multiplied_by_compiled_code_where_it_takes_them():
    layer = torch.nn.Linear(64, 48, dtype=torch.bfloat16)
    bare, odd = (torch.nn.Linear(*size, bias=False, dtype=torch.bfloat16) for size in ((64, 48), (40, 48)))
    rows, linear = torch.randn(5, 64), dot_linear if OWN_PRODUCT == "dots" else tile_linear
    product = joined_product([layer], OWN_PRODUCT)
    assert product.is_recordable
    assert torch.equal(product(rows), linear(rows, layer.weight, layer.bias.float()))
    assert plain_weight(product) is None
    assert plain_weight(joined_product([bare], OWN_PRODUCT)).data_ptr() == bare.weight.data_ptr()
    for other in (joined_product([odd], OWN_PRODUCT), joined_product([bare], "plain")):
        assert isinstance(other, LibraryProduct)
        assert plain_weight(other) is None


def test_weights_side_by_side_take_no_more_memory(monkeypatch, tmp_path):
    use_plan(monkeypatch, "bfloat16", "plain")
    model = bfloat16_model(tmp_path, CONFIGS["qwen2"]())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, expected in zip(model.network.model.layers, plain.model.layers, strict=True):
        for part, names in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
            weights = [getattr(getattr(layer, part), name).weight for name in names]
            assert all(left.data_ptr() + left.nbytes == right.data_ptr() for left, right in pairwise(weights))
            for name, weight in zip(names, weights, strict=True):
                assert torch.equal(weight, getattr(getattr(expected, part), name).weight)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.network.parameters()}
    padding = 64 * len(list(model.network.parameters()))
    assert sum(memory.values()) <= sum(p.nbytes for p in plain.parameters()) + padding + HUGE_PAGE_BYTES


@pytest.mark.parametrize("stored", FINER)
def test_other_types_of_weights_stay_as_they_are(stored, tmp_path):
    write_tiny_model(tmp_path, config=CONFIGS["qwen2"](), dtype=stored)
    model = LanguageModel.load(tmp_path, model_id="tiny")
    linear = [module for module in model.network.modules() if isinstance(module, PackedLinear)]
    assert len(linear) == 7 * 3 + 1
    assert {module.packed.panels.dtype for module in linear} == {stored}
    assert model.network.model.embed_tokens.weight.dtype == stored
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored)
    assert torch.equal(linear[0].weight, plain.model.layers[0].self_attn.q_proj.weight)
    assert (model.kv_dtype, model.compute_dtype) == (stored, torch.float32)


def test_an_adapter_keeps_the_quick_forward(tmp_path):
    """Of a model in 16 bits, which merged weights are not."""
    peft = pytest.importorskip("peft")
    directory = write_tiny_model(tmp_path / "model", config=CONFIGS["llama"](), dtype=torch.bfloat16)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(network, config)
    adapted.save_pretrained(tmp_path / "adapter")
    model = LanguageModel.load(directory, model_id="tiny", options=ModelOptions(adapter=tmp_path / "adapter"))
    assert model.rows_stay_apart
    ids, state = random_ids(60), model.new_state()
    found = torch.cat([model.forward(part, state, num_logits=0) for part in (ids[:40], ids[40:41], ids[41:])])
    with torch.inference_mode():
        assert_same(found, adapted.merge_and_unload()(input_ids=ids[None]).logits[0])
    assert {m.packed.panels.dtype for m in model.network.modules() if isinstance(m, PackedLinear)} == {torch.float32}


@pytest.mark.parametrize("compute_dtype, product", [("float32", "packed"), ("bfloat16", OWN_PRODUCT)])
@pytest.mark.parametrize("tuned", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_an_adapter_on_one_side_of_tied_embeddings_leaves_the_other(
    tuned, compute_dtype, product, tmp_path, monkeypatch
):
    """As before it was merged: embedding and output matrix share their weight, not what an adapter adds."""
    peft = pytest.importorskip("peft")
    use_plan(monkeypatch, compute_dtype, product)
    directory = write_tiny_model(tmp_path / "model", config=CONFIGS["llama"](), dtype=torch.bfloat16, scale=0.1)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", *tuned], init_lora_weights=False)
    adapted = peft.get_peft_model(network, config)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = LanguageModel.load(directory, model_id="tiny", options=ModelOptions(adapter=tmp_path / "adapter"))
    assert model.decoder is not None
    ids = random_ids(60)
    with torch.inference_mode():
        expected = adapted(input_ids=ids[None]).logits[0]
    found = model.forward(ids, model.new_state(), num_logits=0)
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_another_compute_type_is_obeyed(tmp_path):
    bfloat16_model(tmp_path, CONFIGS["llama"]())
    model = LanguageModel.load(tmp_path, model_id="tiny", options=ModelOptions(compute_dtype="bfloat16"))
    assert not any(isinstance(module, PackedLinear) for module in model.network.modules())
    assert model.compute_dtype == torch.bfloat16


def test_a_network_with_odd_sizes_is_packed_where_it_can_be(tmp_path):
    settings = SHARED | {"intermediate_size": 90, "head_dim": 8}
    model = bfloat16_model(tmp_path, LlamaConfig(**settings))
    kinds = {type(module) for module in model.network.model.layers[0].mlp.children()}
    assert torch.nn.Linear in kinds
    assert PackedLinear in kinds
    assert model.decoder is None
    ids = random_ids(40)
    assert_same(model.forward(ids, model.new_state(), num_logits=0), plain_logits(tmp_path, ids))


def test_only_whole_networks_are_recognized(tmp_path):
    network = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.bfloat16)
    seen = [SeenLayer(AttentionRule(32**-0.5), Turning())] * 3
    assert recognize(network, 32, seen) is None  # its weights do not lie side by side
    joined = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.bfloat16)
    join_network(joined)
    assert recognize(joined, 32, seen) is not None
    pack_network(network)
    assert recognize(network, 32, seen) is not None
    assert recognize(network, 32, [*seen[:2], SeenLayer(AttentionRule(32**-0.5, softcap=30.0), Turning())]) is None
    network.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert recognize(network, 32, seen) is None
