import json
import os
import time

import pytest

from cag.errors import UnsupportedModel
from cag.models import digests, model_fingerprint
from cag.models.fingerprint import chat_template_text


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 1, "transformers_version": "5"}')
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    (folder / "tokenizer.json").write_text('{"vocab": ["a"]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "x", "chat_template": "T1"}')
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 4096)
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "here"}')
    (folder / "adapter_model.safetensors").write_bytes(b"lora")
    return folder


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def set_field(path, name, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}, indent=3))


def changed_parts(before, after):
    return {
        name
        for name in ("weights", "tokenizer", "template", "adapter")
        if getattr(before, name) != getattr(after, name)
    }


def write_index(model, file):
    """An index that takes a weight, which two files may have, from `file`."""
    content = {"metadata": {"total_size": 8192}, "weight_map": {"weight": file}}
    (model / "model.safetensors.index.json").write_text(json.dumps(content))


CHANGES = {
    "a weight byte": (lambda model, adapter: flip_byte(model / "model-2.safetensors", 4095), {"weights"}),
    "the first weight byte": (lambda model, adapter: flip_byte(model / "model-1.safetensors", 0), {"weights"}),
    "a weight file more": (lambda model, adapter: (model / "model-3.safetensors").write_bytes(b""), {"weights"}),
    "configuration": (lambda model, adapter: set_field(model / "config.json", "rope_theta", 2), {"weights"}),
    "quantization": (
        lambda model, adapter: set_field(model / "config.json", "quantization_config", {"quant_method": "fp8"}),
        {"weights"},
    ),
    "quantization that is described beside": (
        lambda model, adapter: set_field(model / "quantize_config.json", "bits", 8),
        {"weights"},
    ),
    "the same in other words": (
        lambda model, adapter: (model / "quantize_config.json").write_text('{ "bits": 4 }'),
        set(),
    ),
    "template": (
        lambda model, adapter: set_field(model / "tokenizer_config.json", "chat_template", "T2"),
        {"template"},
    ),
    "template file": (lambda model, adapter: (model / "chat_template.jinja").write_text("T2"), {"template"}),
    "vocabulary": (lambda model, adapter: (model / "tokenizer.json").write_text('{"vocab": ["b"]}'), {"tokenizer"}),
    "end token": (lambda model, adapter: set_field(model / "tokenizer_config.json", "eos_token", "y"), {"tokenizer"}),
    "another vocabulary file": (lambda model, adapter: (model / "tekken.json").write_text("{}"), {"tokenizer"}),
    "a vocabulary of another kind": (lambda model, adapter: (model / "spiece.model").write_text("a"), {"tokenizer"}),
    "which file a weight is taken from": (
        lambda model, adapter: write_index(model, "model-2.safetensors"),
        {"weights"},
    ),
    "total in the index": (
        lambda model, adapter: set_field(model / "model.safetensors.index.json", "metadata", {}),
        set(),
    ),
    "added tokens": (lambda model, adapter: (model / "added_tokens.json").write_text("{}"), {"tokenizer"}),
    "adapter weights": (lambda model, adapter: flip_byte(adapter / "adapter_model.safetensors", 0), {"adapter"}),
    "adapter rank": (lambda model, adapter: set_field(adapter / "adapter_config.json", "r", 4), {"adapter"}),
    "version of the writer": (
        lambda model, adapter: set_field(model / "config.json", "transformers_version", "6"),
        set(),
    ),
    "storage type": (lambda model, adapter: set_field(model / "config.json", "dtype", "float16"), set()),
    "generation defaults": (lambda model, adapter: (model / "generation_config.json").write_text("{}"), set()),
    "the same template as a file": (lambda model, adapter: (model / "chat_template.jinja").write_text("T1"), set()),
    "place of the base model": (
        lambda model, adapter: set_field(adapter / "adapter_config.json", "base_model_name_or_path", "there"),
        set(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_alters_its_own_part_only(model, adapter, change):
    write_index(model, "model-1.safetensors")
    apply, expected = CHANGES[change]
    before = model_fingerprint(model, adapter)
    apply(model, adapter)
    assert changed_parts(before, model_fingerprint(model, adapter)) == expected


def test_swapped_weight_files_are_another_model(model):
    before = model_fingerprint(model)
    (model / "model-1.safetensors").rename(model / "x")
    (model / "model-2.safetensors").rename(model / "model-1.safetensors")
    (model / "x").rename(model / "model-2.safetensors")
    assert changed_parts(before, model_fingerprint(model)) == {"weights"}


ELSEWHERE = {
    "a shard in a folder": lambda model: write_index(model, "more/model-1.safetensors"),
    "a shard of another model": lambda model: write_index(model, "../model-1.safetensors"),
    "a pickled shard": lambda model: write_index(model, "pytorch_model.bin"),
    "an index of nothing": lambda model: (model / "model.safetensors.index.json").write_text("{}"),
    "weights in a folder": lambda model: set_field(model / "config.json", "transformers_weights", "a/b.safetensors"),
    "pickled weights": lambda model: set_field(model / "config.json", "transformers_weights", "adapter_model.bin"),
    "configurations": lambda model: set_field(model / "config.json", "configuration_files", ["config.4.0.0.json"]),
    "tokenizers": lambda model: set_field(
        model / "tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.4.0.0.json"]
    ),
    "an adapter": lambda model: (model / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_lies_elsewhere_or_is_taken_by_some_versions_only_is_refused(model, kind):
    """No digest would say which of it a network or tokenizer was read from."""
    ELSEWHERE[kind](model)
    with pytest.raises(UnsupportedModel):
        model_fingerprint(model)


def test_the_template_is_the_tokenizers_and_not_a_processors(model):
    (model / "chat_template.json").write_text('{"chat_template": "P"}')
    before = model_fingerprint(model)
    assert chat_template_text(model) == "T1"
    set_field(model / "tokenizer_config.json", "chat_template", "T2")
    assert changed_parts(before, model_fingerprint(model)) == {"template"}


def test_a_configuration_nested_without_end_is_a_typed_error(model):
    (model / "config.json").write_text("[" * 100_000)
    with pytest.raises(UnsupportedModel, match="JSON"):
        model_fingerprint(model)


def test_without_an_adapter_there_is_no_digest_of_one(model, adapter):
    assert model_fingerprint(model).adapter is None
    assert changed_parts(model_fingerprint(model), model_fingerprint(model, adapter)) == {"adapter"}


def test_the_fingerprint_does_not_depend_on_the_place(model, tmp_path):
    before = model_fingerprint(model)
    assert model_fingerprint(model.rename(tmp_path / "elsewhere")) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer"])
def test_missing_files_are_named(model, name):
    for path in model.glob(f"{name}*"):
        path.unlink()
    with pytest.raises(UnsupportedModel, match=name):
        model_fingerprint(model)


def test_an_adapter_of_pickles_is_refused(model, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match="pickled weights are never read"):
        model_fingerprint(model, adapter)


def test_no_template_at_all(model):
    set_field(model / "tokenizer_config.json", "chat_template", None)
    assert chat_template_text(model) is None
    assert len(model_fingerprint(model).template) == 64


class TestDigestCache:
    @pytest.fixture
    def hashed(self, monkeypatch):
        """Counts how often bytes are hashed."""
        calls = []
        real = digests.hashlib.file_digest
        monkeypatch.setattr(digests.hashlib, "file_digest", lambda *args: calls.append(1) or real(*args))
        monkeypatch.setattr(digests, "SETTLE_NS", -(10**12))
        return calls

    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "weights"
        path.write_bytes(b"abc")
        return path

    def test_an_untouched_file_is_hashed_once(self, hashed, file):
        assert len({digests.file_sha256(file) for _ in range(3)}) == 1
        assert len(hashed) == 1
        digests.file_sha256(file.rename(file.with_name("renamed")))
        assert len(hashed) <= 2

    def test_a_file_swapped_under_the_same_name_size_and_time_is_hashed_again(self, hashed, file, tmp_path):
        before = digests.file_sha256(file)
        stat = file.stat()
        other = tmp_path / "other"
        other.write_bytes(b"xyz")
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(file)
        assert file.stat().st_mtime_ns == stat.st_mtime_ns
        assert digests.file_sha256(file) != before

    def test_a_file_changed_in_place_with_its_old_time_is_hashed_again(self, hashed, file):
        before = digests.file_sha256(file)
        stat = file.stat()
        time.sleep(0.02)
        file.write_bytes(b"xyz")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert digests.file_sha256(file) != before

    def test_a_file_written_just_now_is_not_remembered(self, hashed, file, monkeypatch):
        monkeypatch.setattr(digests, "SETTLE_NS", 10**12)
        digests.file_sha256(file)
        digests.file_sha256(file)
        assert len(hashed) == 2

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 5}', "\x00\x01"])
    def test_a_damaged_record_is_ignored(self, hashed, file, home, content):
        expected = digests.file_sha256(file)
        (record,) = (home / "fingerprints").iterdir()
        record.write_text(content)
        assert digests.file_sha256(file) == expected
        assert len(hashed) == 2

    @pytest.mark.parametrize("how", ["everybody may write it", "another user's"])
    def test_what_others_can_have_written_is_ignored(self, hashed, file, home, monkeypatch, how):
        expected = digests.file_sha256(file)
        (record,) = (home / "fingerprints").iterdir()
        record.write_text(record.read_text().replace(expected, "0" * 64))
        assert digests.file_sha256(file) == "0" * 64
        if how == "another user's":
            owner = record.stat().st_uid
            monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
            monkeypatch.setattr("cag.home._ROOT", owner + 2)
        else:
            record.chmod(0o666)
        assert digests.file_sha256(file) == expected

    def test_a_home_that_cannot_be_written_only_costs_time(self, hashed, file, home):
        home.parent.mkdir(exist_ok=True)
        home.write_text("a file where the folder should be")
        assert digests.file_sha256(file) == digests.file_sha256(file)
        assert len(hashed) == 2
