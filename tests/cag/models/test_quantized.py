"""GPTQ and AWQ checkpoints: each weight is the number that its code, scale and zero point stand for; what is not
certain, or damaged, is an error that names it."""

import json

import pytest
import torch
from quantized import AWQ, GPTQ, awq, awq_words, change_tensors, gptq, gptq_words, set_fields, write_quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Mistral3Config, Qwen3MoeConfig

from cag.errors import ModelError, UnsupportedModel
from cag.model import LanguageModel
from cag.model_files import read_network
from cag.models import fetch_model
from cag.models.checkpoint import read_checkpoint
from tiny import tiny_config, write_tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2}
SMALL = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 257, "max_position_embeddings": 4096}
LAYER = "model.layers.0.mlp.up_proj"
ROUND = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int", "quant_method": "auto-round"}


def write_plain(directory, dtype=torch.float16, **changes):
    config = tiny_config(**SIZES | {"dtype": str(dtype).removeprefix("torch.")} | changes)
    return write_tiny_model(directory, config=config, dtype=dtype)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model in float16 without quantization."""
    return write_plain(tmp_path_factory.mktemp("plain") / "model")


def assert_reads(directory, weights, dtype=torch.float16):
    found = read_network(directory, dtype).state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight.to(dtype)) for name, weight in weights.items())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("form, lacking", [(None, 1), ("gptq", 1), ("gptq_v2", 0)])
def test_gptq_is_read_to_the_bit(plain, tmp_path, bits, desc_act, form, lacking):
    described = (
        GPTQ | {"bits": bits, "desc_act": desc_act, "sym": False} | ({"checkpoint_format": form} if form else {})
    )
    change = gptq(bits, desc_act=desc_act, symmetric=False, lacking=lacking)
    assert_reads(*write_quantized(plain, tmp_path / "model", described, change))


@pytest.mark.parametrize("size", [-1, 16, 64, 80])
@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_of_all_sizes_are_read_to_the_bit(plain, tmp_path, size, desc_act):
    """64 and 96 inputs: one group, many, and a last one that is not full."""
    described = GPTQ | {"group_size": size, "desc_act": desc_act}
    assert_reads(*write_quantized(plain, tmp_path / "model", described, gptq(size=size, desc_act=desc_act)))


@pytest.mark.parametrize("size", [-1, 16, 32])
def test_awq_is_read_to_the_bit(plain, tmp_path, size):
    assert_reads(*write_quantized(plain, tmp_path / "model", AWQ | {"group_size": size}, awq(size)))


@pytest.mark.parametrize("layout, change", [("gptq", gptq(indices=False)), ("awq", awq())])
def test_auto_round_packs_in_both_ways(plain, tmp_path, layout, change):
    described = ROUND | {"packing_format": f"auto_round:auto_{layout}", "extra_config": {"lm_head": {"bits": 16}}}
    assert_reads(*write_quantized(plain, tmp_path / "model", described, change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("described, pack", [(GPTQ, gptq), (AWQ, awq)])
def test_weights_are_rounded_to_the_type_of_the_checkpoint_once(tmp_path, dtype, described, pack):
    """Also where they are then widened to compute."""
    plain = write_plain(tmp_path / "plain", dtype)
    for scales in (torch.float16, dtype):
        directory, weights = write_quantized(plain, tmp_path / str(scales), described, pack(scales=scales))
        assert_reads(directory, {name: weight.to(dtype) for name, weight in weights.items()}, torch.float32)


def test_a_layer_of_many_blocks_is_read_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("cag.models.quantized._BLOCK_WEIGHTS", 500)
    plain = write_plain(tmp_path / "plain")
    for described, change in ((GPTQ, gptq()), (AWQ, awq())):
        assert_reads(*write_quantized(plain, tmp_path / described["quant_method"], described, change))


@pytest.mark.parametrize("described, change", [(GPTQ, gptq()), (AWQ, awq())])
def test_the_model_answers_as_one_of_plain_weights(plain, tmp_path, described, change):
    directory, weights = write_quantized(plain, tmp_path / "model", described, change)
    network = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    network.load_state_dict({name: weight.half().float() for name, weight in weights.items()})
    model, ids = LanguageModel.load(directory, model_id="tiny"), torch.arange(70) * 7 % 250
    with torch.inference_mode():
        expected = network(input_ids=ids[None]).logits[0]
    assert (model.forward(ids.tolist(), model.new_state(), num_logits=0) - expected).norm() < 1e-2 * expected.norm()
    assert model.kv_dtype == torch.float16
    assert read_checkpoint(directory).num_weights() == sum(weight.numel() for weight in weights.values())


def test_what_ends_an_answer_is_read_too(plain, tmp_path):
    directory, _ = write_quantized(plain, tmp_path / "model", GPTQ, gptq())
    set_fields(directory / "generation_config.json", eos_token_id=[7, 257])
    assert LanguageModel.load(directory, model_id="tiny").stop_ids == {7, 257}
    (directory / "generation_config.json").unlink()
    set_fields(directory / "config.json", eos_token_id=9)
    assert LanguageModel.load(directory, model_id="tiny").stop_ids == {9, 257}


@pytest.mark.parametrize("every", [lambda name: "mlp" in name, lambda name: "proj" in name or "lm_head" in name])
def test_which_layers_are_quantized_is_said_by_their_names(plain, tmp_path, every):
    described = GPTQ | {"dynamic": {"-:.*self_attn.*": {}}, "lm_head": True, "modules_in_block_to_quantize": [["mlp"]]}
    directory, weights = write_quantized(
        plain, tmp_path / "model", described, lambda weight: gptq()(weight[: len(weight) // 32 * 32]), every=every
    )
    if len(weights["lm_head.weight"]) != 258:  # no whole number of words
        with pytest.raises(ModelError, match=r"weights of another shape, such as lm_head\.weight"):
            read_network(directory, torch.float16)
    else:
        assert_reads(directory, weights)


def test_layers_lie_in_several_files(plain, tmp_path):
    directory, weights = write_quantized(plain, tmp_path / "model", GPTQ, gptq())
    tensors = load_file(directory / "model.safetensors")
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: value for name, value in tensors.items() if places[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors").rename(directory / "other.safetensors")  # which the index does not name
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert_reads(directory, weights)


@pytest.mark.parametrize(
    "file, said, change",
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, gptq()),
        ("quantize_config.json", AWQ, awq()),
        ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, awq()),
    ],
)
def test_older_checkpoints_are_described_beside(plain, tmp_path, file, said, change):
    directory, weights = write_quantized(plain, tmp_path / "model", None, change)
    with pytest.raises(UnsupportedModel, match="no place for"):
        read_network(directory, torch.float16)
    (directory / file).write_text(json.dumps(said))
    assert_reads(directory, weights)
    assert fetch_model(directory).source == "local"
    (directory / file).write_text("[")
    with pytest.raises(ModelError, match=file):
        read_network(directory, torch.float16)


def test_a_description_beside_plain_weights_is_nothing(plain, tmp_path):
    directory, weights = write_quantized(plain, tmp_path / "model", None, gptq(), every=lambda name: False)
    (directory / "quantize_config.json").write_text("{}")
    assert_reads(directory, weights)


def test_experts_are_read_as_plain_weights(tmp_path):
    """In files they are layers, in the network one tensor."""
    config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, dtype="float16")
    plain = write_tiny_model(tmp_path / "plain", config=config, dtype=torch.float16)
    for described, change in ((GPTQ, gptq()), (AWQ, awq())):
        directory, weights = write_quantized(plain, tmp_path / described["quant_method"], described, change)
        stored = {name: weight.half().contiguous() for name, weight in weights.items()}
        save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
        assert_reads(directory, read_network(plain, torch.float16).state_dict())


def test_of_a_network_that_sees_the_text_part_is_read(tmp_path):
    from transformers import AutoModelForImageTextToText

    eyes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14, "model_type": "pixtral", "head_dim": 16}
    config = Mistral3Config(
        text_config=SMALL | {"model_type": "mistral"}, vision_config=eyes, tie_word_embeddings=False
    )
    plain = tmp_path / "plain"
    AutoModelForImageTextToText.from_config(config, dtype=torch.float16).save_pretrained(plain)
    directory, weights = write_quantized(
        plain, tmp_path / "model", AWQ, awq(), every=lambda name: "language_model" in name and "proj" in name
    )
    stored = {name: weight.half().contiguous() for name, weight in weights.items()}
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    assert_reads(directory, read_network(plain, torch.float16).state_dict())


def test_biases_of_zeros_add_nothing(plain, tmp_path):
    """AutoGPTQ gives one to each layer. Others are another network."""

    def with_bias(weight):
        parts, weight = gptq()(weight)
        return parts | {"bias": torch.zeros(len(weight), dtype=torch.float16)}, weight

    directory, weights = write_quantized(plain, tmp_path / "model", GPTQ, with_bias)
    assert_reads(directory, weights)
    change_tensors(directory, lambda tensors: tensors[f"{LAYER}.bias"].__setitem__(3, 0.5))
    with pytest.raises(UnsupportedModel, match=rf"1 tensors .* no place for, such as {LAYER}\.bias"):
        read_network(directory, torch.float16)


def test_biases_that_the_network_has_are_read(tmp_path):
    plain = write_plain(tmp_path / "plain", attention_bias=True)
    assert_reads(*write_quantized(plain, tmp_path / "model", AWQ, awq()))


def test_networks_whose_layers_lie_the_other_way_round_are_refused(tmp_path):
    config = GPT2Config(vocab_size=258, n_embd=64, n_layer=1, n_head=4, dtype="float16", pad_token_id=257)
    plain = write_tiny_model(tmp_path / "plain", config=config, dtype=torch.float16)
    directory, _ = write_quantized(
        plain, tmp_path / "model", GPTQ, gptq(), every=lambda name: name.endswith("attn.c_proj.weight")
    )
    with pytest.raises(UnsupportedModel, match="gpt2 quantized as 'gptq', of which inputs and outputs"):
        read_network(directory, torch.float16)


@pytest.mark.parametrize(
    "described, told",
    [
        (GPTQ | {"bits": 5}, "bits 5"),
        (GPTQ | {"bits": 4.0}, "bits 4.0"),
        (GPTQ | {"bits": None}, "bits None"),
        (GPTQ | {"group_size": 0}, "group_size 0"),
        (GPTQ | {"group_size": None}, "group_size None"),
        (GPTQ | {"group_size": True}, "group_size True"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ | {"checkpoint_format": "GPTQ_V2"}, "checkpoint_format 'GPTQ_V2'"),
        (GPTQ | {"format": "gptq_p"}, "format 'gptq_p'"),
        (GPTQ | {"format": "gptq", "checkpoint_format": "gptq_v2"}, "the formats"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format True"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        (GPTQ | {"rotation": "hadamard"}, "rotation 'hadamard'"),
        (GPTQ | {"adapter": {"name": "lora"}}, "adapter"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        (GPTQ | {"dynamic": [8]}, "dynamic"),
        (GPTQ | {"packing_format": "auto_round:auto_awq"}, "packing_format"),
        (AWQ | {"bits": 8}, "bits 8"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"version": "gemv_fast"}, "version 'gemv_fast'"),
        (AWQ | {"version": "marlin"}, "version 'marlin'"),
        (AWQ | {"backend": "llm-awq"}, "backend 'llm-awq'"),
        (ROUND, "packing_format None"),
        (ROUND | {"packing_format": "auto_round"}, "packing_format 'auto_round'"),
        (ROUND | {"packing_format": "auto_round:auto_gptq", "act_bits": 8}, "act_bits 8"),
        (ROUND | {"packing_format": "auto_round:auto_gptq", "data_type": "mx_fp"}, "data_type 'mx_fp'"),
        (ROUND | {"packing_format": "auto_round:auto_gptq", "extra_config": {"a": {"bits": 8}}}, "extra_config"),
    ],
)
def test_what_is_not_known_for_certain_is_refused_by_name(plain, tmp_path, described, told):
    directory, _ = write_quantized(plain, tmp_path / "model", described, gptq())
    with pytest.raises(UnsupportedModel) as caught:
        read_network(directory, torch.float16)
    assert f"quantized with {told}" in str(caught.value) and caught.value.hint


def without(part):
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def put(part, change):
    def change_part(tensors):
        tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"]).contiguous()

    return change_part


def exchanged(indices):
    indices[[0, 40]] = indices[[40, 0]]
    return indices


DAMAGED = {
    "codes are missing": (GPTQ, without("qweight"), "lacks qweight"),
    "scales are missing": (GPTQ, without("scales"), "lacks scales"),
    "zero points are missing": (AWQ, without("qzeros"), "lacks qzeros"),
    "indices are missing": (GPTQ | {"desc_act": True}, without("g_idx"), "lacks g_idx"),
    "scales of fewer groups": (GPTQ, put("scales", lambda scales: scales[:1]), r"has scales as F16 \[1, 96\]"),
    "scales of fewer outputs": (AWQ, put("scales", lambda scales: scales[:, :64]), r"has scales as F16 \[2, 64\]"),
    "scales of codes": (GPTQ, put("scales", lambda scales: scales.int()), "has scales as I32"),
    "zero points of fewer outputs": (GPTQ, put("qzeros", lambda zeros: zeros[:, :8]), r"has qzeros as I32 \[2, 8\]"),
    "zero points of another kind": (GPTQ, put("qzeros", lambda zeros: zeros.short()), "has qzeros as I16"),
    "codes of bytes": (GPTQ, put("qweight", lambda words: words.view(torch.uint8)), "has qweight as U8"),
    "codes in another shape": (GPTQ, put("qweight", lambda words: words[None]), r"has a qweight of shape \[1, 8, 96\]"),
    "no codes": (AWQ, put("qweight", lambda words: words[:0]), r"has a qweight of shape \[0, 12\]"),
    "codes of fewer inputs": (GPTQ, put("qweight", lambda words: words[:6]), r"has g_idx as I32 \[64\]"),
    "codes of other bits": (GPTQ | {"bits": 8}, lambda tensors: None, "has qzeros as"),
    "codes of three bits that end early": (
        GPTQ | {"bits": 3},
        put("qweight", lambda words: words[:5]),
        "has qweight as",
    ),
    "fewer indices": (GPTQ, put("g_idx", lambda indices: indices[:32]), r"has g_idx as I32 \[32\]"),
    "indices that are no numbers": (GPTQ, put("g_idx", lambda indices: indices.half()), "has g_idx as F16"),
    "a group that is not there": (GPTQ | {"desc_act": True}, put("g_idx", lambda indices: indices + 1), "has a g_idx"),
    "a group before the first": (GPTQ | {"desc_act": True}, put("g_idx", lambda indices: indices - 1), "has a g_idx"),
    "all in one group": (GPTQ | {"desc_act": True}, put("g_idx", torch.zeros_like), "has a g_idx"),
    "an order that is denied": (GPTQ, put("g_idx", exchanged), "has a g_idx"),
    "indices of AWQ": (AWQ, lambda tensors: tensors.update({f"{LAYER}.g_idx": torch.arange(64)}), "has g_idx as I64"),
    "a plain weight besides": (
        GPTQ,
        lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(96, 64)}),
        "has a weight and a quantized one",
    ),
    "scales of an activation": (
        AWQ,
        lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(96)}),
        "mlp.act lacks qweight",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_parts_that_do_not_belong_together_are_named(plain, tmp_path, kind):
    described, damage, told = DAMAGED[kind]
    change = awq() if described is AWQ else gptq(bits=3 if described["bits"] == 3 else 4)
    directory, _ = write_quantized(plain, tmp_path / "model", described, change)
    change_tensors(directory, damage)
    with pytest.raises(ModelError, match=told) as caught:
        read_network(directory, torch.float16)
    assert str(caught.value).startswith("the ") and caught.value.hint


def test_a_layer_of_another_size_is_refused(plain, tmp_path):
    directory, _ = write_quantized(plain, tmp_path / "model", GPTQ, gptq())

    def replace(tensors):
        parts, _ = gptq()(torch.randn(96, 32))
        tensors.update({f"{LAYER}.{part}": value for part, value in parts.items()})

    change_tensors(directory, replace)
    with pytest.raises(ModelError, match=rf"another shape, such as {LAYER}\.weight: \(96, 32\)"):
        read_network(directory, torch.float16)


def test_a_zero_point_that_programs_read_as_different_numbers_is_refused(plain, tmp_path):
    """15 and one more: 16, 0, or 0 with one more in its neighbour."""
    directory, _ = write_quantized(plain, tmp_path / "model", GPTQ | {"sym": False}, gptq())
    spoilt = torch.full((2, 96), 7)
    spoilt[1, 5] = 15
    change_tensors(directory, put("qzeros", lambda _: gptq_words(spoilt, 4)))
    with pytest.raises(UnsupportedModel, match=rf"{LAYER} has a stored zero point of 15"):
        read_network(directory, torch.float16)
    set_fields(directory / "config.json", quantization_config=GPTQ | {"checkpoint_format": "gptq_v2"})
    read_network(directory, torch.float16)


def test_all_codes_of_awq_and_gptq_lie_where_they_are_described():
    """Words written down by hand."""
    assert gptq_words(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), 4).tolist() == [[0x87654321 - 2**32]]
    assert awq_words(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]])).tolist() == [[0x75316420]]
    assert gptq_words(torch.tensor([[0] * 10 + [5] + [0] * 21]), 3).tolist() == [[1 << 30, 1, 0]]


@pytest.mark.parametrize("zero_points", [False, True])
def test_experts_of_compressed_tensors_that_are_not_joined_are_refused(tmp_path, zero_points):
    def stored(weight):
        parts = {"weight": weight.to(torch.int8), "weight_scale": torch.ones(len(weight), 1)}
        return {"weight_zero_point": torch.zeros(len(weight), 1)} if zero_points else parts, weight

    config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1, dtype="bfloat16")
    plain = write_tiny_model(tmp_path / "plain", config=config, dtype=torch.bfloat16)
    described = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}
    directory, _ = write_quantized(plain, tmp_path / "model", described, stored)
    with pytest.raises(UnsupportedModel, match=r"experts\.\d.* of an expert in 8-bit integers or with zero points"):
        read_network(directory, torch.bfloat16)
