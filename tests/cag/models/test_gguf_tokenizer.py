"""Vocabularies in GGUF files: of pieces with scores, and the tokens that begin texts and end answers."""

import pytest

from cag.errors import UnsupportedModel
from cag.models.gguf_tokenizer import build_tokenizer, find_stop_ids
from cag.prompt import encode

PIECES = ["\u2581", *"abcdef", "ab", "bc", "abc", "\u2581ab", "de", "cd", "\u2581\u2581", "<|end|>"]
SCORES = [*range(-20, -13), -1.0, -2.0, -3.0, -4.0, -6.0, -5.0, -7.0, 0.0]


def of_pieces(**changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in SCORES],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 1) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def tokens_of(tokenizer, text, *, special=False):
    return tokenizer.convert_ids_to_tokens(encode(tokenizer, text, special=special))


def test_pieces_are_joined_by_their_scores():
    tokenizer = build_tokenizer(of_pieces())
    assert tokens_of(tokenizer, "abcde") == ["\u2581", "abc", "de"], "ab, then abc, before the space and before cd"
    assert tokens_of(tokenizer, "abde") == ["\u2581ab", "de"]
    assert tokens_of(tokenizer, "bcé") == ["\u2581", "bc", "<0xC3>", "<0xA9>"]
    for text in ["abc de", "  a\n\n\tb ", "naïve 漢字 🎉"]:
        assert tokenizer.decode(encode(tokenizer, text, special=False)) == text


def test_a_space_stands_before_texts_unless_the_file_denies_it():
    assert tokens_of(build_tokenizer(of_pieces(add_space_prefix=False)), "abc  d") == ["abc", "\u2581\u2581", "d"]


def test_the_names_of_control_tokens_in_a_text_are_text():
    tokenizer = build_tokenizer(of_pieces())
    assert encode(tokenizer, "a</s>", special=True)[-1] == 2
    for text in ("a</s>", "<s>", "<|end|>"):
        assert not {1, 2, 273} & set(encode(tokenizer, text, special=False))


def test_texts_begin_as_the_file_says():
    assert build_tokenizer(of_pieces())("")["input_ids"] == [1]
    assert build_tokenizer(of_pieces(add_bos_token=False))("")["input_ids"] == []


def test_phi_3_drops_the_space_behind_its_marks():
    metadata = of_pieces()
    metadata["tokenizer.ggml.tokens"][-1], metadata["tokenizer.ggml.token_type"][-1] = "<|user|>", 3
    for architecture, behind in {"phi3": [], "llama": ["\u2581", "<0x0A>"]}.items():
        tokenizer = build_tokenizer(metadata | {"general.architecture": architecture})
        assert tokens_of(tokenizer, "<|user|>\n", special=True) == ["<|user|>", *behind]


def test_an_answer_ends_with_all_that_the_file_names():
    assert find_stop_ids(of_pieces(eot_token_id=5, eom_token_id=6)) == [2, 5, 6, 273], "the last one by its name"
    assert find_stop_ids(of_pieces(eos_token_id=9)) == [9, 273, 2]
    with pytest.raises(UnsupportedModel, match="lacks one of the stop tokens"):
        find_stop_ids(of_pieces(eos_token_id=10**6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [0.0]}, "not a score for each"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"precompiled_charsmap": [1]}, "precompiled_charsmap of its tokenizer"),
        ({"token_type": [1]}, "not a type for each"),
        ({"token_type": [2, 3, 3] + [1] * 271}, "has not all bytes"),
    ],
)
def test_what_is_not_known_of_a_vocabulary_is_refused(change, message):
    with pytest.raises(UnsupportedModel, match=message):
        build_tokenizer(of_pieces(**change))


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġx", "Ġ", "ĠABc"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġx", "Ġ", "ĠABc"]),
        ("gpt-4o", ["It's", "Ġ", "123", "45", "Ġx", "Ġ", "ĠABc"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġx", "Ġ", "ĠABc"]),
        ("refact", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġx", "Ġ", "ĠABc"]),
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġx", "Ġ", "ĠABc"]),
    ],
)
def test_texts_are_split_as_their_authors_split(name, pieces):
    metadata = of_pieces(model="gpt2", pre=name, merges=[])
    splitter = build_tokenizer(metadata).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("It's 12345 x  ABc")] == pieces
