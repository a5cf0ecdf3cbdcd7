"""A network with random weights and a prefix of random keys and values, both made on the device.

Speed depends on sizes and types, not on what the numbers say. Sizes in, the engine's own model and prefix out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cag.forward.state import PrefixSegment
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel
from cag.models.fingerprint import ModelFingerprints
from cag.residency.resident import ResidentPrefix
from cag_bench.gpu.shapes import NetworkShape
from cag_kernels import DensePrefix, quantize_prefix

KINDS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"key_bits": 8, "value_bits": 8, "group_channels": 256},
    "int4": {"key_bits": 4, "value_bits": 4, "group_channels": 64},
}
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|im_start|>", "<|im_end|>"]


def random_model(shape: NetworkShape, device: torch.device, window_tokens: int, seed: int) -> LanguageModel:
    """A Llama of `shape` in bfloat16; on a CPU its steps run as on a GPU, unrecorded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_q_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=window_tokens,
        tie_word_embeddings=False,
        eos_token_id=257,
        pad_token_id=257,
    )
    with torch.device(device):
        network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model = LanguageModel(
        network,
        _byte_tokenizer(),
        model_id="random weights",
        fingerprints=ModelFingerprints("random", "bytes", "chatml"),
        plan=RuntimePlan(
            device.type, "bfloat16", torch.get_num_threads(), torch.get_num_threads(), "plain", {}, "bench"
        ),
        kv_dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
    )
    model.stop_ids = frozenset()
    if device.type == "cpu":
        model.run_in_steps(capture=False)
    return model


def random_prefix(model: LanguageModel, num_tokens: int, kind: str, seed: int) -> ResidentPrefix:
    """Keys and values of normal numbers, or what stands for them in codes of `kind`, layer by layer."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    layers: list[tuple[PrefixSegment, ...]] = []
    for shape in model.kv_shapes:
        size = (2, shape.num_kv_heads, num_tokens, shape.head_dim)
        sides = torch.randn(size, dtype=torch.bfloat16, device=model.device, generator=generator)
        codes = KINDS[kind]
        layers.append((DensePrefix(*sides) if codes is None else quantize_prefix(*sides, **codes),))
    prefix = ResidentPrefix(layers, np.zeros(num_tokens, dtype=np.int64))
    prefix.mark_loaded()
    return prefix


def random_ids(count: int, seed: int) -> list[int]:
    """Token ids of bytes, which every vocabulary here has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 250, (count,), generator=generator).tolist()


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of weights that a forward reads: all but the embedding, of which it takes a few rows."""
    embedding: Tensor = model.network.get_input_embeddings().weight
    return sum(parameter.nbytes for parameter in model.network.parameters() if parameter is not embedding)


def _byte_tokenizer() -> Any:
    """Bytes as tokens, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    make: Any = PreTrainedTokenizerFast
    fast = make(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")  # noqa: S106
    fast.chat_template = _TEMPLATE
    return fast
