"""Tokenizers and chat templates as they lie in folders of the hub."""

import json
import sys

import pytest

from cag.errors import ModelError, UnsupportedModel
from cag.model_files import read_tokenizer
from cag.models import chat_template_text, model_fingerprint
from cag.prompt import encode, read_template
from tiny import CHATML, write_tiny_model

OF_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "model")


def set_field(path, name, value):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | {name: value}))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "processor_config.json"])
def test_a_template_is_found_wherever_it_lies(model, name):
    expected = read_template(read_tokenizer(model))
    (model / "chat_template.jinja").unlink()
    without = model_fingerprint(model)
    set_field(model / name, "chat_template", CHATML)
    assert read_template(read_tokenizer(model)) == expected and expected.before == "<|im_start|>system\n"
    assert chat_template_text(model) == CHATML
    assert model_fingerprint(model).template != without.template


def test_the_template_of_the_tokenizer_comes_first(model):
    set_field(model / "chat_template.json", "chat_template", OF_PARTS)
    assert chat_template_text(model) == read_tokenizer(model).chat_template == CHATML


def test_of_several_templates_the_one_for_answers_is_taken(model):
    expected = read_template(read_tokenizer(model))
    (model / "chat_template.jinja").unlink()
    named = {"default": CHATML, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    several = [{"name": name, "template": template} for name, template in named.items()]
    set_field(model / "tokenizer_config.json", "chat_template", several)
    assert read_template(read_tokenizer(model)) == expected


def test_a_template_of_contents_in_parts_gives_the_same_prompt(model):
    expected = read_template(read_tokenizer(model))
    (model / "chat_template.jinja").write_text(OF_PARTS)
    assert read_template(read_tokenizer(model)) == expected


@pytest.mark.parametrize("content", ["{", '{"version": "1.0"}', '{"version": "1.0", "added_tokens": [], "model": {}}'])
def test_a_tokenizer_that_is_none_is_a_typed_error(model, content):
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        read_tokenizer(model)


def test_a_class_that_is_no_name_is_a_typed_error(model):
    set_field(model / "tokenizer_config.json", "tokenizer_class", ["Words"])
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        read_tokenizer(model)


def write_pieces(model, tokenizer_class, **options):
    """Puts a vocabulary of sentencepiece into the place of the model's tokenizer."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentences = ["The valve of the pump is closed when the lamp is lit.", "It costs 12,345 pounds."] * 100
    (model / "text").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(model / "text"),
        model_prefix=str(model / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    (model / "tokenizer.json").unlink()
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "tokenizer_class": tokenizer_class}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    return sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))


@pytest.mark.parametrize("tokenizer_class, prefix", [("LlamaTokenizer", True), ("GemmaTokenizer", False)])
def test_pieces_alone_make_the_tokens_that_their_library_makes(model, tokenizer_class, prefix):
    pieces = write_pieces(model, tokenizer_class, add_dummy_prefix=prefix)
    text = "The lamp of 12 naïve  pumps\n\tis lit 🎉"
    assert encode(read_tokenizer(model), text, special=False) == pieces.encode(text)


def test_pieces_of_which_other_tokens_would_be_made_are_refused(model):
    write_pieces(model, "GemmaTokenizer", add_dummy_prefix=True)
    with pytest.raises(UnsupportedModel, match="other tokens"):
        read_tokenizer(model)


def test_what_reads_pieces_is_named_where_it_is_missing(model, monkeypatch):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"pieces")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match="Install sentencepiece and protobuf"):
        read_tokenizer(model)
