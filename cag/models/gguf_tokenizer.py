"""GGUF metadata -> a fast tokenizer with chat template, and the tokens that end an answer.

Two kinds of vocabulary: pieces with scores (`gguf_pieces`) and byte-level BPE. Of the latter a GGUF carries vocabulary,
merges and the *name* of the way text was split when they were learned. The rules behind the names stand here, because
converters that lack a name fall back to GPT-2's splitting, and tokens then differ silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from cag.errors import UnsupportedModel
from cag.models.gguf_pieces import pieces_tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_MARKS}"
_WORDS_OF_3_DIGITS = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_MARKS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED, _CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_CASED_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_WORDS = rf"{_CASED}|{_CAPITALS}|\p{{N}}{_CASED_MARKS}"
_O200K_WORDS = rf"{_CASED}{_SUFFIXES}?|{_CAPITALS}{_SUFFIXES}?|\p{{N}}{{1,3}}{_CASED_MARKS}"
_SEED_WORDS = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_KNOWN_ENTRIES = frozenset(
    f"tokenizer.ggml.{name}"
    for name in (
        *("model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token"),
        *("add_sep_token", "add_space_prefix", "remove_extra_whitespaces"),
        *("seperator_token_id", "separator_token_id", "cls_token_id", "mask_token_id", "eot_token_id", "eom_token_id"),
        *("prefix_token_id", "suffix_token_id", "middle_token_id", "fim_pre_token_id", "fim_suf_token_id"),
        *("fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"),
    )
) | frozenset(_SPECIAL_TOKENS.values())
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")  # behind them; Phi-3 drops those behind its other marks
_END_IDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_END_TOKENS = (  # which end an answer where a file does not say so; llama.cpp goes by their names too
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
    *("<EOT>", "</s>", "<eos>"),
)


@dataclass(frozen=True)
class _Splitting:
    """How a text becomes the words that merges stay within. `regex` None means GPT-2's words."""

    regex: str | None = None
    digits_apart: bool = False
    composes: bool = False  # accents: NFC
    takes_whole_words: bool = False  # that are in the vocabulary, whatever the merges say
    begins_texts: bool = False  # with its first token, where a file does not say


_LLAMA3 = _Splitting(_WORDS_OF_3_DIGITS, takes_whole_words=True, begins_texts=True)
_QWEN2 = _Splitting(_WORDS, composes=True)
_DIGITS_APART = _Splitting(digits_apart=True)
_SPLITTINGS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _Splitting(_WORDS_OF_3_DIGITS),
    "dbrx": _Splitting(_WORDS_OF_3_DIGITS),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": _Splitting(_O200K_WORDS),
    "tekken": _Splitting(_TEKKEN_WORDS, takes_whole_words=True, begins_texts=True),
    "seed-coder": _Splitting(_SEED_WORDS),
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "gpt-2": _Splitting(),
    "olmo": _Splitting(),
}
"""By `tokenizer.ggml.pre`, as the authors' own tokenizers split."""


def build_tokenizer(metadata: dict[str, Any]) -> Any:
    """A transformers tokenizer from the `tokenizer.*` entries of a GGUF file.

    Raises: UnsupportedModel for another kind of vocabulary, an unknown text splitting, or inconsistent entries.
    """
    from transformers import PreTrainedTokenizerFast

    _refuse_unknown(metadata)
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    has_pieces = metadata.get("tokenizer.ggml.model") == "llama"
    backend = pieces_tokenizer(metadata) if has_pieces else _byte_level(metadata, tokens)
    drops_spaces = has_pieces and metadata.get("general.architecture") == "phi3"
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = kind != _USER_DEFINED or token in _END_TOKENS  # which no text of a document may contain
            rstrip = drops_spaces and special and token not in _KEEP_SPACES
            backend.add_tokens([AddedToken(token, normalized=False, special=special, rstrip=rstrip)])
    roles = {
        role: tokens[metadata[key]]
        for role, key in _SPECIAL_TOKENS.items()
        if metadata.get(key, -1) in range(len(tokens))
    }
    begins = has_pieces or _splitting(metadata).begins_texts
    if "bos_token" in roles and metadata.get("tokenizer.ggml.add_bos_token", begins):
        first = roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first}:0 $A:0", special_tokens=[(first, metadata["tokenizer.ggml.bos_token_id"])]
        )
    make_tokenizer: Any = PreTrainedTokenizerFast
    return make_tokenizer(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **roles,
    )


def find_stop_ids(metadata: dict[str, Any], stop_tokens: Sequence[str] = ()) -> list[int]:
    """Tokens that end an answer: those that the file names, then `stop_tokens`, then those whose names say so.

    Raises: UnsupportedModel: it has none, or lacks one of `stop_tokens`.
    """
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    places = {token: token_id for token_id, token in enumerate(tokens)}
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    named = [token for token in _END_TOKENS if token in places and kinds[places[token]] in (_CONTROL, _USER_DEFINED)]
    missing = [token for token in stop_tokens if token not in places]
    found = [metadata[key] for key in _END_IDS if metadata.get(key, -1) in range(len(tokens))]
    if missing or not found:
        raise UnsupportedModel(f"the tokenizer lacks one of the stop tokens {['its end', *stop_tokens]}.")
    return list(dict.fromkeys([*found, *(places[token] for token in (*stop_tokens, *named))]))


def _refuse_unknown(metadata: dict[str, Any]) -> None:
    """Raises: UnsupportedModel: a kind of vocabulary, or something said of it, that is not known here."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"vocabularies of kind {kind!r} are not converted here.")
    unknown = sorted(key for key in metadata if key.startswith("tokenizer.ggml.") and key not in _KNOWN_ENTRIES)
    if unknown:
        raise UnsupportedModel(f"the GGUF says {unknown[0]} of its tokenizer, which is not known here.")
    tokens, kinds = metadata.get("tokenizer.ggml.tokens", []), metadata.get("tokenizer.ggml.token_type", [])
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UnsupportedModel("the GGUF's vocabulary has tokens twice, or not a type for each.")


def _splitting(metadata: dict[str, Any]) -> _Splitting:
    name = str(metadata.get("tokenizer.ggml.pre"))
    if name not in _SPLITTINGS:
        raise UnsupportedModel(
            f"the GGUF's way of splitting text, {name!r}, is not known here.",
            hint="Take the model in safetensors form.",
            found=name,
        )
    return _SPLITTINGS[name]


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    splitting = _splitting(metadata)
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise UnsupportedModel("the GGUF's tokenizer puts a space before texts, which is not known here.")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.takes_whole_words))
    except Exception as error:  # the Rust library raises plain exceptions
        raise UnsupportedModel(f"the GGUF's vocabulary and merges do not belong together: {error}.") from error
    if splitting.composes:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.digits_apart else []
    if splitting.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend
