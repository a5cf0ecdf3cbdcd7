"""Caches on their way to a GPU: through memory of the host, layer by layer, and codes stay codes there."""

import pytest
import torch

from cag import model as model_module
from cag.engine import Engine
from cag.model import LanguageModel, ModelOptions
from cag.prompt import question_ids
from cag.resident import CodedBuffers, HostBuffers, ResidentPrefix
from cag.runtime import RuntimePlan
from cag.uploads import Uploads
from cag_kernels import DensePrefix, QuantizedPrefix
from cag_store import Store
from tiny import tiny_config, write_tiny_model

QUESTION = "When does the gate open?"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def engine(request, tmp_path, monkeypatch):
    """A tiny network in bfloat16 with heads that kernels take."""
    plan = RuntimePlan(request.param, "bfloat16", 1, 1, "plain", {}, "for tests")
    monkeypatch.setattr(model_module, "plan_runtime", lambda _device: plan)
    directory = write_tiny_model(tmp_path / "model", config=tiny_config(hidden_size=64, head_dim=32))
    options = ModelOptions(device=request.param, compute_dtype="bfloat16")
    model = LanguageModel.load(directory, model_id="tiny", options=options)
    model.kv_dtype = torch.bfloat16  # the tiny model is stored in float32
    if request.param == "cpu":
        model.run_in_steps(capture=False)
    else:
        model.run_in_steps(capture=True)
    return Engine(model, Store.open(tmp_path / "store"))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codes_arrive_as_they_are(engine, corpus_dir, codec):
    """What is sent on to other memory is what the store decodes in place."""
    report = engine.build([corpus_dir], name="a", codec=codec)
    assert report.num_tokens > 100
    with engine.open("a") as prefix, engine.store.reader(prefix.manifest) as reader:
        prefix.resident.wait()
        shapes = reader.coded_shapes()
        sent = CodedBuffers(shapes, torch.device("cpu"))
        size = sent._starts[-1]
        sent._set_memory(torch.zeros(size, dtype=torch.uint8), torch.full((size,), 0x55, dtype=torch.uint8))
        reader.load(sent.views(), sent.arrived)
        for found, expected in zip(sent.layers(), prefix.resident._layers, strict=True):
            assert isinstance(found[0], QuantizedPrefix)
            assert len(found) == len(expected)
            for got, want in zip(found, expected, strict=True):
                assert all(torch.equal(a, b.cpu()) for a, b in zip(got, want, strict=True) if torch.is_tensor(a))


def test_numbers_arrive_as_they_are(engine, corpus_dir):
    engine.build([corpus_dir], name="a", codec="lossless")
    with engine.open("a") as prefix, engine.store.reader(prefix.manifest) as reader:
        shapes = [(s.num_kv_heads, prefix.resident.num_tokens, s.head_dim) for s in engine.model.kv_shapes]
        host, device = ([torch.empty(size, dtype=torch.bfloat16) for size in shapes] for _ in range(2))
        buffers = HostBuffers(device, [torch.empty_like(part) for part in device])
        buffers._host = list(zip(host, [torch.empty_like(part) for part in host], strict=True))
        buffers.uploads = Uploads(torch.device("cpu"))
        reader.load(buffers.views(), buffers.arrived)
        for layer, (segment,) in enumerate(buffers.layers()):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(segment, prefix.keys_values(layer), strict=True))


@pytest.mark.parametrize("codec", ["lossless", "int8", "int4"])
def test_answers_from_a_loaded_cache(engine, corpus_dir, codec):
    """Codes in memory give the logits of the numbers that they stand for; questions and answers run in steps."""
    report = engine.build([corpus_dir], name="a", codec=codec)
    model = engine.model
    with engine.open("a") as prefix:
        prefix.resident.wait()
        layers = range(len(model.kv_shapes))
        is_coded = [isinstance(prefix.resident.segments(layer)[0], QuantizedPrefix) for layer in layers]
        assert all(is_coded) == any(is_coded) == (codec != "lossless")
        assert prefix.resident.segments(0)[0][0].device.type == model.device.type
        if codec != "lossless":
            assert report.raw_bytes / prefix.resident.num_bytes > 1.7
        numbers = ResidentPrefix([(DensePrefix(*prefix.keys_values(layer)),) for layer in layers], prefix.token_ids)
        numbers.mark_loaded()
        suffix = question_ids(model.tokenizer, prefix.template, QUESTION)
        found = model.forward(suffix, model.new_session_state(prefix.resident))
        expected = model.forward(suffix, model.new_session_state(numbers))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
        together = prefix.ask_all([QUESTION] * 5, max_tokens=6)
        assert len({answer.token_ids for answer in together}) == 1
        assert {answer.usage.cached_tokens for answer in together} == {report.num_tokens}
    model.pages.check_integrity([])
