"""What is read of a model's folder: quantized weights as plain ones, the text part of a network with eyes, and what is
refused because it would be another network."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    GptOssConfig,
    LlavaConfig,
    Mistral3Config,
    Qwen3MoeConfig,
)

from cag import model_files
from cag.errors import InsufficientResources, ModelError, UnsupportedModel
from cag.model import LanguageModel, ModelOptions
from cag.models.checkpoint import read_checkpoint
from tiny import tiny_config, tiny_tokenizer, write_tiny_model

BLOCK = 32
SMALL = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 257, "max_position_embeddings": 4096}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_key_value_heads": 2}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
GROUP = {"targets": ["Linear"], "weights": INT8}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": GROUP},
}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
IDS = torch.randint(0, 250, (70,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model in bfloat16 without quantization."""
    return write_tiny_model(
        tmp_path_factory.mktemp("plain") / "model",
        config=tiny_config(**SIZES, dtype="bfloat16"),
        dtype=torch.bfloat16,
    )


def is_quantized(name, tensor):
    return "proj" in name and tensor.ndim == 2


def other_names(name, weight):
    """Blocks whose scales have the names that other programs give them."""
    stored, weight = fp8_blocks(name, weight)
    return {part.replace("_scale_inv", "_scale"): value for part, value in stored.items()}, weight


def write_like(plain, directory, described, change):
    """A copy of the model in `plain` with `change(name, weight)` in the place of each projection; it gives tensors by
    name, and the weight that they stand for. Returns the folder, and all weights by name."""
    shutil.copytree(plain, directory)
    tensors, weights = {}, load_file(plain / "model.safetensors")
    for name, weight in weights.items():
        if is_quantized(name, weight):
            stored, weights[name] = change(name, weight.float())
            tensors |= stored
        else:
            tensors[name] = weight
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    set_fields(directory, quantization_config=described)
    return directory, weights


def set_fields(directory, **fields):
    path = directory / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def fp8_blocks(name, weight):
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    whole = torch.zeros(rows * BLOCK, columns * BLOCK)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    blocks = whole.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(whole.shape)[: weight.shape[0], : weight.shape[1]]
    codes = codes.to(torch.float8_e4m3fn)
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * wide


def fp8_whole(name, weight):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    activations = name.replace("weight", "activation_scale")
    return {name: codes, f"{name}_scale_inv": scale, activations: torch.tensor(0.1)}, codes.float() * scale


def int8_rows(name, weight):
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale.float()


def logits(directory, **options):
    model = LanguageModel.load(directory, model_id="tiny", options=ModelOptions(**options))
    return model.forward(IDS.tolist(), model.new_state(), num_logits=0), model


def assert_computes_with(directory, plain, weights, *, close=1e-2, **options):
    """Against transformers' network over the weights, rounded as bfloat16 has them."""
    network = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager")
    network.load_state_dict({name: weight.bfloat16().float() for name, weight in weights.items()})
    with torch.inference_mode():
        expected = network(input_ids=IDS[None]).logits[0]
    found, model = logits(directory, **options)
    assert (found - expected).norm() < close * expected.norm()
    return model


KINDS = {
    "fp8 in blocks": (FP8, fp8_blocks),
    "fp8 with one scale": (FP8 | {"weight_block_size": None, "activation_scheme": "static"}, fp8_whole),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_fp8_is_read_as_plain_weights(plain, tmp_path, kind, dtype):
    pytest.importorskip("accelerate")
    described, change = KINDS[kind]
    directory, weights = write_like(plain, tmp_path / "model", described, change)
    model = assert_computes_with(directory, plain, weights, compute_dtype=dtype)
    assert torch.equal(*(logits(directory, compute_dtype=dtype)[0] for _ in range(2)))  # no start is kept of other bits
    assert model.kv_dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.network.parameters()} <= {torch.bfloat16, torch.float32}


def test_blocks_that_are_cut_off_are_refused(tmp_path):
    """96 rows in blocks of 64: transformers would take 48 for each scale."""
    plain = write_tiny_model(tmp_path / "plain", config=tiny_config(**SIZES, dtype="bfloat16"), dtype=torch.bfloat16)
    directory, _ = write_like(
        plain,
        tmp_path / "model",
        FP8 | {"weight_block_size": [64, BLOCK]},
        lambda name, weight: fp8_blocks(name, weight),
    )
    with pytest.raises(UnsupportedModel, match=r"no whole number of blocks of \[64, 32\]"):
        LanguageModel.load(directory, model_id="tiny")


@pytest.mark.parametrize("described", [None, FP8])
def test_scales_that_nothing_takes_are_refused(plain, tmp_path, described):
    """As other programs name them: without them each weight would be another number."""
    pytest.importorskip("accelerate")
    directory, _ = write_like(plain, tmp_path / "model", described, other_names)
    with pytest.raises(UnsupportedModel, match=r"no place for, such as model\.layers\.0\.mlp\.down_proj\.weight_scale"):
        LanguageModel.load(directory, model_id="tiny")


def test_experts_are_read_as_plain_weights_with_their_scales(tmp_path):
    """In files they are modules, in the network one tensor."""
    pytest.importorskip("accelerate")
    config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, dtype="bfloat16")
    plain = write_tiny_model(tmp_path / "plain", config=config, dtype=torch.bfloat16)
    directory, weights = write_like(plain, tmp_path / "model", FP8, fp8_blocks)
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(directory)[0], logits(plain)[0])
    directory, _ = write_like(plain, tmp_path / "other", FP8, other_names)
    with pytest.raises(UnsupportedModel, match=r"experts\.0\.down_proj\.weight_scale"):
        LanguageModel.load(directory, model_id="tiny")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_read_as_plain_weights(tmp_path, dtype):
    """Pairs of 4-bit numbers in a byte, and a power of two for each 32 of them."""
    pytest.importorskip("accelerate")
    write_tiny_model(
        tmp_path, config=GptOssConfig(**SMALL | {"intermediate_size": 64}, num_local_experts=2, num_experts_per_tok=2)
    )
    stored, expected = {}, {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
        powers = groups.abs().amax(-1).log2().floor() - 2
        codes = (groups[..., None] / powers.exp2()[..., None, None] - FP4).abs().argmin(-1).to(torch.uint8)
        stored[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous()
        stored[f"{name}_scales"] = (powers + 127).to(torch.uint8)
        expected[name] = (FP4[codes.long()] * powers.exp2()[..., None]).flatten(-2).transpose(1, 2)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    set_fields(tmp_path, quantization_config={"quant_method": "mxfp4"})
    network = model_files.read_network(tmp_path, dtype)
    found = network.state_dict()
    assert len(expected) == 4 and all(torch.equal(found[name].float(), expected[name]) for name in expected)
    model, ids = LanguageModel.load(tmp_path, model_id="oss"), torch.arange(40) * 7 % 250
    with torch.inference_mode():
        logits = network(input_ids=ids[None], use_cache=False).logits[0].float()
    assert (model.forward(ids, model.new_state(), num_logits=0) - logits).norm() < 0.03 * logits.norm()


def test_a_bias_that_the_configuration_does_not_know_is_refused(plain, tmp_path):
    def with_bias(name, weight):
        return {name: weight.bfloat16(), name.replace("weight", "bias"): torch.ones(len(weight))}, weight

    directory, _ = write_like(plain, tmp_path / "model", None, with_bias)
    with pytest.raises(UnsupportedModel, match=r"down_proj\.bias"):
        LanguageModel.load(directory, model_id="tiny")


@pytest.mark.parametrize(
    "method", ["hqq", "nvfp4", "torchao", "quanto", "modelopt", "gguf", "unheard-of", None, ["fp8"]]
)
def test_other_formats_are_refused_by_name(plain, tmp_path, method):
    directory, _ = write_like(plain, tmp_path / "model", None, lambda name, weight: ({name: weight.bfloat16()}, weight))
    set_fields(directory, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModel) as caught:
        LanguageModel.load(directory, model_id="tiny")
    assert f"quantized as {method!r}" in str(caught.value) and "compressed-tensors" in caught.value.hint


def test_a_description_that_is_none_is_a_typed_error(plain, tmp_path):
    directory, _ = write_like(plain, tmp_path / "model", None, lambda name, weight: ({name: weight.bfloat16()}, weight))
    set_fields(directory, quantization_config=["fp8"])
    with pytest.raises(ModelError, match="configuration"):
        LanguageModel.load(directory, model_id="tiny")


def test_a_library_that_is_missing_is_named(plain, tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: False)
    directory, _ = write_like(plain, tmp_path / "model", FP8, fp8_blocks)
    with pytest.raises(ModelError, match=r"requires accelerate.*cag-engine\[quantized\]"):
        LanguageModel.load(directory, model_id="tiny")


def test_compressed_tensors_are_read_as_plain_weights(plain, tmp_path):
    pytest.importorskip("compressed_tensors")
    directory, weights = write_like(plain, tmp_path / "model", COMPRESSED, int8_rows)
    if [int(number) for number in transformers.__version__.split(".")[:2]] < [5, 23]:
        with pytest.raises(UnsupportedModel, match="no place for"):  # it does not unpack them
            LanguageModel.load(directory, model_id="tiny")
        return
    assert_computes_with(directory, plain, weights)


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_in_compressed_tensors_are_read_as_plain_weights(plain, tmp_path, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def packed(name, weight):
        groups = weight.view(len(weight), -1, BLOCK)
        least, most = groups.amin(-1), groups.amax(-1)
        scale = ((most - least) / 15 if not symmetric else groups.abs().amax(-1) / 7).bfloat16()
        zero = (-8 - (least / scale.float())).round().clamp(-8, 7) if not symmetric else torch.zeros_like(least)
        codes = ((groups / scale.float()[..., None]).round() + zero[..., None]).clamp(-8, 7)
        own = name.removesuffix("weight")
        stored = {
            f"{own}weight_packed": pack_to_int32(codes.view(weight.shape).to(torch.int8), 4),
            f"{own}weight_scale": scale,
            f"{own}weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored[f"{own}weight_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0).contiguous()
        return stored, ((codes - zero[..., None]) * scale.float()[..., None]).view(weight.shape)

    scheme = INT8 | {"num_bits": 4, "strategy": "group", "group_size": BLOCK, "symmetric": symmetric}
    described = COMPRESSED | {"format": "pack-quantized", "config_groups": {"group_0": GROUP | {"weights": scheme}}}
    directory, weights = write_like(plain, tmp_path / "model", described, packed)
    assert_computes_with(directory, plain, weights)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"config_groups": {"a": GROUP, "b": GROUP | {"weights": INT8 | {"num_bits": 4}}}}, "2 formats at once"),
        ({"transform_config": {"config_groups": {"R4": {}}}}, "transform_config"),
    ],
)
def test_mixtures_and_rotations_of_compressed_tensors_are_refused(plain, tmp_path, change, told):
    directory, _ = write_like(plain, tmp_path / "model", COMPRESSED | change, int8_rows)
    with pytest.raises(UnsupportedModel, match=told):
        LanguageModel.load(directory, model_id="tiny")


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_are_read_as_plain_weights(plain, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    wanted = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.bfloat16, quantization_config=wanted, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    weights = quantized.dequantize(torch.bfloat16).state_dict()
    model = assert_computes_with(tmp_path / "model", plain, weights)
    assert not any(hasattr(module, "_hf_hook") for module in model.network.modules())


def test_an_adapter_is_merged_into_weights_that_were_quantized(plain, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    directory, weights = write_like(plain, tmp_path / "model", FP8, fp8_blocks)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.base_model.model.load_state_dict(
        {name.replace("q_proj.", "q_proj.base_layer.").replace("down_proj.", "down_proj.base_layer."): weight
         for name, weight in weights.items()}, strict=False,
    )  # fmt: skip
    merged = adapted.merge_and_unload().state_dict()
    assert_computes_with(directory, plain, merged, close=2e-2, adapter=tmp_path / "adapter")


def test_memory_is_asked_for_by_numbers_and_not_by_files(plain, tmp_path, monkeypatch):
    """Stored in a byte each they take two; files that are not read take none."""
    directory, weights = write_like(plain, tmp_path / "model", FP8, fp8_blocks)
    shutil.copy(plain / "model.safetensors", directory / "consolidated.safetensors")
    needed = 2 * sum(weight.numel() for weight in weights.values())
    arguments = read_checkpoint(directory).num_weights(), torch.bfloat16, torch.device("cpu")
    monkeypatch.setattr(model_files, "free_memory_bytes", lambda _device: needed)
    model_files.check_memory(*arguments)
    monkeypatch.setattr(model_files, "free_memory_bytes", lambda _device: needed - 1)
    with pytest.raises(InsufficientResources):
        model_files.check_memory(*arguments)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("files", ["one", "two alike", "two"])
@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_asked_for_an_output_matrix_that_does_not_share_the_embedding(tied, files, packs, tmp_path):
    """Packed it is a copy; and files may hold one of their own, whatever the configuration says."""
    config = tiny_config(vocab_size=272, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    directory = write_tiny_model(tmp_path / "model", config=config, dtype=torch.bfloat16)
    weights = load_file(directory / "model.safetensors")
    if tied and files == "one":
        del weights["lm_head.weight"]
    if files == "two alike":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    described = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(described))
    asked = read_checkpoint(directory).num_weights(apart=packs)
    network = model_files.read_network(directory, torch.bfloat16)
    taken = sum(weight.numel() for weight in network.parameters())
    is_shared = network.lm_head.weight is network.model.embed_tokens.weight
    copied = network.lm_head.weight.numel() if is_shared and (packs or files == "two alike") else 0
    assert asked == taken + copied


EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
EYES |= {"image_size": 28, "patch_size": 14}
SEEING = {
    "gemma3": lambda: Gemma3Config(
        text_config=SMALL | {"sliding_window": 20}, vision_config=EYES, mm_tokens_per_image=4, eos_token_id=[1, 257]
    ),
    "llava": lambda: LlavaConfig(
        text_config=SMALL | {"model_type": "llama"}, vision_config=EYES | {"model_type": "clip_vision_model"}
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=SMALL | {"model_type": "mistral"},
        vision_config=EYES | {"model_type": "pixtral", "head_dim": 16},
        tie_word_embeddings=False,
    ),
}


def write_seeing(directory, kind):
    """A network with eyes in bfloat16; returns it in float32."""
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(SEEING[kind](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    network.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("kind", SEEING)
def test_of_a_network_that_sees_the_text_part_is_read(tmp_path, kind):
    network = write_seeing(tmp_path, kind)
    with torch.inference_mode():
        expected = network(input_ids=IDS[None]).logits[0]
    found, model = logits(tmp_path, compute_dtype="float32")
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert not any("vision" in name or "projector" in name for name, _ in model.network.named_modules())
    assert model.kv_dtype == torch.bfloat16 and type(model.network).__name__.endswith("ForCausalLM")


def test_the_names_that_newer_files_have_are_known_too(tmp_path):
    write_seeing(tmp_path, "mistral3")
    before = logits(tmp_path)[0]
    file = tmp_path / "model.safetensors"
    renamed = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): value
        for name, value in load_file(file).items()
    }
    assert any(name.startswith("model.language_model.layers.") for name in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    assert torch.equal(logits(tmp_path)[0], before)


def test_what_ends_an_answer_is_said_of_all_parts(tmp_path):
    write_seeing(tmp_path, "gemma3")
    (tmp_path / "generation_config.json").unlink()
    assert LanguageModel.load(tmp_path, model_id="tiny").stop_ids >= {1, 257}


def test_the_quantization_of_all_parts_holds_for_the_text_part(tmp_path):
    pytest.importorskip("accelerate")
    write_seeing(tmp_path / "plain", "mistral3")
    directory, weights = write_like(tmp_path / "plain", tmp_path / "model", FP8, fp8_blocks)
    stored = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(stored, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    expected, found = logits(tmp_path / "plain")[0], logits(directory)[0]
    assert (found - expected).norm() < 1e-2 * expected.norm()
    set_fields(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UnsupportedModel, match="bitsandbytes, of which the text part"):
        LanguageModel.load(directory, model_id="tiny")


def test_networks_that_do_not_continue_text_are_refused(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "model")
    set_fields(tmp_path / "model", model_type="qwen2_5_vl")
    with pytest.raises(UnsupportedModel, match="type qwen2_5_vl, which is not served"):
        LanguageModel.load(tmp_path / "model", model_id="tiny")
