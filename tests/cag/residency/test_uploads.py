"""Caches on their way to a GPU: through memory of the host, layer by layer, and codes stay codes there."""

import pytest
import torch

from cag import model as model_module
from cag.engine import Engine
from cag.machine.runtime import RuntimePlan
from cag.model import LanguageModel, ModelOptions
from cag.prompt import question_ids
from cag.residency.buffers import CodedBuffers, HostBuffers
from cag.residency.host_copies import HostCopies, HostCopy
from cag.residency.load_plan import plan_load
from cag.residency.resident import ResidentPrefix
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


@pytest.mark.parametrize("codec", ["lossless", "int8", "int4"])
def test_what_is_sent_on_is_what_the_store_decodes_in_place(engine, corpus_dir, codec):
    """Through other memory, and from that memory once more; device memory that nothing was sent to shows."""
    engine.build([corpus_dir], name="a", codec=codec)
    with engine.open("a") as prefix, engine.store.reader(prefix.manifest) as reader:
        prefix.resident.wait()
        sent = buffers_of(engine, reader)
        reader.load(sent.views(), sent.arrived)
        assert_same_layers(sent.layers(), prefix.resident)
        shapes, device = engine.model.kv_shapes, torch.device("cpu")
        again = ResidentPrefix.promote(sent.host_copy(), plan_load(reader, shapes, torch.bfloat16, device))
        again.wait()
        assert again.tier == "memory"
        assert again.num_bytes == prefix.resident.num_bytes
        assert_same_layers([again.segments(layer) for layer in range(len(again._layers))], prefix.resident)
        assert again.segments(0)[0][0].data_ptr() != sent.layers()[0][0][0].data_ptr()


def buffers_of(engine, reader):
    """Buffers as a GPU has them, on the CPU."""
    shapes, cpu = reader.coded_shapes(), torch.device("cpu")
    if shapes is not None:
        return CodedBuffers(shapes, torch.bfloat16, cpu, through_host=True)
    sizes = [(s.num_kv_heads, len(reader.token_ids()), s.head_dim) for s in engine.model.kv_shapes]
    in_place = HostBuffers.of(sizes, torch.bfloat16, cpu)
    return HostBuffers(in_place._device, through_host=True)


def assert_same_layers(found, resident):
    for got, want in zip(found, resident._layers, strict=True):
        assert [type(segment) for segment in got] == [type(segment) for segment in want]
        for mine, theirs in zip(got, want, strict=True):
            assert all(torch.equal(a, b.cpu()) for a, b in zip(mine, theirs, strict=True) if torch.is_tensor(a))


def test_a_cache_that_left_comes_back_from_the_host(engine, corpus_dir, monkeypatch):
    engine.build([corpus_dir], name="a", codec="int8")
    engine.host_copies = HostCopies(1 << 30)
    with engine.open("a") as prefix, engine.store.reader(prefix.manifest) as reader:
        expected = prefix.ask(QUESTION, max_tokens=5)
        if engine.model.device.type == "cpu":  # where nothing is kept by itself
            sent = buffers_of(engine, reader)
            reader.load(sent.views(), sent.arrived)
            engine.host_copies.put(prefix.digest, sent.host_copy())
    monkeypatch.setattr(ResidentPrefix, "load", pytest.fail)
    with engine.open("a") as prefix:
        assert prefix.ask(QUESTION, max_tokens=5).token_ids == expected.token_ids
        assert prefix.resident.tier == "memory"


def test_copies_count_what_torch_takes_for_them(engine, corpus_dir, monkeypatch):
    """It rounds memory that is pinned up to a power of two."""
    engine.build([corpus_dir], name="a", codec="int8")
    with engine.store.open_reader("a")[2] as reader:
        copies = [buffers_of(engine, reader).host_copy()]
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
        copies.append(buffers_of(engine, reader).host_copy())
    sizes = [copy.num_bytes for copy in copies]
    assert sizes[1].bit_count() == 1
    if engine.model.device.type == "cpu":
        assert sizes[0] < sizes[1] < 2 * sizes[0]


def test_copies_keep_their_limit(monkeypatch):
    given_back = []
    monkeypatch.setattr("cag.residency.host_copies.give_back_pinned", lambda: given_back.append(copies.num_bytes))
    copies = HostCopies(100)
    for name, size in (("a", 40), ("b", 40)):
        copies.put(name, HostCopy(size, dict))
    assert copies.get("a").num_bytes == 40
    copies.put("c", HostCopy(50, dict))  # b was used longest ago
    assert copies.get("b") is None
    assert copies.num_bytes == 90
    copies.put("d", HostCopy(101, dict))
    assert copies.get("d") is None
    copies.put("a", HostCopy(30, dict))
    assert copies.num_bytes == 80
    assert given_back == [90]  # once, when one had to go


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
