"""How llama.cpp's converter writes the networks of each architecture: configuration and the places of tensors.

In: the metadata of a GGUF file. Out: the configuration of the same network in transformers, and for each of its
parameters the rows of which tensor it is made of. Each field that a file has is read or refused: one that nobody
knows may mean another network. Knows names and numbers; reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cag.errors import UnsupportedModel
from cag.models.gguf_fields import SAFETENSORS_INSTEAD, Fields
from cag.models.gguf_file import GgufFile
from cag.models.gguf_rope import read_rope

Change = Literal["none", "halves apart", "minus one"]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_EXPERTS = {"ffn_gate_inp": "mlp.gate", "ffn_down_exps": "mlp.experts.down_proj"}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_NUM_HEADS = "attention.head_count"
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_BESIDE_WEIGHTS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


@dataclass(frozen=True)
class Family:
    """The networks of one architecture: their `model_type` in transformers, how `settings` of the configuration are
    read besides the common ones, and what is stored otherwise than transformers has it."""

    model_type: str
    settings: Callable[[Fields], dict[str, Any]] = lambda _fields: {}
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    heads_interleaved: bool = False  # rows of queries and keys, for RoPE of neighbours
    norms_plus_one: bool = False
    has_experts: bool = False


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor that a parameter is made of; `num_rows` None means all."""

    tensor: str
    first_row: int = 0
    num_rows: int | None = None
    change: Change = "none"


def family_of(fields: Fields) -> Family:
    """Raises: UnsupportedModel: an architecture that is not known here."""
    family = _FAMILIES.get(fields.architecture)
    if family is None:
        raise UnsupportedModel(
            f"GGUF files of architecture {fields.architecture!r} are not converted here.",
            hint=SAFETENSORS_INSTEAD,
            path=fields.file.path,
        )
    if fields.architecture == "llama" and fields.get("expert_count", 0):
        return _MIXTRAL
    if fields.architecture == "olmo2" and fields.get("attention.sliding_window"):
        return _OLMO3
    return family


def read_config(fields: Fields, family: Family) -> dict[str, Any]:
    """Arguments for the configuration of `family` in transformers.

    Raises: UnsupportedModel: fields that are missing, or say what is not known here.
    """
    metadata, tensors = fields.file.metadata, {tensor.name for tensor in fields.file.tensors}
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if layers != {str(layer) for layer in range(len(layers))} or len(layers) != fields.number("block_count"):
        raise fields.refused(f"has tensors of {len(layers)} layers, and says that it has {fields.get('block_count')}")
    num_q_heads, hidden_size = fields.number(_NUM_HEADS), fields.number("embedding_length")
    head_dim = fields.number("attention.key_length", hidden_size // max(1, num_q_heads))
    fields.must_be("attention.value_length", head_dim)
    fields.must_be("attention.causal", True)
    common = {
        "vocab_size": len(metadata.get("tokenizer.ggml.tokens", ())),
        "hidden_size": hidden_size,
        "intermediate_size": fields.number("feed_forward_length"),
        "num_hidden_layers": fields.number("block_count"),
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": fields.number("attention.head_count_kv", num_q_heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.number("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": read_rope(fields, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
    }
    config = common | family.settings(fields)
    fields.refuse_unasked()
    return config


def places_of(file: GgufFile, family: Family) -> dict[str, list[Piece]]:
    """What each parameter of the network is made of, in the order of the file.

    Raises: UnsupportedModel: a tensor that has no place in a network of `family`.
    """
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    places: dict[str, list[Piece]] = {}
    for tensor in file.tensors:
        name, _, kind = tensor.name.rpartition(".")
        match = _LAYER_NAME.fullmatch(tensor.name)
        if tensor.name in _BESIDE_WEIGHTS:
            continue
        if name in _TOP:
            place = f"{_TOP[name]}.{kind}"
        elif match and match[2] in family.layer:
            place = f"model.layers.{match[1]}.{family.layer[match[2]]}"
            place += "" if match[2].endswith("_exps") else f".{match[3]}"
        elif match and match[2] in ("ffn_gate_exps", "ffn_up_exps") and family.has_experts:
            is_pair = len(tensor.shape) == 3 and shapes.get(f"blk.{match[1]}.ffn_up_exps.weight") == tensor.shape
            if match[2] == "ffn_gate_exps" and is_pair:
                places[f"model.layers.{match[1]}.mlp.experts.gate_up_proj"] = _gate_and_up(match[1], tensor.shape)
            continue
        else:
            raise UnsupportedModel(
                f"{file.path} does not hold the tensors of its architecture: {tensor.name} is not known.",
                hint=SAFETENSORS_INSTEAD,
                path=file.path,
            )
        places[place] = [Piece(tensor.name, change=_change(family, name))]
    return places


def _gate_and_up(layer: str, shape: tuple[int, ...]) -> list[Piece]:
    """Of each expert the rows of its gate, then those of its up projection."""
    num_experts, num_rows = shape[0], shape[1]
    return [
        Piece(f"blk.{layer}.ffn_{part}_exps.weight", expert * num_rows, num_rows)
        for expert in range(num_experts)
        for part in ("gate", "up")
    ]


def _change(family: Family, name: str) -> Change:
    if family.heads_interleaved and name.endswith((".attn_q", ".attn_k")):
        return "halves apart"
    return "minus one" if family.norms_plus_one and name.endswith("_norm") else "none"


def _experts(fields: Fields) -> dict[str, Any]:
    fields.must_be("expert_gating_func", 1)  # softmax
    return {
        "num_experts": fields.number("expert_count"),
        "num_experts_per_tok": fields.number("expert_used_count"),
        "moe_intermediate_size": fields.number("expert_feed_forward_length"),
    }


def _qwen2_moe(fields: Fields) -> dict[str, Any]:
    shared = fields.number("expert_shared_feed_forward_length")
    return _experts(fields) | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _mixtral(fields: Fields) -> dict[str, Any]:
    return {
        "num_local_experts": fields.number("expert_count"),
        "num_experts_per_tok": fields.number("expert_used_count"),
    }


def _granite(fields: Fields) -> dict[str, Any]:
    fields.must_be("rope.scaling.finetuned", True)  # or positions are not turned at all
    return {
        "attention_multiplier": fields.number("attention.scale"),
        "embedding_multiplier": fields.number("embedding_scale"),
        "residual_multiplier": fields.number("residual_scale"),
        "logits_scaling": fields.number("logit_scale"),
    }


def _scaled_queries(fields: Fields, num_layers_27b: int) -> dict[str, Any]:
    """No field says by what the largest Gemmas divide their scores; llama.cpp goes by the number of layers."""
    if fields.number("block_count") == num_layers_27b:
        return {"query_pre_attn_scalar": fields.number("embedding_length") // fields.number(_NUM_HEADS)}
    return {"query_pre_attn_scalar": fields.number("attention.key_length")}


def _windows(fields: Fields, every: int) -> dict[str, Any]:
    """All layers but each `every`th have one."""
    fields.must_be("attention.sliding_window_pattern", every)
    return {"sliding_window": fields.number("attention.sliding_window"), "layer_types": _layer_types(fields, every)}


def _gemma2(fields: Fields) -> dict[str, Any]:
    return {
        **_scaled_queries(fields, 46),
        **_windows(fields, 2),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping"),
        "final_logit_softcapping": fields.number("final_logit_softcapping"),
    }


def _gemma3(fields: Fields) -> dict[str, Any]:
    return {
        **_scaled_queries(fields, 62),
        **_windows(fields, 6),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "rope_parameters": _two_ropes(fields, fields.number("rope.freq_base_swa", 10000.0)),
    }


def _two_ropes(fields: Fields, theta_of_windows: float) -> dict[str, Any]:
    """Layers with a window turn without scaling."""
    head_dim = fields.number("attention.key_length", fields.number("embedding_length") // fields.number(_NUM_HEADS))
    return {
        "full_attention": read_rope(fields, head_dim),
        "sliding_attention": {"rope_type": "default", "rope_theta": theta_of_windows},
    }


def _layer_types(fields: Fields, period: int) -> list[str]:
    """The last layer of each period attends to all tokens, the others to a window."""
    layers = range(1, fields.number("block_count") + 1)
    return ["full_attention" if layer % period == 0 else "sliding_attention" for layer in layers]


def _phi3(fields: Fields) -> dict[str, Any]:
    config = {"sliding_window": fields.number("attention.sliding_window") or None}
    original = fields.get("rope.scaling.original_context_length")
    return config if original is None else config | {"original_max_position_embeddings": original}


def _olmo3(fields: Fields) -> dict[str, Any]:
    slides = fields.get("attention.sliding_window_pattern")
    num_layers = fields.number("block_count")
    if not isinstance(slides, list) or len(slides) != num_layers:
        raise fields.refused("does not say which of its layers attend to a window")
    return {
        "sliding_window": fields.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": _two_ropes(fields, fields.number("rope.freq_base_swa", fields.number("rope.freq_base"))),
    }


_NORMS_AROUND = {**_LAYER, **_NORMS_BEHIND, "ffn_norm": "pre_feedforward_layernorm"}
_ONLY_BEHIND = {key: place for key, place in _LAYER.items() if key not in ("attn_norm", "ffn_norm")} | _NORMS_BEHIND
_FUSED = {key: place for key, place in _LAYER.items() if key not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
_WITHOUT_MLP = {key: place for key, place in _LAYER.items() if key not in ("ffn_gate", "ffn_up", "ffn_down")}

_MIXTRAL = Family("mixtral", _mixtral, {**_WITHOUT_MLP, **_EXPERTS}, heads_interleaved=True, has_experts=True)
_OLMO3 = Family("olmo3", _olmo3, {**_ONLY_BEHIND, **_HEAD_NORMS})
_FAMILIES = {
    "llama": Family("llama", heads_interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", layer={**_LAYER, **_HEAD_NORMS}),
    "qwen2moe": Family("qwen2_moe", _qwen2_moe, {**_WITHOUT_MLP, **_EXPERTS, **_SHARED_EXPERT}, has_experts=True),
    "qwen3moe": Family(
        "qwen3_moe",
        lambda fields: _experts(fields) | {"norm_topk_prob": True},
        {**_WITHOUT_MLP, **_EXPERTS, **_HEAD_NORMS},
        has_experts=True,
    ),
    "gemma": Family("gemma", norms_plus_one=True),
    "gemma2": Family("gemma2", _gemma2, _NORMS_AROUND, norms_plus_one=True),
    "gemma3": Family("gemma3_text", _gemma3, {**_NORMS_AROUND, **_HEAD_NORMS}, norms_plus_one=True),
    "phi3": Family("phi3", _phi3, {**_FUSED, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "granite": Family("granite", _granite, heads_interleaved=True),
    "olmo2": Family("olmo2", layer={**_ONLY_BEHIND, **_HEAD_NORMS}),
    "smollm3": Family("smollm3", heads_interleaved=True),  # each fourth layer does not turn, here and there
    "seed_oss": Family("seed_oss", layer={**_LAYER, "post_attention_norm": "post_attention_layernorm"}),
}
"""By `general.architecture`. Source: convert_hf_to_gguf.py and src/llama-model.cpp of github.com/ggml-org/llama.cpp."""
