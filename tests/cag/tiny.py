"""Tiny random-weight models with a real tokenizer and chat template, made on the spot: nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from cag.forward.weights import PackedLinear
from cag_kernels.packed import PANEL

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | trim) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Bytes as tokens, two special tokens: every text round-trips."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.chat_template = chat_template
    return fast


def tiny_config(**changes) -> LlamaConfig:
    """Two layers, four query heads on two key/value heads."""
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 257,
    }
    return LlamaConfig(**settings | changes)


def own_weight(layer, feature=None):
    """The memory of a linear layer's weight, or of one of its outputs, to be changed in place."""
    if isinstance(layer, PackedLinear):
        panels = layer.packed.panels
        return panels if feature is None else panels[feature // PANEL, :, feature % PANEL]
    return layer.weight if feature is None else layer.weight[feature]


def write_tiny_model(
    directory: Path, *, seed: int = 0, chat_template: str | None = CHATML, config=None, dtype=torch.float32, scale=0.3
) -> Path:
    """A Hugging Face directory of a random model, made in float32."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    network.to(dtype).save_pretrained(directory)
    tiny_tokenizer(chat_template).save_pretrained(directory)
    return directory
