"""A tiny BERT with random weights in a directory laid out like all-MiniLM-L6-v2, and a few passages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

from cag.retrieval import Passage
from cag.retrieval.minilm import MiniLmEmbedder

TEXTS = {
    "pump": "The cooling pump runs at 40 litres a minute and is oiled every second week.",
    "valve": "The relief valve opens at six bar. Close it by hand after the pressure has fallen.",
    "alarm": "Three short beeps mean that the door of the machine room stands open.",
    "night": "At night the lamps in the hall are dimmed, and the pumps are never started.",
}


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    return [Passage(f"doc#{name}", "doc", name, text, 0, len(text)) for name, text in TEXTS.items()]


@pytest.fixture(scope="session")
def embedder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-bert")
    characters = sorted({character for text in TEXTS.values() for character in text.lower() if character != " "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    # The real file asks for a fixed padding and a short truncation; the embedder must not obey.
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def embedder(embedder_dir: Path) -> MiniLmEmbedder:
    return MiniLmEmbedder(embedder_dir)
