"""Calibration on tiny random models: rotations are found, the basis decodes, and the codec is worth its bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hybrids import FAMILIES
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    SmolLM3Config,
)

from cag.calibration import CalibrationOptions, calibrate, model_basis, model_codec, rotation
from cag.calibration.observe import _readings, observe
from cag.calibration.rotation import find_rotations
from cag.calibration.texts import own_texts, token_windows
from cag.errors import UnsupportedModel, UsageError
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel
from cag.prefill import prefill
from cag.residency.buffers import storage_view
from cag_store import Store, codec_from_config
from cag_store.blob import pack_blob
from tiny import tiny_config, write_tiny_model

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 257,
}
CONFIGS = {
    "llama": tiny_config(num_hidden_layers=3),
    "llama3 scaling": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    "qwen2 with biases": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {"hidden_size": 64}),
    "gemma3 with sliding windows": Gemma3TextConfig(
        **SIZES, sliding_window=64, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}
OPTIONS = CalibrationOptions(
    joint_layers=2, num_windows=9, corpus_windows=2, window_tokens=160, least_step=-1280, step=-1280
)


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def model(request, tmp_path_factory, home_of_models) -> LanguageModel:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    return LanguageModel.load(write_tiny_model(folder, config=CONFIGS[request.param]), model_id="tiny")


def tiny_model(folder, config) -> LanguageModel:
    return LanguageModel.load(write_tiny_model(folder, config=config), model_id="tiny")


def cache_of(model: LanguageModel, num_tokens: int = 200):
    state = model.new_state(capacity=num_tokens)
    text = own_texts()[0]
    prefill(model, state, model.tokenizer(text)["input_ids"][:num_tokens])
    return [
        [storage_view(array[:, :num_tokens]).copy() for array in side] for side in (state.tail.keys, state.tail.values)
    ]


def test_every_layer_has_its_rotation(model):
    rotations, layer_rotation = find_rotations(model)
    assert all(index >= 0 for index in layer_rotation)
    assert {rotation.pairing for rotation in rotations} == {"halves"}
    if "gemma" in model.network.config.model_type:
        assert layer_rotation == (0, 1, 0)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next", "lfm2", "falcon_h1", "bamba", "olmo_hybrid"])
def test_rotations_behind_recurrent_layers_are_found(family, tmp_path):
    """What such a layer knows of one token depends on nothing but the token."""
    found, of_layers = find_rotations(tiny_model(tmp_path, FAMILIES[family]()))
    assert len(found) == 1 and set(of_layers) == {0}


def test_rotations_of_layers_with_sinks_are_found(tmp_path):
    """How much goes to a sink depends on how many tokens there are."""
    config = GptOssConfig(**SIZES, sliding_window=24, num_local_experts=4, num_experts_per_tok=2)
    assert set(find_rotations(tiny_model(tmp_path, config))[1]) == {0}


def test_layers_without_positions_have_no_rotation(tmp_path):
    """Every second layer of these."""
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1])
    assert find_rotations(tiny_model(tmp_path, config))[1] == (0, -1, 0)


def test_a_wrong_rotation_is_not_taken(model, monkeypatch):
    wrong = [
        replace(found, inverse_frequencies=tuple(1.5 * number for number in found.inverse_frequencies))
        for found in find_rotations(model)[0]
    ]
    monkeypatch.setattr(rotation, "_candidates", lambda _: iter(wrong))
    assert set(find_rotations(model)[1]) == {-1}


def test_gradients_are_those_of_the_likelihood(model):
    """The metric is a sum of outer products: positive, and larger for what the predictions read."""
    windows = token_windows(model, own_texts()[:1], 2, 64)
    rotations, layer_rotation = find_rotations(model)
    samples = observe(model, windows, rotations, layer_rotation, 2, 2)
    assert [len(keys.layers) for keys, _ in samples] == [2, 1]
    for keys, values in (pair for group in samples for pair in zip(*(side.layers for side in group), strict=True)):
        for side in (keys, values):
            assert torch.linalg.eigvalsh(side.metric).min() > -1e-6 * side.metric.abs().max()
            assert side.metric.diagonal(dim1=1, dim2=2).sum() > 0
            assert side.num_gradients == 2 * (32 - 4)
        assert keys.reading is None
        assert values.reading is not None


def test_what_reads_values_is_found_in_packed_weights(tmp_path, monkeypatch):
    directory, found = write_tiny_model(tmp_path, config=CONFIGS["llama"]), []
    for product in ("packed", "plain"):
        plan = RuntimePlan("cpu", "float32", 1, 1, product, {}, "for tests")
        monkeypatch.setattr("cag.model.plan_runtime", lambda _device, plan=plan: plan)
        found.append(_readings(LanguageModel.load(directory, model_id="tiny")))
    assert all(map(torch.equal, *found))


def test_mean_and_covariance_are_those_of_the_rows(model):
    """Whether a window gives gradients or not, its tokens count in the same way."""
    windows = token_windows(model, own_texts()[:2], 4, 64)
    rotations, layer_rotation = find_rotations(model)
    every = observe(model, windows, rotations, layer_rotation, 3, 4)
    some = observe(model, windows, rotations, layer_rotation, 3, 2)
    for all_rows, few_rows in zip(every[0], some[0], strict=True):
        rows = torch.cat(all_rows.rows).double()
        assert len(rows) == all_rows.num_rows == few_rows.num_rows == 4 * 60
        for side in (all_rows, few_rows):
            scale = rows.var(0).sqrt()
            assert torch.allclose(side.mean.double(), rows.mean(0), atol=0.02 * float(scale.max()))
            difference = side.covariance.double() - torch.cov(rows.T, correction=0)
            assert float((difference / torch.outer(scale, scale)).abs().max()) < 0.03


def test_the_codec_keeps_more_the_finer_the_step(model):
    store = Store.in_memory()
    calibration = calibrate(model, store, options=OPTIONS)
    assert calibration.num_tokens > 3 * 100
    assert calibration.codec["joint_layers"] == 2
    cache = cache_of(model)
    dtype = "float32"
    errors, sizes = [], []
    for step in (-896, -1088, -1280):
        codec = codec_from_config({**calibration.codec, "step": step}, store.get_blob)
        error, size = 0.0, 0
        for side, arrays in zip(("keys", "values"), cache, strict=True):
            for first in (0, 2):
                group = arrays[first : first + 2]
                data = codec.encode_layers(group, dtype, side, first)
                outs = [np.zeros_like(array) for array in group]
                codec.decode_layers_into(data, outs, side, first)
                size += len(data)
                error += sum(float(((a - b) ** 2).sum() / a[:, 4:].var()) for a, b in zip(group, outs, strict=True))
                assert all(np.array_equal(a[:, :4], b[:, :4]) for a, b in zip(group, outs, strict=True))
        errors.append(error)
        sizes.append(size)
    assert errors[0] > errors[1] > errors[2]
    assert sizes[0] < sizes[1] < sizes[2]


def test_the_same_texts_give_the_same_basis(model):
    store = Store.in_memory()
    texts = ["A text of the corpus. " * 60]
    options = replace(OPTIONS, own_texts=False)
    first, second = (calibrate(model, store, texts, options).codec for _ in range(2))
    assert first == second
    assert first != calibrate(model, store, ["Another one, quite different? " * 60], options).codec


@pytest.mark.parametrize("number", [float("nan"), 1e30])
def test_a_model_that_computes_no_numbers_has_no_basis(number, tmp_path, home_of_models):
    network = AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    with torch.no_grad():
        network.lm_head.weight.fill_(number)  # predictions are NaN, or gradients by the cache are beyond float32
    network.save_pretrained(tmp_path / "model")
    model = LanguageModel.load(tmp_path / "model", model_id="tiny")
    store = Store.open(tmp_path / "store")
    with store.build_lease(), pytest.raises(UnsupportedModel, match="not numbers"):
        calibrate(model, store, options=OPTIONS)


def test_too_little_text_is_an_error(model):
    with pytest.raises(UsageError, match="tokens"):
        calibrate(model, Store.in_memory(), ["x"], replace(OPTIONS, own_texts=False))


class TestTheModelsOwnBasis:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CAG_HOME", str(tmp_path))

    @pytest.fixture
    def counted(self, monkeypatch):
        """How often a basis was made."""
        made = []

        def make_basis(*arguments):
            made.append(arguments)
            return original(*arguments)

        original = model_basis.make_basis
        monkeypatch.setattr(model_basis, "make_basis", make_basis)
        return made

    def test_it_is_made_once_and_serves_every_step_and_store(self, model, counted):
        first, second = Store.in_memory(), Store.in_memory()
        fine = model_codec(model, first, -1280, OPTIONS)
        coarse = model_codec(model, second, -1000, OPTIONS)
        assert len(counted) == 1
        assert coarse == {**fine, "step": -1000}
        assert first.get_blob(fine["basis"]) == second.get_blob(fine["basis"])
        expected = calibrate(model, Store.in_memory(), options=OPTIONS).codec
        assert fine == expected

    def test_making_it_tells_how_far_it_is(self, model, counted):
        told = []
        model_codec(model, Store.in_memory(), -1280, OPTIONS, lambda *amounts: told.append(amounts))
        stages, done, totals = zip(*told, strict=True)
        assert set(stages) == {"basis"} and list(done) == sorted({0, *done}) and set(totals) == {done[-1]}
        again = []
        model_codec(model, Store.in_memory(), -1280, OPTIONS, lambda *amounts: again.append(amounts))
        assert again == []

    @pytest.mark.parametrize("model", ["llama"], indirect=True)
    def test_other_options_make_another_one(self, model, counted):
        store = Store.in_memory()
        found = {model_codec(model, store, -1280, replace(OPTIONS, seed=seed))["basis"] for seed in (0, 1)}
        assert len(counted) == len(found) == 2

    @pytest.mark.parametrize(
        "model, damage", [*zip(CONFIGS, ["cut", "flipped", "empty", "foreign"], strict=True)], indirect=["model"]
    )
    def test_a_damaged_file_is_made_again(self, model, counted, damage):
        store = Store.in_memory()
        codec = model_codec(model, store, -1280, OPTIONS)
        path = model_basis.basis_path(model, OPTIONS)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        wrong = {"cut": bytes(data[:-9]), "flipped": bytes(data), "empty": b"", "foreign": pack_blob(b"text")}[damage]
        path.write_bytes(wrong)
        assert model_codec(model, store, -1280, OPTIONS) == codec
        assert len(counted) == 2
        assert [found.suffix for found in path.parent.iterdir()] == [".basis"]
