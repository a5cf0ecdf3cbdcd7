"""A start that was kept gives the bits of the whole model, and is taken only while nothing has changed."""

import json
import os
import shutil
import struct
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_weights import CONFIGS, OTHERS, OWN_PRODUCT, bfloat16_model, random_ids, use_plan
from transformers import LlamaForCausalLM

from cag import model as model_module
from cag.errors import ModelError, UnsupportedModel
from cag.forward.weights import PackedLinear
from cag.identity import tokenizer_digest
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel, ModelOptions
from cag.starts import facts, reading
from cag.starts.begin import begin
from cag.starts.network import PlainNetwork, weights_of
from cag.starts.reading import WeightReading
from cag.starts.record import read_start, record_path, write_start
from cag.starts.tokenizer import KeptTokenizer
from cag_kernels import FEW_ROWS, has_compiler
from cag_kernels.packed import PANEL
from cag_store.scratch import HUGE_PAGE_BYTES
from tiny import write_tiny_model

pytestmark = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")
AUTO = {"device": "auto", "dtype": "auto"}
UNLIKE_LLAMA = ("gemma3", "phi3", "olmo2", "olmo3", "smollm3")  # parts or rotations that a record does not hold


@pytest.fixture(params=[OWN_PRODUCT, "transposed", "plain", "packed"])
def product(request, monkeypatch):
    use_plan(monkeypatch, "float32" if request.param == "packed" else "bfloat16", request.param)
    return request.param


@pytest.fixture
def in_bfloat16(monkeypatch):
    use_plan(monkeypatch, "bfloat16", OWN_PRODUCT)


@pytest.fixture(params=[OWN_PRODUCT, "packed"])
def directory(request, monkeypatch, tmp_path):
    """A model that was loaded once."""
    use_plan(monkeypatch, "float32" if request.param == "packed" else "bfloat16", request.param)
    bfloat16_model(tmp_path, CONFIGS["llama"]())
    return tmp_path


def load(directory, **options):
    return LanguageModel.load(directory, model_id="tiny", options=ModelOptions(**options))


def is_started(model):
    """Whether transformers' network was not read yet."""
    return isinstance(model._network, PlainNetwork)


def logits_of(model, num_tokens, seed=0):
    return model.forward(random_ids(num_tokens, seed), model.new_state(), num_logits=0)


@pytest.mark.parametrize("kind", ["llama", "llama with biases", "qwen3"])
def test_float16_weights_that_are_packed_are_kept_too(kind, monkeypatch, tmp_path):
    use_plan(monkeypatch, "float32", "packed")
    write_tiny_model(tmp_path, config=CONFIGS[kind](), dtype=torch.float16)
    whole = load(tmp_path)
    assert whole.kv_dtype == torch.float16
    assert_started(load(tmp_path), whole)


def test_float16_weights_that_are_rounded_are_not_kept(monkeypatch, tmp_path):
    use_plan(monkeypatch, "bfloat16", "transposed")
    write_tiny_model(tmp_path, config=CONFIGS["llama"](), dtype=torch.float16)
    assert load(tmp_path).decoder is not None
    assert not is_started(load(tmp_path))


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in UNLIKE_LLAMA])
@pytest.mark.usefixtures("product")
def test_it_gives_the_bits_of_the_whole_model(kind, tmp_path):
    whole = bfloat16_model(tmp_path, CONFIGS[kind]())
    assert_started(load(tmp_path), whole)


def assert_started(started, whole):
    assert not is_started(whole) and is_started(started)
    for name in (
        "stop_ids",
        "template",
        "thinking",
        "fingerprints",
        "rope",
        "window_tokens",
        "kv_shapes",
        "rules",
        "plan",
    ):
        assert getattr(started, name) == getattr(whole, name), name
    assert (started.kv_dtype, started.compute_dtype) == (whole.kv_dtype, whole.compute_dtype)
    assert started.rows_stay_apart == whole.rows_stay_apart
    for num_tokens in (1, 7, 60):
        assert torch.equal(logits_of(started, num_tokens), logits_of(whole, num_tokens))
    assert is_started(started)
    for num_tokens in (FEW_ROWS + 1, 7):
        assert torch.equal(logits_of(started, num_tokens), logits_of(whole, num_tokens))
    assert not is_started(started)


def weights_by_name(network):
    """Each parameter and the panels of each packed layer."""
    layers = ((name, module) for name, module in network.named_modules() if isinstance(module, PackedLinear))
    return dict(network.named_parameters()) | {f"{name}.weight": layer.packed.panels for name, layer in layers}


def test_the_network_takes_over_the_weights(directory):
    started = load(directory)
    weights = {name: value.data_ptr() for name, value in weights_by_name(started._network).items()}
    whole = weights_by_name(started.network)
    assert {name: value.data_ptr() for name, value in whole.items()} == weights
    assert not any(value.requires_grad for value in whole.values())
    in_16_bits = [value for value in whole.values() if value.dtype == torch.bfloat16]
    memories = {value.untyped_storage().data_ptr() for value in in_16_bits}
    assert len(memories) == 1  # nothing was copied to lie beside something else
    if len(in_16_bits) == len(whole):  # packed weights lie in small pages
        assert min(weights.values()) % HUGE_PAGE_BYTES == 0


@pytest.mark.parametrize("kind", [*OTHERS, *UNLIKE_LLAMA])
def test_other_networks_keep_no_start(kind, in_bfloat16, tmp_path):
    bfloat16_model(tmp_path, (OTHERS | CONFIGS)[kind]())
    assert not record_path(tmp_path, **AUTO).exists()


@pytest.mark.parametrize("options", [{"compute_dtype": "float32"}, {"device": "cpu", "compute_dtype": "float32"}])
@pytest.mark.parametrize("kept", [False, True])
def test_a_network_in_float32_is_kept_where_its_weights_are_packed(options, kept, monkeypatch, tmp_path):
    use_plan(monkeypatch, *(("float32", "packed") if kept else ("bfloat16", OWN_PRODUCT)))
    bfloat16_model(tmp_path, CONFIGS["llama"]())
    assert [is_started(load(tmp_path, **options)) for _ in range(2)] == [False, kept]
    assert record_path(tmp_path, options.get("device", "auto"), options["compute_dtype"]).exists() == kept


def test_a_model_in_float32_keeps_no_start(in_bfloat16, tmp_path):
    write_tiny_model(tmp_path)
    load(tmp_path)
    assert not record_path(tmp_path, **AUTO).exists()


def flip_a_weight(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)


def change_json(name, **changes):
    def change(directory):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


CHANGES = {
    "a weight": flip_a_weight,
    "epsilon": change_json("config.json", rms_norm_eps=1e-3),
    "window": change_json("config.json", max_position_embeddings=4096),
    "end of turn": change_json("generation_config.json", eos_token_id=5),
    "chat template": lambda directory: (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
    "another file": lambda directory: (directory / "special_tokens_map.json").write_text("{}"),
    "a file less": lambda directory: (directory / "generation_config.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_read_whole(change, directory):
    CHANGES[change](directory)
    assert begin(directory, adapter=None, **AUTO) is None
    try:
        model = load(directory)
    except UnsupportedModel:
        assert change == "chat template"
    else:
        assert not is_started(model)


def test_the_same_bytes_at_another_time_are_the_same_model(directory):
    for path in directory.iterdir():
        os.utime(path, ns=(1, 1))
    assert is_started(load(directory))


def test_another_plan_environment_library_or_source_is_another_start(directory, monkeypatch, tmp_path_factory):
    assert is_started(load(directory))
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "plan_runtime", lambda _: RuntimePlan("cpu", "bfloat16", 1, 2, OWN_PRODUCT, {}, ""))
        assert not is_started(load(directory))
    assert not is_started(load(directory))  # that of the other plan was kept in its place
    assert is_started(load(directory))
    for name, value in (("TORCH_TEST", "1"), ("ATEN_CPU_CAPABILITY", "default"), ("MKL_CBWR", "AVX2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert begin(directory, adapter=None, **AUTO) is None
    source = tmp_path_factory.mktemp("library") / "source.py"
    source.write_text("")
    for part in ("_sources", "_libraries"):
        with monkeypatch.context() as patch:
            own = getattr(facts, part)
            patch.setattr(facts, part, lambda *of, own=own: [*own(*of), source])
            assert begin(directory, adapter=None, **AUTO) is None
    assert begin(directory, adapter=None, **AUTO) is not None


def test_a_library_that_is_touched_or_upgraded_is_another_one(monkeypatch, tmp_path):
    package = tmp_path / "site" / "lib_of_tests"
    notes = tmp_path / "site" / "lib_of_tests-1.0.dist-info"
    package.mkdir(parents=True)
    notes.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(facts, "_LIBRARIES", ("lib_of_tests", "lib_that_is_not_there"))
    model = tmp_path / "model"
    model.mkdir()
    found = [facts.start_facts(model)]
    assert facts.start_facts(model) == found[0]
    os.utime(package / "__init__.py", ns=(1, 1))
    found.append(facts.start_facts(model))
    notes.rename(notes.with_name("lib_of_tests-1.1.dist-info"))
    found.append(facts.start_facts(model))
    assert len(set(found)) == 3


def test_a_damaged_record_is_none(directory):
    path = record_path(directory, **AUTO)
    whole, expected = path.read_bytes(), read_start(path)
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_start(path) in (None, expected), place  # the last digit of a number may say the same number
    for text in (whole[:-5], b"", b"[]", b"{}", b'{"sha256": 1}', b"\xff"):
        path.write_bytes(text)
        assert read_start(path) is None, text
    assert not is_started(load(directory))
    assert path.read_bytes() == whole
    assert is_started(load(directory))


def test_a_record_that_everybody_may_write_is_none(directory):
    path = record_path(directory, **AUTO)
    assert read_start(path) is not None
    path.chmod(0o666)
    assert read_start(path) is None
    assert begin(directory, adapter=None, **AUTO) is None


def test_a_damaged_or_absent_tokenizer_is_made_again(directory):
    path = record_path(directory, **AUTO).with_suffix(".tokenizer")
    path.write_bytes(path.read_bytes().replace(b'"BPE"', b'"BPF"'))
    assert not is_started(load(directory))
    path.unlink()
    assert not is_started(load(directory))
    assert is_started(load(directory))


@pytest.mark.parametrize(
    "change",
    [
        lambda start: {"inverse_frequencies": [value * 1.001 for value in start.inverse_frequencies]},
        lambda start: {"epsilons": dict.fromkeys(start.epsilons, 1e-3)},
        lambda start: {"rules": [rule | {"scale": rule["scale"] * 1.01} for rule in start.rules]},
        lambda start: {"probe_sha256": "0" * 64},
        lambda start: {"parameters": start.parameters[:-1]},
        lambda start: {"parameters": [*start.parameters, "model.layers.9.mlp.up_proj.weight"]},
        lambda start: {"kv_shapes": [*start.kv_shapes, start.kv_shapes[0]], "rules": [*start.rules, start.rules[0]]},
    ],
)
def test_other_numbers_than_were_checked_are_noticed(change, directory):
    """A record of another program's making: whole, of these files, and wrong."""
    expected = logits_of(load(directory), 7)
    path = record_path(directory, **AUTO)
    start = read_start(path)
    write_start(path, replace(start, **change(start)), path.with_suffix(".tokenizer").read_bytes())
    model = load(directory)
    assert not is_started(model)
    assert torch.equal(logits_of(model, 7), expected)


def test_files_that_change_while_they_are_read_are_read_again(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    expected = logits_of(bfloat16_model(other, CONFIGS["llama"](), seed=1), 7)
    begun = begin(directory, adapter=None, **AUTO)
    begun.weights()
    shutil.copyfile(other / "model.safetensors", directory / "model.safetensors")
    model = LanguageModel.load(directory, model_id="tiny", beginning=begun)
    assert not is_started(model)
    assert torch.equal(logits_of(model, 7), expected)


def test_the_beginning_of_another_model_is_not_taken(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    expected = logits_of(bfloat16_model(other, CONFIGS["llama"](), seed=1), 7)
    begun = begin(directory, adapter=None, **AUTO)
    model = LanguageModel.load(other, model_id="tiny", beginning=begun)
    assert torch.equal(logits_of(model, 7), expected)


def test_a_beginning_without_the_adapter_is_not_taken(directory, tmp_path_factory):
    peft = pytest.importorskip("peft")
    adapter = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(directory), config).save_pretrained(adapter)
    begun = begin(directory, adapter=None, **AUTO)
    assert begun is not None
    options = ModelOptions(adapter=adapter)
    model = LanguageModel.load(directory, model_id="tiny", options=options, beginning=begun)
    assert model.adapter == adapter
    assert model.fingerprints.adapter is not None
    assert not is_started(model)


def test_the_rest_of_another_model_is_refused(directory):
    started = load(directory)
    flip_a_weight(directory)
    with pytest.raises(ModelError, match="changed since it was loaded"):
        _ = started.network
    with pytest.raises(ModelError, match="changed since it was loaded"):
        _ = started.tokenizer.all_special_ids
    assert logits_of(started, 7).isfinite().all()


def test_a_home_that_cannot_be_written_keeps_nothing(in_bfloat16, tmp_path, monkeypatch):
    blocked = tmp_path / "home"
    blocked.write_text("a file")
    monkeypatch.setenv("CAG_HOME", str(blocked))
    bfloat16_model(tmp_path / "model", CONFIGS["llama"]())
    assert not is_started(load(tmp_path / "model"))


def test_the_tokenizer_is_that_of_the_model(directory):
    whole, started = load(directory, compute_dtype="float32").tokenizer, load(directory).tokenizer
    text = "Größe <|im_end|> 漢字 <|im_start|>user\n"
    for special in (False, True):
        options = {"add_special_tokens": False, "split_special_tokens": special, "verbose": False}
        assert started(text, **options)["input_ids"] == whole(text, **options)["input_ids"]
    ids = whole(text, add_special_tokens=False)["input_ids"]
    for skips in (False, True):
        options = {"skip_special_tokens": skips, "clean_up_tokenization_spaces": False}
        assert started.decode(ids, **options) == whole.decode(ids, **options)
    assert tokenizer_digest(started) == tokenizer_digest(whole)
    assert started._whole is None
    assert started(text, add_special_tokens=True)["input_ids"] == whole(text, add_special_tokens=True)["input_ids"]
    assert started.decode(ids) == whole.decode(ids)
    assert started.all_special_ids == whole.all_special_ids


@pytest.mark.usefixtures("in_bfloat16")
def test_other_threads_go_on_while_a_long_text_is_tokenized(tmp_path):
    bfloat16_model(tmp_path, CONFIGS["llama"]())
    load(tmp_path)
    tokenizer, turns, over = load(tmp_path).tokenizer, [], threading.Event()

    def go_on():
        while not over.wait(0.001):
            turns.append(1)

    other = threading.Thread(target=go_on)
    other.start()
    before = len(turns)
    tokenizer("some words " * 30_000, add_special_tokens=False, split_special_tokens=True)
    num_turns = len(turns) - before
    over.set()
    other.join()
    assert isinstance(tokenizer, KeptTokenizer) and num_turns > 9


def container(header, data=b"\0" * 64):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
DAMAGED = {
    "nothing": b"",
    "header behind the end": struct.pack("<Q", 1 << 40) + b"{}",
    "no JSON": container(b"\xff\xff"),
    "a list": container(b"[1]"),
    "fewer bytes than the shape": container({"a": GOOD["a"] | {"data_offsets": [0, 10]}}),
    "behind the end": container({"a": GOOD["a"] | {"data_offsets": [60, 72]}}),
    "before the beginning": container({"a": GOOD["a"] | {"data_offsets": [-12, 0]}}),
    "a negative size": container({"a": GOOD["a"] | {"shape": [-2, -3]}}),
    "another type": container({"a": GOOD["a"] | {"dtype": "F32"}}),
    "no such name": container({"b": GOOD["a"]}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_weights_are_not_read(damage, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(container(GOOD, bytes(range(64))))
    read = WeightReading(tmp_path, ["a"]).result()
    assert read.places == {"a": (0, 0, (2, 3))}
    assert read.memories[0][:12].tolist() == list(range(12))
    (tmp_path / "model.safetensors").write_bytes(DAMAGED[damage])
    assert WeightReading(tmp_path, ["a"]).result() is None
    assert WeightReading(tmp_path, [], {"a": "a"}, 16).result() is None


def test_weights_of_another_type_are_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(container(GOOD))
    assert WeightReading(tmp_path, ["a"], dtype="float16").result() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 16), (35, 48), (1, 16), (64, 3)])
def test_weights_are_packed_as_the_kernels_want_them(shape, dtype, tmp_path):
    weight = torch.randn(shape, dtype=torch.float32).to(dtype)
    save_file({"odd": torch.zeros(3, dtype=dtype), "weight": weight}, tmp_path / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    read = WeightReading(tmp_path, ["odd"], {"first": "weight", "second": "weight"}, PANEL, name).result()
    found = weights_of(read, SimpleNamespace(packed=["first", "second"], panel_rows=PANEL, stored_dtype=name))
    assert torch.equal(found["odd"], torch.zeros(3, dtype=dtype))
    for name in ("first", "second"):
        assert found[name].panels.shape == (-(-shape[0] // PANEL), shape[1], PANEL)
        assert torch.equal(found[name].unpacked(), weight)
        assert found[name].panels.transpose(1, 2).reshape(-1, shape[1])[shape[0] :].abs().sum() == 0


@pytest.mark.parametrize("num_read", [0, 1, 9])
def test_what_slow_memory_leaves_in_the_file_gives_the_same(num_read, directory, monkeypatch):
    expected = load(directory)
    steps = iter([0.0] * (1 + num_read) + [1e9] * 99)
    monkeypatch.setattr(reading._read_all, "__defaults__", (lambda: next(steps),))
    started = load(directory)
    assert is_started(started)
    memories = {value.untyped_storage().data_ptr() for value in started._network.parameters()}
    assert len(memories) > 1
    assert torch.equal(logits_of(started, 7), logits_of(expected, 7))
    assert torch.equal(logits_of(started, FEW_ROWS + 1), logits_of(expected, FEW_ROWS + 1))


def test_one_name_in_two_files_is_not_read(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(container(GOOD))
    assert WeightReading(tmp_path, ["a"]).result() is None
