"""The transposed product against the ordinary one."""

import pytest
import torch

from cag_kernels import few_rows_linear


@pytest.mark.parametrize("rows", [1, 2, 15, 47])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_linear(rows, bias, dtype):
    generator = torch.Generator().manual_seed(rows)
    block = torch.randn(1, rows, 33, generator=generator).to(dtype)
    layer = torch.nn.Linear(33, 70, bias=bias, dtype=dtype)
    expected = torch.nn.functional.linear(block.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = (layer(block).double() - expected).abs().max()
    out = few_rows_linear(block, layer.weight, layer.bias)
    assert out.is_contiguous()
    assert out.shape == (1, rows, 70)
    assert (out.double() - expected).abs().max() <= 2 * plain + torch.finfo(torch.float32).eps
