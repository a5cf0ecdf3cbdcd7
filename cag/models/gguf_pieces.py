"""Vocabularies of pieces with scores (sentencepiece's BPE: Llama 2, Mistral, Gemma, Phi-3) -> a fast tokenizer.

Of two neighbours those are joined first that make the piece with the highest score, so merges follow from the scores.
What is in no piece becomes bytes. Knows the metadata of a GGUF file; special tokens are added by `gguf_tokenizer`.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from cag.errors import UnsupportedModel

_SPACE = "\u2581"
_NORMAL, _BYTE = 1, 6


def pieces_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """A tokenizer of the pieces in `metadata`.

    Raises: UnsupportedModel: no score for each piece, bytes that are missing, or texts that are changed before.
    """
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds, scores = metadata["tokenizer.ggml.token_type"], metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(tokens):
        raise UnsupportedModel("the GGUF's vocabulary of pieces has not a score for each.")
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise UnsupportedModel("the GGUF's tokenizer removes spaces from texts, which is not known here.")
    in_bytes = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _BYTE}
    if in_bytes != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise UnsupportedModel("the GGUF's vocabulary of pieces has not all bytes.")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pieces = {token: scores[token_id] for token, token_id in vocabulary.items() if kinds[token_id] == _NORMAL}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=_merges(pieces, vocabulary), byte_fallback=True, fuse_unk=True))
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    to_pieces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_pieces]) if has_prefix else to_pieces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return backend


def _merges(pieces: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those of the highest score first."""
    found = []
    for piece, score in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]
