"""Sentence embeddings by all-MiniLM-L6-v2 (or another BERT-like encoder with mean pooling) from a local directory.

Text goes in, unit vectors come out, as the sentence-transformers recipe of the model makes them: at most 256 word
pieces, mean over the tokens of the last layer, L2 normalization. Nothing is downloaded here.
Source: https://www.sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from cag.errors import ModelError, ModelNotFound, UnsupportedModel
from cag.retrieval.base import Embedder, Vectors

REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
POOLING_FILE = "1_Pooling/config.json"


class MiniLmEmbedder(Embedder):
    """Mean-pooled, normalized embeddings in float32."""

    name = "all-minilm-l6-v2"

    def __init__(
        self, directory: Path, *, max_word_pieces: int = 256, batch_size: int = 32, device: str = "cpu"
    ) -> None:
        """Load the encoder and its tokenizer from `directory`.

        Raises: `ModelNotFound` when a file is missing, `UnsupportedModel` for another pooling than the mean,
        `ModelError` when the files cannot be loaded.
        """
        _check_directory(directory)
        self.batch_size = batch_size
        self.device = torch.device(device)
        try:
            self._tokenizer = _load_tokenizer(directory)
            self._whole_text_tokenizer = _load_tokenizer(directory)
            with _quiet_loading():
                model = AutoModel.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"The embedding model in {directory} cannot be loaded: {error}") from error
        self._tokenizer.enable_truncation(max_word_pieces)
        self._model = model.eval().requires_grad_(False).to(self.device)
        self.num_dimensions = int(model.config.hidden_size)

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """See `Embedder.embed_passages`. Batches hold texts of similar length, so that little is padded."""
        encodings = [self._tokenizer.encode(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda index: len(encodings[index].ids))
        vectors = np.empty((len(texts), self.num_dimensions), dtype=np.float32)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            vectors[batch] = self._embed([encodings[index] for index in batch])
        return vectors

    def embed_query(self, text: str) -> Vectors:
        """See `Embedder.embed_query`."""
        vector: Vectors = self._embed([self._tokenizer.encode(text)])[0]
        return vector

    def piece_spans(self, text: str) -> list[tuple[int, int]]:
        """The character span of each word piece of the whole `text`, for `split_passages`."""
        spans: list[tuple[int, int]] = self._whole_text_tokenizer.encode(text, add_special_tokens=False).offsets
        return spans

    def _embed(self, encodings: Sequence[Encoding]) -> Vectors:
        token_ids, attention_mask = _padded(encodings)
        token_ids, attention_mask = token_ids.to(self.device), attention_mask.to(self.device)
        with torch.inference_mode():
            hidden = self._model(input_ids=token_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [batch, num_tokens, 1]
            mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
            unit = torch.nn.functional.normalize(mean, dim=1)
        vectors: Vectors = unit.cpu().numpy()
        return vectors


def _load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer without the padding to 128 and the truncation at 128 that its file asks for."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar of transformers for a model that loads in a blink; the setting is put back after."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _padded(encodings: Sequence[Encoding]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [len(encodings), longest], padded with zeros on the right."""
    longest = max(len(encoding.ids) for encoding in encodings)
    token_ids = np.zeros((len(encodings), longest), dtype=np.int64)
    attention_mask = np.zeros_like(token_ids)
    for row, encoding in enumerate(encodings):
        token_ids[row, : len(encoding.ids)] = encoding.ids
        attention_mask[row, : len(encoding.ids)] = 1
    return torch.from_numpy(token_ids), torch.from_numpy(attention_mask)


def _check_directory(directory: Path) -> None:
    missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
    if missing:
        raise ModelNotFound(
            f"{directory} is not an embedding model: {', '.join(missing)} missing.",
            hint="Run `cag pull all-minilm-l6-v2`.",
            path=directory,
            missing=missing,
        )
    pooling_file = directory / POOLING_FILE
    if pooling_file.is_file() and not json.loads(pooling_file.read_text()).get("pooling_mode_mean_tokens", True):
        raise UnsupportedModel(f"{pooling_file} asks for another pooling than the mean over tokens.", path=pooling_file)
