from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertModel

from cag.errors import ModelError, ModelNotFound, UnsupportedModel
from cag.models import fetch_model
from cag.retrieval.minilm import MiniLmEmbedder

TEXTS = ["The valve opens.", "Three short beeps mean an open door.", "pump " * 40, "a"]


def reference_vector(directory: Path, text: str) -> np.ndarray:
    """The recipe of the model card, one text at a time, in float64."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    model = BertModel.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    return (mean / mean.norm()).numpy()


def test_vectors_are_normalized_means_over_the_tokens(embedder, embedder_dir):
    vectors = embedder.embed_passages(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (4, embedder.num_dimensions) == (4, 32)
    for vector, text in zip(vectors, TEXTS, strict=True):
        np.testing.assert_allclose(vector, reference_vector(embedder_dir, text), atol=2e-6)


def test_batches_do_not_change_the_vectors_or_their_order(embedder, embedder_dir):
    texts = [f"{'pump ' * (number % 5)}valve {number}" for number in range(17)]
    in_threes = MiniLmEmbedder(embedder_dir, batch_size=3).embed_passages(texts)
    for vector, text in zip(in_threes, texts, strict=True):
        np.testing.assert_allclose(vector, embedder.embed_query(text), atol=2e-6)


def test_text_beyond_the_limit_is_left_out(embedder_dir):
    short = MiniLmEmbedder(embedder_dir, max_word_pieces=6)
    np.testing.assert_array_equal(short.embed_query("aaaa door"), short.embed_query("aaaa lamps"))
    assert not np.array_equal(short.embed_query("aaa door"), short.embed_query("aaa lamp"))


def test_no_texts_give_no_vectors(embedder):
    assert embedder.embed_passages([]).shape == (0, 32)


def test_piece_spans_reach_to_the_end_of_a_long_text(embedder):
    text = "pump " * 300
    spans = embedder.piece_spans(text)
    assert len(spans) == 1200
    assert spans[-1] == (1498, 1499)


def test_loading_prints_nothing(embedder_dir, capfd):
    MiniLmEmbedder(embedder_dir)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(embedder_dir, tmp_path, name):
    directory = shutil.copytree(embedder_dir, tmp_path / "model")
    (directory / name).unlink()
    with pytest.raises(ModelNotFound, match=name):
        MiniLmEmbedder(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_a_model_error(embedder_dir, tmp_path, name):
    directory = shutil.copytree(embedder_dir, tmp_path / "model")
    (directory / name).write_bytes((directory / name).read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        MiniLmEmbedder(directory)


def test_another_pooling_is_refused(embedder_dir, tmp_path):
    directory = shutil.copytree(embedder_dir, tmp_path / "model")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False}))
    with pytest.raises(UnsupportedModel, match="pooling"):
        MiniLmEmbedder(directory)


@pytest.mark.slow
def test_the_real_model_gives_its_published_similarities():
    embedder = MiniLmEmbedder(Path(fetch_model("all-minilm-l6-v2")))
    query = embedder.embed_query("That is a happy person")
    others = ["That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    np.testing.assert_allclose(embedder.embed_passages(others) @ query, [0.6945, 0.9429, 0.2569], atol=5e-4)
