import json
import random
from contextlib import suppress

import numpy as np
import pytest

from cag.errors import UnsupportedModel
from cag.models.convert import convert_gguf
from cag.models.gguf_file import GgufFile


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_weights_come_out_equal_to_the_bit(tiny_gguf, out):
    import torch
    from transformers import AutoModelForCausalLM

    events = []
    convert_gguf(tiny_gguf.path, out, progress=lambda *event: events.append(event))
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in tiny_gguf.weights.items())
    assert model.config.rope_parameters["rope_theta"] == 50000.0
    assert model.config.rms_norm_eps == 1e-6
    stage, done_bytes, total_bytes = events[-1]
    assert stage == "convert" and done_bytes == total_bytes
    assert total_bytes == sum(value.nbytes for value in tiny_gguf.weights.values())


def test_quantized_blocks_are_dequantized(tiny_gguf, out, tmp_path):
    import torch
    from gguf import GGMLQuantizationType, quants
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.up_proj.weight"
    path = tiny_gguf.rewrite(tmp_path / "q8.gguf", quantized=(name,))
    convert_gguf(path, out)
    found = load_file(out / "model.safetensors")[name]
    with GgufFile(path) as file:
        (tensor,) = [tensor for tensor in file.tensors if tensor.name == "blk.1.ffn_up.weight"]
        packed = path.read_bytes()[tensor.start : tensor.start + 96 * 64 // 32 * 34]
    rows = np.frombuffer(packed, dtype=np.uint8).reshape(96, -1)
    expected = torch.from_numpy(quants.dequantize(rows, GGMLQuantizationType.Q8_0).copy()).to(torch.bfloat16)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tiny_gguf.weights[name])


def test_rows_in_blocks_are_the_rows_at_once(tiny_gguf, monkeypatch):
    def all_rows():
        with GgufFile(tiny_gguf.path) as file:
            return {tensor.name: np.concatenate(list(file.row_blocks(tensor))) for tensor in file.tensors}

    whole = all_rows()
    monkeypatch.setattr("cag.models.gguf_file._ROW_BLOCK_VALUES", 64 * 7)
    pieces = all_rows()
    assert whole.keys() == pieces.keys()
    assert all(np.array_equal(whole[name], pieces[name]) for name in whole)


def test_tokenizer_gives_text_back_and_knows_its_special_tokens(tiny_gguf, out):
    from transformers import AutoTokenizer

    convert_gguf(tiny_gguf.path, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    for text in ["a  12 b", "x = 3.14\n\n\tdef f():", "naïve — 日本語 🎉", "\r\n  ", "<|im_end|> in text"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>") == [tokenizer.bos_token_id] == [1]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.decode(tokenizer.encode("lit<|im_end|>"), skip_special_tokens=True) == "lit"
    assert tokenizer.model_max_length == 256
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_digits_stand_alone(tiny_gguf, out, tmp_path):
    """SmolLM2 and Qwen2 were trained on single digits; GPT-2's splitting would take the space along."""
    from transformers import AutoTokenizer

    for pre in ("smollm", "qwen2"):
        convert_gguf(tiny_gguf.rewrite(tmp_path / f"{pre}.gguf", pre=pre), out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("at 12")
        assert [piece for piece, _ in pieces] == ["at", "Ġ", "1", "2"]
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("e\u0301") == "é"


def test_stop_tokens_reach_the_generation_defaults(tiny_gguf, out):
    convert_gguf(tiny_gguf.path, out, stop_tokens=("<|im_start|>",))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 1, 0], "the last by its name"
    with pytest.raises(UnsupportedModel, match="lacks one of the stop tokens"):
        convert_gguf(tiny_gguf.path, out, stop_tokens=("<|nowhere|>",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "tekken-7"}, "splitting text, 'tekken-7'"),
        ({"pre": None}, "splitting text, 'None'"),
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"tokenizer_model": "t5"}, "vocabularies of kind 't5'"),
        ({"tokenizer_model": "llama"}, "has not a score for each"),
        ({"drop": ("model.layers.1.mlp.up_proj.weight",)}, "first difference: model.layers.1.mlp.up_proj.weight"),
        ({"chat_template": "{{ messages[0]['content'] }}"}, "does not end a turn"),
        ({"chat_template": "{% if %}"}, "cannot be rendered"),
    ],
)
def test_what_is_not_known_is_refused(tiny_gguf, out, tmp_path, change, message):
    with pytest.raises(UnsupportedModel, match=message):
        convert_gguf(tiny_gguf.rewrite(tmp_path / "changed.gguf", **change), out)


def test_without_a_chat_template_the_prompt_is_plain(tiny_gguf, out, tmp_path):
    from cag.model_files import read_tokenizer
    from cag.prompt import PLAIN_TEMPLATE, read_template

    convert_gguf(tiny_gguf.rewrite(tmp_path / "base.gguf", chat_template=None), out)
    assert read_template(read_tokenizer(out)) == PLAIN_TEMPLATE


def test_a_file_cut_off_anywhere_is_refused(tiny_gguf, tmp_path):
    content = tiny_gguf.path.read_bytes()
    target = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 23, 24, 100, 5000, len(content) // 2, len(content) - 5]:
        target.write_bytes(content[:length])
        with pytest.raises(UnsupportedModel):
            GgufFile(target)


def test_changed_header_bytes_never_raise_anything_else(tiny_gguf, tmp_path):
    content = tiny_gguf.path.read_bytes()
    rng = random.Random(7)
    target = tmp_path / "changed.gguf"
    refused = 0
    for _ in range(300):
        changed = bytearray(content[:20000])
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        target.write_bytes(bytes(changed) + content[20000:])
        try:
            with GgufFile(target) as file:
                for tensor in file.tensors[:2]:
                    next(file.row_blocks(tensor))
        except UnsupportedModel:
            refused += 1
    assert refused > 50


def test_changed_metadata_is_converted_or_refused(tiny_gguf, tmp_path):
    content = tiny_gguf.path.read_bytes()
    rng = random.Random(11)
    places = [content.index(name) for name in (b"llama.", b"tokenizer.ggml.bos", b"tokenizer.chat_template")]
    for number in range(40):
        changed = bytearray(content)
        for _ in range(2):
            changed[places[number % 3] + rng.randrange(300)] = rng.randrange(256)
        (tmp_path / "changed.gguf").write_bytes(changed)
        (folder := tmp_path / str(number)).mkdir()
        with suppress(UnsupportedModel):
            convert_gguf(tmp_path / "changed.gguf", folder)


def test_sizes_in_the_file_are_not_believed(tiny_gguf, tmp_path):
    """A list that claims 2**60 entries must not be read, nor take memory."""
    content = tiny_gguf.path.read_bytes()
    target = tmp_path / "huge.gguf"
    position = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4
    target.write_bytes(content[:position] + (2**60).to_bytes(8, "little") + content[position + 8 :])
    with pytest.raises(UnsupportedModel, match="list reaches beyond the end"):
        GgufFile(target)
    target.write_bytes(content[:8] + (2**60).to_bytes(8, "little") + content[16:])
    with pytest.raises(UnsupportedModel):
        GgufFile(target)
