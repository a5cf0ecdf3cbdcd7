"""The product over a few rows against the ordinary one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cag_kernels import few_rows_linear
from cag_kernels.cpu import has_compiler
from cag_kernels.linear import compiled_linear_serves, warm_up_linear

compiled = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")


def operands(rows, out_features, in_features, bias=False):
    """Normal numbers that depend on the shape alone."""
    generator = torch.Generator().manual_seed(rows * 10_007 + out_features * 101 + in_features)
    shapes = [(rows, in_features), (out_features, in_features), (out_features,)]
    block, weight, start = (torch.randn(shape, generator=generator) for shape in shapes)
    return block, weight, start if bias else None


def assert_as_good_as_linear(block, weight, bias):
    """At most twice plain linear's root mean square error, and nothing far off."""
    expected = torch.nn.functional.linear(block.double(), weight.double(), None if bias is None else bias.double())
    plain = torch.nn.functional.linear(block, weight, bias).double() - expected
    error = few_rows_linear(block, weight, bias).double() - expected
    rounding = torch.finfo(torch.float32).eps * weight.shape[1] ** 0.5  # where the sample is too small to compare
    assert error.square().mean().sqrt() <= 2 * plain.square().mean().sqrt() + rounding
    assert error.abs().max() <= 2 * plain.abs().max() + 2 * rounding


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


@compiled
@pytest.mark.parametrize("rows", range(1, 49))
def test_compiled_takes_every_number_of_rows(rows):
    block, weight, bias = operands(rows, 67, 80, bias=rows % 2 == 0)
    assert compiled_linear_serves(block, weight, bias)
    assert_as_good_as_linear(block, weight, bias)


@compiled
@pytest.mark.parametrize("in_features", [16, 48, 576, 768, 784, 8960])
@pytest.mark.parametrize("out_features", [1, 2, 3, 5, 31, 129])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_takes_every_shape(in_features, out_features, bias):
    block, weight, start = operands(7, out_features, in_features, bias)
    assert compiled_linear_serves(block, weight, start)
    assert_as_good_as_linear(block, weight, start)


@compiled
def test_result_ends_where_it_should():
    block, weight, _ = operands(3, 5, 32)
    few_rows_linear(block, weight)
    whole = few_rows_linear(block[None, None], weight)
    assert whole.shape == (1, 1, 3, 5)
    assert torch.equal(whole[0, 0], torch.cat([few_rows_linear(row[None], weight) for row in block]))


@compiled
@pytest.mark.parametrize("change", ["rows", "weight", "bias", "odd features", "double", "gradient", "many rows"])
def test_what_compiled_code_does_not_take_is_served_all_the_same(change):
    block, weight, bias = operands(64 if change == "many rows" else 6, 40, 40 if change == "odd features" else 48, True)
    if change == "rows":
        block = block.t().contiguous().t()
    elif change == "weight":
        weight = weight.t().contiguous().t()
    elif change == "bias":
        bias = torch.stack([bias, bias], dim=1)[:, 0]
    elif change == "double":
        block, weight, bias = block.double(), weight.double(), bias.double()
    elif change == "gradient":
        weight.requires_grad_()
    assert not compiled_linear_serves(block, weight, bias)
    out = few_rows_linear(block, weight, bias)
    torch.testing.assert_close(out, torch.nn.functional.linear(block, weight, bias))
    assert out.requires_grad == (change == "gradient")


@compiled
def test_threads_do_not_show_in_the_bits():
    before = torch.get_num_threads()
    block, weight, bias = operands(15, 203, 2064, bias=True)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(few_rows_linear(block, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@compiled
def test_python_threads_do_not_disturb_each_other():
    cases = [operands(rows, 131, 576, bias=rows % 2 == 0) for rows in range(2, 18)]
    alone = [few_rows_linear(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: few_rows_linear(*case), cases * 4))
    assert all(torch.equal(out, expected) for out, expected in zip(together, alone * 4, strict=True))


@compiled
def test_warm_up_compiles():
    from cag_kernels.cpu_linear import _compile

    _compile.cache_clear()
    warm_up_linear()
    assert _compile.cache_info().currsize == 1
