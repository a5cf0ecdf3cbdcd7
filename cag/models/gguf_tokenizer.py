"""GGUF metadata -> a fast tokenizer with chat template. Byte-level BPE only, split as the model's authors split.

A GGUF carries vocabulary, merges and the *name* of the way text was split when they were learned. The rules behind the
names stand here, because converters that lack a name fall back to GPT-2's splitting, and tokens then differ silently.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from cag.errors import UnsupportedModel

_CONTROL, _USER_DEFINED = 3, 4
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def build_tokenizer(metadata: dict[str, Any]) -> Any:
    """A transformers tokenizer from the `tokenizer.*` entries of a GGUF file.

    Raises: UnsupportedModel for another kind of vocabulary, an unknown text splitting, or inconsistent entries.
    """
    from transformers import PreTrainedTokenizerFast

    if metadata.get("tokenizer.ggml.model") != "gpt2":
        raise UnsupportedModel(f"vocabularies of kind {metadata.get('tokenizer.ggml.model')!r} are not converted here.")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    make_tokenizer: Any = PreTrainedTokenizerFast
    return make_tokenizer(
        tokenizer_object=_backend(metadata, tokens),
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        clean_up_tokenization_spaces=False,
        **{
            role: tokens[metadata[key]]
            for role, key in _SPECIAL_TOKENS.items()
            if metadata.get(key, -1) in range(len(tokens))
        },
    )


def _backend(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        backend = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the Rust library raises plain exceptions
        raise UnsupportedModel(f"the GGUF's vocabulary and merges do not belong together: {error}.") from error
    _set_text_splitting(backend, str(metadata.get("tokenizer.ggml.pre")))
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    return backend


def _set_text_splitting(backend: Tokenizer, name: str) -> None:
    """The authors' normalizer and splitting (SmolLM2: single digits, then GPT-2's words; Qwen2: its own)."""
    if name == "smollm":
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name == "qwen2":
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    else:
        raise UnsupportedModel(
            f"the GGUF's way of splitting text, {name!r}, is not known here.",
            hint="Take the model from the hub in safetensors form.",
            found=name,
        )
