"""Random networks of each architecture, written as llama.cpp's converter writes them, come out as they went in."""

from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from cag.errors import UnsupportedModel
from cag.model_files import read_network
from cag.models.convert import convert_gguf

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEADS = {"head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, **HEADS}
GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
    "logits_scaling": 8.0,
}
TWO_ROPES = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
LONG = {"long_factor": [1.0 + 2 * pair for pair in range(8)], "short_factor": [1.0 + pair / 64 for pair in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **LONG}

NETWORKS = {
    "llama": ("llama", "Llama", HEADS),
    "llama, biases": ("llama", "Llama", {"attention_bias": True}),
    "llama, Llama 3's RoPE": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama, linear RoPE": ("llama", "Llama", {"rope_parameters": LINEAR}),
    "llama, experts": ("llama", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen2, YaRN": ("qwen2", "Qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2moe": ("qwen2moe", "Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("qwen3moe", "Qwen3Moe", {**EXPERTS, **HEADS, "norm_topk_prob": True}),
    "gemma": ("gemma", "Gemma", {**HEADS, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", "Gemma2", WINDOWS),
    "gemma3": ("gemma3", "Gemma3Text", {**WINDOWS, "num_hidden_layers": 7, "rope_parameters": TWO_ROPES}),
    "phi3": ("phi3", "Phi3", {"sliding_window": 100, "original_max_position_embeddings": 256}),
    "phi3, LongRoPE": ("phi3", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    "granite": ("granite", "Granite", GRANITE),
    "olmo2": ("olmo2", "Olmo2", {}),
    "olmo2, windows": ("olmo2", "Olmo3", {"sliding_window": 8, "num_hidden_layers": 4}),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 4}),
    "seed_oss": ("seed_oss", "SeedOss", HEADS),
}


def random_network(name, changes):
    torch.manual_seed(0)
    # eager: transformers below 5.21 leaves score caps out otherwise
    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in network.parameters():
            values = torch.randn_like(parameter) * 0.2
            parameter.copy_(values.bfloat16())
    return network.float().eval()


def stored_tensors(network, architecture):
    """Names and values as they stand in a file, by the name map of the gguf package."""
    config = network.config
    (number,) = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, value in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        if architecture.startswith("gemma") and stem.endswith("norm"):
            value = value + 1
        if architecture in ("llama", "granite", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            head_dim = config.hidden_size // config.num_attention_heads
            value = value.reshape(-1, 2, head_dim // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if kind == "gate_up_proj":  # of experts
            gate, up = value.chunk(2, dim=1)
            yield f"{names.get_name(stem + '.gate_proj')}.weight", gate
            yield f"{names.get_name(stem + '.up_proj')}.weight", up
        elif kind == "down_proj":
            yield f"{names.get_name(name)}.weight", value
        else:
            yield f"{names.get_name(stem)}.{kind}", value[0] if "shared_expert_gate" in stem else value


def stored_fields(config, architecture):
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }
    if rope["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn" or architecture == "phi3":
        original = getattr(config, "original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        fields["rope.scaling.original_context_length"] = original
    if rope["rope_type"] == "longrope":
        fields["rope.scaling.attn_factor"] = (1 + 2 / 6) ** 0.5  # of a window 4 = 2^2 times as long as 64 = 2^6
    named = {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
    fields |= {key: getattr(config, name) for key, name in named.items() if getattr(config, name, None) is not None}
    if architecture in ("gemma2", "gemma3", "phi3") or config.model_type == "olmo3":
        fields["attention.sliding_window"] = config.sliding_window or 0
    if config.model_type == "olmo3":
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        fields |= {"attention.sliding_window_pattern": slides, "rope.freq_base_swa": rope["rope_theta"]}
    return fields


def small_tensors(config):
    """The factors that stand beside the weights."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return {"rope_freqs.weight": plain / scaled}


def write(path, network, architecture, vocabulary, more=None, **changes):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (stored_fields(network.config, architecture) | changes).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            kind = {str: "string", float: "float32", int: "uint32", bool: "bool"}[type(value)]
            getattr(writer, f"add_{kind}")(f"{architecture}.{key}", value)
    vocabulary(writer)
    for name, value in [
        *stored_tensors(network, architecture),
        *small_tensors(network.config).items(),
        *(more or {}).items(),
    ]:
        writer.add_tensor(name, value.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def vocabulary():
    """Adds a vocabulary of bytes and pairs of bytes to a file."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [f"<|{number}|>" for number in range(3)] + letters
    merges = [f"{left} {right}" for left, right in pairwise(letters)][: 300 - len(tokens)]
    tokens += [merge.replace(" ", "") for merge in merges]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)

    return add


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_logits_of_the_one_that_was_written(tmp_path, vocabulary, name):
    architecture, network_name, changes = NETWORKS[name]
    network = random_network(network_name, changes)
    convert_gguf(write(tmp_path / "model.gguf", network, architecture, vocabulary), out := made(tmp_path / "out"))
    ids = torch.arange(3, 43)[None] * 7 % 300
    with torch.inference_mode():
        expected, found = network(ids).logits, read_network(out, torch.float32)(ids).logits
    assert expected.std() > 0.01
    assert torch.equal(found, expected) or torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.std()))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.scaling.type": "dynamic"}, "scaled as 'dynamic'"),
        ({"rope.scaling.type": "longrope"}, "not the factors of a Phi-3"),
        ({"rope.dimension_count": 8}, "turns 8 of 16 dimensions"),
        ({"attention.value_length": 8}, "only 16 is known here"),
        ({"attention.causal": False}, "only True is known here"),
        ({"attention.temperature_scale": 0.1}, r"llama\.attention\.temperature_scale = 0\.1.*unknown here"),
        ({"block_count": None}, r"lacks the field llama\.block_count"),
        ({"feed_forward_length": [96, 96]}, "not one number"),
        ({"feed_forward_length": 128}, r"first difference: model\.layers\.0\.mlp\.down_proj"),
    ],
)
def test_what_a_file_says_and_nobody_knows_is_refused(tmp_path, vocabulary, change, message):
    path = write(tmp_path / "model.gguf", random_network("Llama", HEADS), "llama", vocabulary, **change)
    with pytest.raises(UnsupportedModel, match=message):
        convert_gguf(path, made(tmp_path / "out"))


def test_factors_that_are_not_those_of_llama_3_are_refused(tmp_path, vocabulary):
    changed = LLAMA3 | {"original_max_position_embeddings": 4096}
    network = random_network("Llama", {"rope_parameters": changed})
    path = write(tmp_path / "model.gguf", network, "llama", vocabulary)
    with pytest.raises(UnsupportedModel, match="not those of Llama 3"):
        convert_gguf(path, made(tmp_path / "out"))


def test_scores_that_are_multiplied_otherwise_are_refused(tmp_path, vocabulary):
    network = random_network("Phi3", NETWORKS["phi3, LongRoPE"][2])
    changed = {"rope.scaling.attn_factor": 1.5}
    path = write(tmp_path / "model.gguf", network, "phi3", vocabulary, **changed)
    with pytest.raises(UnsupportedModel, match=r"multiplies scores by 1\.5"):
        convert_gguf(path, made(tmp_path / "out"))


def test_a_tensor_without_a_place_is_refused(tmp_path, vocabulary):
    more = {"blk.0.attn_q_norm.weight": torch.ones(16)}
    path = write(tmp_path / "model.gguf", random_network("Llama", HEADS), "llama", vocabulary, more)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q_norm\.weight is not known"):
        convert_gguf(path, made(tmp_path / "out"))
