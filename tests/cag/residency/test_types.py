"""Prefixes of models in any type: a cache in codes takes its codec's bytes, with exact tokens in the model's type."""

import pytest
import torch

from cag.engine import Engine
from cag_kernels import QuantizedPrefix, has_compiler
from tiny import tiny_config, write_tiny_model

QUESTIONS = ["When does the gate open?", "Who has seen the key of the pump?"]
EXPECTED = {torch.bfloat16: 0.6, torch.float16: 0.6, torch.float32: 0.32}  # bytes of `int8` over those of numbers


@pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")
@pytest.mark.parametrize("dtype", EXPECTED)
def test_codes_stay_codes(dtype, tmp_path):
    config = tiny_config(hidden_size=64, head_dim=32, num_hidden_layers=2)
    directory = write_tiny_model(tmp_path / "model", config=config, dtype=dtype)
    (tmp_path / "gates.txt").write_text("The gate opens at seven. The pump is green. " * 40)
    engine = Engine.load(str(directory), store=tmp_path / "store", device="cpu")
    for codec in ("lossless", "int8"):
        engine.build([tmp_path / "gates.txt"], name=codec, codec=codec)
    with engine.open("lossless") as numbers, engine.open("int8") as codes:
        for prefix in (numbers, codes):
            prefix.resident.wait()
        (segment, *recent) = codes.resident.segments(0)
        assert isinstance(segment, QuantizedPrefix)
        assert {part.exact_keys.dtype if part is segment else part.keys.dtype for part in (segment, *recent)} == {dtype}
        assert codes.resident.num_bytes < EXPECTED[dtype] * numbers.resident.num_bytes
        for mine, exact in zip(codes.keys_values(layer=1), numbers.keys_values(layer=1), strict=True):
            assert mine.dtype == exact.dtype == dtype
            assert (mine.float() - exact.float()).norm() < 0.02 * exact.float().norm()
            assert torch.equal(mine[:, : segment.exact_keys.shape[1]], exact[:, : segment.exact_keys.shape[1]])
        together = codes.ask_all(QUESTIONS, max_tokens=12)
        assert [one.token_ids for one in together] == [codes.ask(one, max_tokens=12).token_ids for one in QUESTIONS]
