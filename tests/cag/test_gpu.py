"""Building, reloading and answering on a CUDA device. `make test-gpu`."""

import pytest
import torch

from cag.engine import Engine
from cag.prompt import question_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def test_a_reloaded_cache_gives_the_logits_of_the_build(tiny_model_dir, corpus_dir, tmp_path):
    engine = Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cuda")
    report = engine.build([corpus_dir], name="a")
    assert report.fidelity.mean_kl == 0
    on_cpu = Engine.load(str(tiny_model_dir), store=tmp_path / "other", device="cpu")
    on_cpu.build([corpus_dir], name="a")
    with engine.open("a") as prefix, on_cpu.open("a") as expected:
        assert prefix.keys_values(0)[0].is_cuda
        suffix = question_ids(engine.model.tokenizer, prefix.template, "When does the gate open?")
        found = engine.model.forward(suffix, engine.model.new_state(prefix.resident), num_logits=0)
        want = on_cpu.model.forward(suffix, on_cpu.model.new_state(expected.resident), num_logits=0)
        assert (found.cpu() - want).abs().max() < 1e-2 * want.abs().max()
        assert prefix.ask("When does the gate open?", max_tokens=4).usage.cached_tokens == report.num_tokens
