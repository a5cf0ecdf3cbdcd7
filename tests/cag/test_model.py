"""Loading: what is refused by name, what memory is asked for before, and states of sequences."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, LlamaForCausalLM, Phi3Config

from cag import model_files
from cag.errors import InsufficientResources, ModelError, UnsupportedModel, UsageError
from cag.forward.state import KvShape, Tail
from cag.model import LanguageModel, ModelOptions
from cag.model_files import refuse_unsupported
from tiny import tiny_config, write_tiny_model


def test_unknown_kinds_of_layers_are_refused_by_name():
    config = tiny_config()
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        refuse_unsupported(config)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_prompts_length_is_refused_beside_another(rope_type):
    config = tiny_config()
    config.rope_parameters = {"full_attention": {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}}
    with pytest.raises(UnsupportedModel, match=rope_type):
        refuse_unsupported(config)


def test_encoder_decoder_models_are_refused():
    config = tiny_config()
    config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModel, match="decoder-only"):
        refuse_unsupported(config)


READ_AT_ONCE = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from cag.model_files import read_tokenizer
from cag.models.checkpoint import read_checkpoint

with ThreadPoolExecutor(2) as threads:
    config = threads.submit(read_checkpoint, Path(sys.argv[1]))
    while "transformers" not in sys.modules and not config.done():
        time.sleep(0.001)
    read_tokenizer(Path(sys.argv[1]))
    config.result()
"""


def test_two_threads_may_need_transformers_first_at_the_same_time(tiny_model_dir):
    """As the first requests of a server whose model was loaded without it."""
    command = [sys.executable, "-c", READ_AT_ONCE, str(tiny_model_dir)]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("kind", ["gemma2", "phi3"])
def test_caps_and_fused_projections_load_and_run(kind, tmp_path):
    """Score caps (Gemma 2), one projection for query, key and value (Phi 3): against eager attention."""
    from transformers import AutoModelForCausalLM

    shared = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shared |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 257, "eos_token_id": 257}
    config = {
        "gemma2": lambda: Gemma2Config(**shared, head_dim=16, sliding_window=20, attn_logit_softcapping=5.0),
        "phi3": lambda: Phi3Config(**shared),
    }[kind]()
    directory = write_tiny_model(tmp_path / kind, config=config)
    model = LanguageModel.load(directory, model_id=kind)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, 250, (90,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = plain(input_ids=ids[None]).logits[0]
    state = model.new_state()
    found = torch.cat([model.forward(part.tolist(), state, num_logits=0) for part in (ids[:50], ids[50:])])
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_too_little_memory_is_said_before_loading(tiny_model_dir, monkeypatch):
    from cag import model_files

    monkeypatch.setattr(model_files, "free_memory_bytes", lambda _device: 1000)
    with pytest.raises(InsufficientResources, match="GB of memory"):
        LanguageModel.load(tiny_model_dir, model_id="tiny")


def test_a_broken_directory_is_a_typed_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((ModelError, UnsupportedModel)):
        LanguageModel.load(tmp_path, model_id="broken")


def _without_a_weight(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _with_a_weight_of_another_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without_a_weight, "lack 1 weights"),
        (_with_a_weight_of_another_shape, r"another shape, such as .*: \(3, 3\) where \(64, 32\)"),
    ],
)
def test_weights_that_would_be_made_up_are_refused(tmp_path, change, told):
    directory = write_tiny_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=told):
        LanguageModel.load(directory, model_id="tiny")


def test_an_encoder_is_told_from_a_model_that_was_not_fetched_whole(tmp_path):
    from transformers import BertConfig, BertModel

    directory = write_tiny_model(tmp_path / "model")
    config = BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(directory)
    with pytest.raises(ModelError, match="weights, such as") as caught:
        LanguageModel.load(directory, model_id="tiny")
    assert "BertModel" in caught.value.hint


def test_a_file_of_weights_that_is_none_is_a_typed_error(tmp_path):
    directory = write_tiny_model(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"\xff" * 1000)
    with pytest.raises(ModelError, match="cannot load"):
        LanguageModel.load(directory, model_id="tiny")


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "strange"
class Model(LlamaForCausalLM): config_class = Config
class Words(PreTrainedTokenizerFast): pass
"""
STRANGE = {
    "config.json": {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "Words",
        "auto_map": {"AutoTokenizer": ["code.Words", "code.Words"]},
    },
}


@pytest.mark.parametrize("name", STRANGE)
def test_code_in_a_models_folder_is_not_run_and_nobody_is_asked(tmp_path, name, monkeypatch):
    directory = write_tiny_model(tmp_path / "model")
    (directory / "code.py").write_text(CODE)
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | STRANGE[name]))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ModelError):
        LanguageModel.load(directory, model_id="tiny")
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_not_asked_for(tmp_path, field):
    directory = write_tiny_model(tmp_path / "model")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "kernels-community/flash-attn2"}))
    model = LanguageModel.load(directory, model_id="tiny")
    assert model.forward([1, 2, 3], model.new_state()).isfinite().all()


def test_pickled_weights_beside_other_tensors_are_not_read(tmp_path):
    directory = write_tiny_model(tmp_path / "model")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        LanguageModel.load(directory, model_id="tiny")


def _adapter_without(directory, base, part):
    """A LoRA adapter on the queries whose file lacks what has `part` in its name."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        directory
    )
    file = directory / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
    save_file(kept, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj.lora_A", "lora_B"])
def test_an_adapter_that_lacks_weights_is_refused(tmp_path, tiny_model_dir, part):
    pytest.importorskip("peft")
    _adapter_without(tmp_path / "adapter", tiny_model_dir, part)
    with pytest.raises(ModelError, match="lacks"):
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(adapter=tmp_path / "adapter"))


def test_an_adapter_that_is_nowhere_is_told_from_one_of_another_form(tmp_path, tiny_model_dir):
    with pytest.raises(ModelError, match=r"no folder .*nowhere"):
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(adapter=tmp_path / "nowhere"))


def test_a_pickled_adapter_beside_other_tensors_is_not_read(tmp_path, tiny_model_dir):
    pytest.importorskip("peft")
    file = _adapter_without(tmp_path / "adapter", tiny_model_dir, "nothing")
    LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(adapter=tmp_path / "adapter"))
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.rename(file.with_name("other.safetensors"))
    with pytest.raises(ModelError, match="safetensors"):
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(adapter=tmp_path / "adapter"))


def _adapter_of_kind(kind):
    import peft

    if kind == "PREFIX_TUNING":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    if kind == "PROMPT_TUNING":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    more = {"alora_invocation_tokens": [1, 2]} if kind == "alora_invocation_tokens" else {}
    more |= {"lora_bias": True, "bias": "lora_only"} if kind == "no bias" else {}
    more |= {"layer_replication": [(0, 2), (0, 2)]} if kind == "layer_replication" else {}
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **more)


@pytest.mark.parametrize(
    "kind", ["PREFIX_TUNING", "PROMPT_TUNING", "alora_invocation_tokens", "layer_replication", "no bias"]
)
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_an_adapter_that_no_weights_can_hold_is_refused_by_name(kind, tmp_path, tiny_model_dir):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    peft.get_peft_model(network, _adapter_of_kind(kind)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"cannot be merged.*{kind}|{kind}.*cannot be merged"):
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(adapter=tmp_path / "adapter"))


@pytest.mark.parametrize("start, told", [("pissa", None), ("pissa_niter_2", "pissa_niter_2")])
def test_an_adapter_that_is_another_model_at_each_load_is_refused(tmp_path, tiny_model_dir, start, told):
    """PiSSA by a fast decomposition takes other random numbers from the network's weights each time."""
    peft = pytest.importorskip("peft")
    network = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(network, config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=told) if told else nullcontext():
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(adapter=tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "adapter/adapter_model.safetensors"])
def test_a_model_that_changes_while_it_is_read_is_refused(tmp_path, name, monkeypatch):
    """Numbers of the old files would have the fingerprint of the new ones."""
    directory, adapter = write_tiny_model(tmp_path), tmp_path / "adapter"
    pytest.importorskip("peft")
    _adapter_without(adapter, directory, "nothing")
    read = model_files.read_network

    def interrupted(*arguments):
        network = read(*arguments)
        os.replace(shutil.copy(directory / name, directory / "new"), directory / name)
        return network

    monkeypatch.setattr(model_files, "read_network", interrupted)
    with pytest.raises(ModelError, match="changed while it was read"):
        LanguageModel.load(directory, model_id="tiny", options=ModelOptions(adapter=adapter))
    monkeypatch.undo()
    LanguageModel.load(directory, model_id="tiny", options=ModelOptions(adapter=adapter))


def test_unknown_dtypes_and_devices_are_refused(tiny_model_dir):
    with pytest.raises(UsageError, match="int3"):
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(compute_dtype="int3"))
    with pytest.raises(UsageError, match="abacus"):
        LanguageModel.load(tiny_model_dir, model_id="tiny", options=ModelOptions(device="abacus"))


def test_keys_and_values_keep_the_checkpoints_type_whatever_is_computed_in(tmp_path):
    from transformers import AutoModelForCausalLM

    directory = write_tiny_model(tmp_path / "model")
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    network.save_pretrained(directory)
    model = LanguageModel.load(directory, model_id="tiny", options=ModelOptions(compute_dtype="float32"))
    assert model.compute_dtype == torch.float32
    state = model.new_state()
    model.forward([1, 2, 3], state)
    assert {tensor.dtype for tensor in (*state.tail.keys, *state.tail.values)} == {torch.bfloat16}


def test_a_tail_grows_and_keeps_what_it_holds():
    tail = Tail([KvShape(2, 4), KvShape(1, 8)], torch.float32, torch.device("cpu"), 3)
    for buffer in (*tail.keys, *tail.values):
        buffer.copy_(torch.randn_like(buffer))
    before = [buffer[:, :2].clone() for buffer in (*tail.keys, *tail.values)]
    tail.reserve(3, used=2)
    assert tail.capacity == 3
    tail.reserve(200, used=2)
    assert tail.capacity >= 200
    assert all(torch.equal(a, b[:, :2]) for a, b in zip(before, (*tail.keys, *tail.values), strict=True))
    assert tail.num_bytes == 2 * 4 * tail.capacity * (2 * 4 + 8)
