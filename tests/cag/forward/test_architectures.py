"""Families of networks behind one attention: what they give is what transformers gives, or they are refused by name.

Sinks (gpt-oss), latents in the place of keys and values (DeepSeek and others), layers that share keys and values (Gemma
3n and 4), heads of another size in some layers, experts, learned positions, layers without positions: each through the
store, in company, and in the padded steps of a GPU.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from cag.engine import Engine
from cag.errors import UnsupportedModel
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.model import LanguageModel, ModelOptions
from cag.prompt import question_ids
from cag.residency.resident import ResidentPrefix
from tiny import write_tiny_model

SHARED = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
SHARED |= {"pad_token_id": 257, "eos_token_id": 257, "bos_token_id": 256}
HEADS = SHARED | {"head_dim": 16}
LATENT = SHARED | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
LATENT |= {"v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
LATENT |= {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LONGCAT = {"num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2}
LONGCAT |= {"zero_expert_num": 2, "n_routed_experts": 4, "head_dim": 8, "num_key_value_heads": 4}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6, "sliding_window": 24}
PER_LAYER_INPUT = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 258}

FAMILIES = {
    "afmoe": HEADS | {"sliding_window": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "cohere2": HEADS | {"sliding_window": 24},
    "deepseek_v2": LATENT | {"topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "gemma3n_text": HEADS
    | ALTERNATING
    | PER_LAYER_INPUT
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": None, "laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4_text": HEADS | ALTERNATING | PER_LAYER_INPUT | {"num_kv_shared_layers": 2, "global_head_dim": 32},
    "glm4_moe_lite": LATENT,
    "gpt2": {"vocab_size": 258, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 2048, "eos_token_id": 257},
    "gpt_oss": HEADS | {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": HEADS,
    "longcat_flash": SHARED | {name: LATENT[name] for name in LATENT if "head_dim" in name or "rank" in name} | LONGCAT,
    "minicpm3": LATENT,
    "olmo2": SHARED,
    "opt": SHARED | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": SHARED | {"partial_rotary_factor": 0.5},
    "phimoe": SHARED | {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "smollm3": SHARED | {"no_rope_layer_interval": 2},
    "youtu": LATENT,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_k": 2}
EXPERTS |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1}
EXPERTS |= {"moe_num_experts": 4, "moe_topk": 2, "n_shared_experts": 1}
WINDOWED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
OTHERS = {  # that docs/models.md names: what they have besides the sizes of all
    "apertus": {},
    "cohere": {},
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS,
    "exaone4": WINDOWED | {"sliding_window_pattern": 2},
    "gemma": {},
    "gemma2": WINDOWED,
    "gemma3_text": WINDOWED,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "gpt_neox": {},
    "granite_swa": {"sliding_window": 24},
    "granitemoe": EXPERTS,
    "hunyuan_v1_dense": {},
    "llama": {},
    "mimo_v2_flash": EXPERTS | {"sliding_window": 24},
    "minimax_m2": EXPERTS,
    "ministral": {"sliding_window": 24},
    "ministral3": {},
    "mistral": {"sliding_window": 24},
    "mixtral": EXPERTS | {"sliding_window": 24},
    "olmo": {},
    "olmo3": WINDOWED,
    "olmoe": EXPERTS,
    "phi3": {"sliding_window": 24},
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "seed_oss": {},
    "solar_open": EXPERTS,
    "starcoder2": {"sliding_window": 24},
}
LATENTS = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
OFTEN = ("gpt_oss", "gemma4_text", "deepseek_v3", "gpt2", "qwen3_moe")  # one for each thing that differs
FROM_THE_STORE = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
OWN_LAYERS = {"gemma3n_text": 4, "gemma4_text": 4}  # that make keys and values; the others share them
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
    ),
]
TEXT = "The alpha gate opens at seven. Its code is 4711. The beta pump moves 30 litres an hour.\n"
QUESTIONS = ["Who opens the gate?", "Why?", "How many litres does the pump move in a day, and who counts them? " * 2]


def directory_of(family, root):
    """A random model of a family; its numbers are large enough for sinks and masks to matter."""
    return write_tiny_model(root / family, config=AutoConfig.for_model(family, **FAMILIES[family]))


def config_of(family):
    """Of any family that is served."""
    if family in FAMILIES:
        return AutoConfig.for_model(family, **FAMILIES[family])
    own, sizes = OTHERS[family], AutoConfig.for_model(family)
    known = {name for name in (*HEADS, *own) if hasattr(sizes, name)}
    return AutoConfig.for_model(family, **{name: size for name, size in (HEADS | own).items() if name in known})


def plain_network(directory):
    """The same weights behind transformers' own attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def assert_close(found, expected):
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def greedy(network, ids, num_tokens):
    """Plain transformers, the whole prompt again for each token."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(network(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[-num_tokens:])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_blocks_are_those_of_one_forward(family, tmp_path):
    directory = directory_of(family, tmp_path)
    model, plain = LanguageModel.load(directory, model_id=family), plain_network(directory)
    ids = torch.randint(0, 250, (90,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = plain(input_ids=ids[None], use_cache=False).logits[0]
    for make_state in (model.new_state, model.new_session_state):
        state = make_state()
        assert_close(model.forward(ids[:40].tolist(), state), expected[39:40])
        assert_close(model.forward(ids[40:70].tolist(), state, num_logits=0), expected[40:70])
        for place in range(70, 75):
            assert_close(model.forward([int(ids[place])], state), expected[place : place + 1])
        assert_close(model.forward(ids[75:].tolist(), state, num_logits=4), expected[-4:])
    assert len(model.kv_shapes) == OWN_LAYERS.get(family, len(model.seen))
    if family in LATENTS:
        assert model.kv_bytes_per_token == len(model.kv_shapes) * (16 + 8) * 4  # and not 4 * (24 + 16) numbers a layer


@pytest.mark.parametrize("family", FROM_THE_STORE)
def test_answers_from_the_store_are_those_of_plain_transformers(family, tmp_path):
    """Alone and in company; codes give answers as well, with their loss measured."""
    directory = directory_of(family, tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    engine = Engine.load(str(directory), store=tmp_path / "store", device="cpu")
    engine.model.stop_ids = frozenset()
    options = SamplingOptions(max_tokens=12)
    engine.build([tmp_path / "text.txt"], name="exact", codec="lossless")
    engine.build([tmp_path / "text.txt"], name="int8", codec="int8")
    with engine.open("exact") as prefix, engine.open("int8") as coded:
        alone = [prefix.ask(question, options) for question in QUESTIONS]
        plain = plain_network(directory)
        for question, answer in zip(QUESTIONS, alone, strict=True):
            suffix = question_ids(engine.model.tokenizer, prefix.template, question)
            assert answer.token_ids == greedy(plain, [*prefix.token_ids.tolist(), *suffix], 12)
            assert answer.usage.cached_tokens == len(prefix.token_ids)
        scheduler = Scheduler(engine.model)
        streams = [one.session().stream(question, options) for one in (prefix, coded) for question in QUESTIONS]
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
        scheduler.run()
        together = [s.finish(request).token_ids for s, request in zip(streams, requests, strict=True)]
        assert together == [one.ask(question, options).token_ids for one in (prefix, coded) for question in QUESTIONS]
        assert 0 <= coded.manifest.fidelity["mean_kl"] < 0.1
        for one in (prefix, coded):
            assert one.manifest.kv.sides == (1 if family in LATENTS else 2)
            assert one.manifest.raw_bytes == one.manifest.num_tokens * engine.model.kv_bytes_per_token


@pytest.mark.parametrize("family", FROM_THE_STORE)
def test_in_bfloat16_they_are_near(family, tmp_path):
    """As checkpoints come: weights, keys and values in 16 bits, whatever this machine computes in."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    directory = write_tiny_model(tmp_path / family, config=config, dtype=torch.bfloat16, scale=0.1)
    model, plain = LanguageModel.load(directory, model_id=family), plain_network(directory)
    ids = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = plain(input_ids=ids[None], use_cache=False).logits[0, -20:]
    state = model.new_session_state()
    model.forward(ids[:40].tolist(), state)
    found = model.forward(ids[40:].tolist(), state, num_logits=0)
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_loss_is_measured_where_a_network_with_layer_norms_computes_in_bfloat16(family, tmp_path):
    """In float32, whose rows meet weights in bfloat16."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    directory = write_tiny_model(tmp_path / family, config=config, dtype=torch.bfloat16, scale=0.1)
    (tmp_path / "text.txt").write_text(TEXT)
    engine = Engine.load(str(directory), store=tmp_path / "store", device="cpu", dtype="bfloat16")
    report = engine.build([tmp_path / "text.txt"], name="int8", codec="int8")
    assert 0 <= report.fidelity.mean_kl < 0.01


@pytest.mark.parametrize("family", ["cohere2", "phimoe"])
def test_sequences_together_want_the_logits_of_as_many_tokens_as_they_like(family, tmp_path):
    """Each is given what it is given alone; a network that has no quick forward, with and without experts."""
    model = LanguageModel.load(directory_of(family, tmp_path), model_id=family)
    assert model.decoder is None
    counts, wanted = [9, 1, 4], [5, 1, 2]
    parts = [(torch.arange(count) * 7 % 250).tolist() for count in counts]
    alone = [model.forward(p, model.new_session_state(), num_logits=n) for p, n in zip(parts, wanted, strict=True)]
    together = model.forward_together([(part, model.new_session_state()) for part in parts], num_logits=wanted)
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "deepseek_v3"])
def test_padded_steps_give_the_same(family, device, tmp_path):
    """What a GPU runs and records; on a CPU one by one."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    (tmp_path / "text.txt").write_text(TEXT)
    directory = directory_of(family, tmp_path)
    engine = Engine.load(str(directory), store=tmp_path / "store", device=device)
    engine.build([tmp_path / "text.txt"], name="text")
    model, prefix = engine.model, engine.open("text").resident
    if device == "cpu":
        model.run_in_steps(capture=False)
    assert model.replays is not None
    ids, plain = [torch.arange(count) * 7 % 250 for count in (5, 1, 12)], plain_network(directory)
    before = torch.as_tensor(prefix.token_ids)
    with torch.inference_mode():
        whole = [torch.cat([before, part])[None] for part in ids]
        expected = torch.cat([plain(input_ids=one, use_cache=False).logits[0, -1:] for one in whole])
    for _ in range(3):  # run, recorded and replayed
        chunks = [(part, model.new_session_state(prefix)) for part in ids]
        assert_close(model.forward_together(chunks).cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "deepseek_v3"])
@pytest.mark.parametrize("codec", ["auto", "transform"])
def test_codecs_that_look_at_the_model(family, codec, tmp_path):
    directory = directory_of(family, tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 6)
    engine = Engine.load(str(directory), store=tmp_path / "store", device="cpu")
    report = engine.build([tmp_path / "text.txt"], name="text", codec=codec)
    assert report.fidelity.mean_kl < 0.2
    with engine.open("text") as prefix:
        assert prefix.ask("Why?", SamplingOptions(max_tokens=3)).usage.cached_tokens == report.num_tokens


@pytest.mark.slow
@pytest.mark.parametrize("computed_in", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_every_way_gives_what_transformers_gives(family, computed_in, tmp_path):
    """In blocks beyond all windows, in company with other counts, and in branches, of all families that are served."""
    exactly = computed_in == "float32"
    stored, scale = (torch.float32, 0.3) if exactly else (torch.bfloat16, 0.1)
    directory = write_tiny_model(tmp_path / family, config=config_of(family), dtype=stored, scale=scale)
    model = LanguageModel.load(directory, model_id=family, options=ModelOptions(compute_dtype=computed_in))
    ids, plain = torch.randint(0, 250, (90,), generator=torch.Generator().manual_seed(2)), plain_network(directory)
    with torch.inference_mode():
        expected = plain(input_ids=ids[None], use_cache=False).logits[0]

    def assert_near(found, rows):
        assert (found - expected[rows]).norm() < (1e-3 if exactly else 0.3) * expected[rows].norm()

    state = model.new_state(capacity=60)
    assert_near(model.forward(ids[:60].tolist(), state), [59])
    prefix = ResidentPrefix.from_tail(state.tail, ids[:60].numpy())
    sessions = [model.new_session_state(prefix) for _ in range(2)]
    for first, count in ((60, 9), (69, 1), (70, 20)):
        found = model.forward(ids[first : first + count].tolist(), sessions[0], num_logits=0)
        assert_near(found, range(first, first + count))
    chunks = [(ids[60:69].tolist(), model.new_session_state(prefix)), (ids[60:61].tolist(), sessions[1])]
    assert_near(model.forward_together(chunks, num_logits=[5, 1]), [64, 65, 66, 67, 68, 60])
    branches = [ids[60:70].tolist(), ids[60:66].tolist()]
    assert_near(model.forward_branches(branches, prefix, [0, 9, 10, 15]), [60, 69, 60, 65])


DECODER_ALONE = {"is_encoder_decoder": False, "is_decoder": True, "decoder_layers": 3, "decoder_ffn_dim": 64}
REFUSED = {
    "bart": (DECODER_ALONE | {"decoder_attention_heads": 4}, "takes no positions"),
    "bert": ({}, "sees other tokens"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "none attend through"),
    "deepseek_v32": ({}, "indexed_attention|deepseek_sparse_attention"),  # by the version of transformers
    "diffllama": ({}, "attends more than once"),
    "doge": ({}, "sees other tokens"),
    "falcon": ({}, "none attend through"),
    "llama4_text": ({"num_local_experts": 2}, "chunked_attention"),
    "stablelm": ({}, "hands no keywords"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_attends_in_another_way_is_refused_by_name(family, tmp_path):
    """Rather than served wrongly."""
    changes, told = REFUSED[family]
    config = AutoConfig.for_model(family, **SHARED | changes)
    directory = write_tiny_model(tmp_path / family, config=config)
    with pytest.raises(UnsupportedModel, match=told):
        LanguageModel.load(directory, model_id=family)


@pytest.mark.parametrize("told", ["position_bias", "indices", "is_causal"])
def test_what_a_network_tells_its_attention_and_we_do_not_know_is_refused(told, tiny_model_dir):
    from cag.forward.attention_hook import _attend

    model, heads = LanguageModel.load(tiny_model_dir, model_id="tiny"), torch.zeros(1, 2, 3, 16)
    with pytest.raises(UnsupportedModel, match="way of its own"):
        _attend(
            model.network.model.layers[0].self_attn,
            heads,
            heads,
            heads,
            cag_state=model.new_state(capacity=8),
            **{told: False if told == "is_causal" else torch.ones(1)},
        )


def test_quick_forwards_are_not_taken_where_a_layer_has_sinks(tmp_path):
    """However small they are on the tokens that are compared."""
    model = LanguageModel.load(write_tiny_model(tmp_path / "m", dtype=torch.bfloat16), model_id="tiny")
    assert all(not seen.is_otherwise for seen in model.seen)
    directory = directory_of("gpt_oss", tmp_path)
    assert all(seen.is_otherwise for seen in LanguageModel.load(directory, model_id="gpt_oss").seen)
