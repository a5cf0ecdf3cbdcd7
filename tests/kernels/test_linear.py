"""Products over packed weights, and over plain ones, against the ordinary product."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from cag_kernels import (
    FEW_ROWS,
    PackedWeight,
    can_pack,
    has_compiler,
    linear,
    linear_without_packing,
    pack_weight,
    packed_linear,
)
from cag_kernels.linear import packed_linear_reference, warm_up_linear

compiled = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows, out_features, in_features, bias=False, dtype=torch.bfloat16):
    """Normal numbers that depend on the shape alone; block and bias are float32."""
    generator = torch.Generator().manual_seed(rows * 10_007 + out_features * 101 + in_features)
    shapes = [(rows, in_features), (out_features, in_features), (out_features,)]
    block, weight, start = (torch.randn(shape, generator=generator) for shape in shapes)
    return block, weight.to(dtype), start if bias else None


def assert_as_good_as_linear(block, weight, bias):
    """At most twice the root mean square error of plain linear in float32, and nothing far off."""
    expected = torch.nn.functional.linear(block.double(), weight.double(), None if bias is None else bias.double())
    plain = torch.nn.functional.linear(block, weight.float(), bias).double() - expected
    error = packed_linear(block, pack_weight(weight), bias).double() - expected
    rounding = torch.finfo(torch.float32).eps * weight.shape[1] ** 0.5  # where the sample is too small to compare
    assert error.square().mean().sqrt() <= 2 * plain.square().mean().sqrt() + rounding
    assert error.abs().max() <= 2 * plain.abs().max() + 2 * rounding


@pytest.mark.parametrize("rows", [2, 15, 47])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_packing_equals_linear(rows, bias, dtype):
    generator = torch.Generator().manual_seed(rows)
    block = torch.randn(1, rows, 33, generator=generator).to(dtype)
    layer = torch.nn.Linear(33, 70, bias=bias, dtype=dtype)
    expected = torch.nn.functional.linear(block.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = (layer(block).double() - expected).abs().max()
    out = linear_without_packing(block, layer.weight, layer.bias)
    assert out.is_contiguous()
    assert out.shape == (1, rows, 70)
    assert (out.double() - expected).abs().max() <= 2 * plain + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("out_features", [1, 15, 16, 17, 130])
def test_packing_keeps_every_bit(out_features, dtype):
    weight = operands(1, out_features, 48, dtype=dtype)[1]
    packed = pack_weight(weight)
    assert packed.panels.shape == (-(-out_features // 16), 48, 16)
    assert torch.equal(packed.unpacked(), weight)
    assert torch.equal(packed.transposed(), weight.float().T)
    assert (packed.out_features, packed.in_features) == (out_features, 48)


def test_large_weights_are_unpacked_piece_by_piece(monkeypatch):
    from cag_kernels import packed as module

    block, weight, bias = operands(FEW_ROWS + 2, 100, 48, bias=True)
    packed = pack_weight(weight)
    monkeypatch.setattr(linear, "MOST_COMPILED_ROWS", dict.fromkeys(linear.MOST_COMPILED_ROWS, 0))
    whole = packed_linear(block, packed, bias)
    monkeypatch.setattr(module, "MAX_UNPACKED", 2 * 16 * 48)
    assert [piece.out_features for piece in packed.pieces()] == [32, 32, 32, 4]
    torch.testing.assert_close(packed_linear(block, packed, bias), whole)
    assert torch.equal(torch.cat([piece.unpacked() for piece in packed.pieces()]), weight)


def test_weights_packed_together_stand_one_below_the_other():
    parts = [operands(1, count, 32)[1] for count in (16, 48, 5)]
    assert torch.equal(pack_weight(*parts).unpacked(), torch.cat(parts))


@pytest.mark.parametrize("weight", [torch.ones(3, 17), torch.ones(3, 16).double(), torch.ones(16), torch.ones(0, 16)])
def test_what_cannot_be_packed_is_refused(weight):
    assert not can_pack(weight)
    with pytest.raises(ValueError, match="cannot pack"):
        pack_weight(weight)


def test_weights_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="cannot pack"):
        pack_weight(torch.ones(16, 16), torch.ones(16, 32))
    with pytest.raises(ValueError, match="cannot pack"):
        pack_weight(torch.ones(16, 16), torch.ones(16, 16, dtype=torch.bfloat16))


@compiled
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows", [*range(1, 51), FEW_ROWS - 1, FEW_ROWS, FEW_ROWS + 1])
def test_every_number_of_rows(rows, dtype):
    assert_as_good_as_linear(*operands(rows, 67, 80, bias=rows % 2 == 0, dtype=dtype))


@compiled
@pytest.mark.parametrize("in_features", [80, 576, 4096])
def test_compiled_blocks_have_the_bits_of_few_rows(in_features, monkeypatch):
    """Also of blocks of which the cache holds some rows only."""
    monkeypatch.setattr(linear, "MOST_COMPILED_ROWS", dict.fromkeys(linear.MOST_COMPILED_ROWS, 700))
    block, weight, bias = operands(700, 67, in_features, bias=True)
    packed = pack_weight(weight)
    few = [packed_linear(part, packed, bias) for part in torch.split(block, 9)]
    assert torch.equal(packed_linear(block, packed, bias), torch.cat(few))


@compiled
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("lanes", [8, 16])
def test_vectors_of_any_width_give_the_same_bits(lanes, dtype, monkeypatch):
    """Those that this processor does not have are cut by the compiler."""
    from cag_kernels.cpu.attention.panel import Blocking
    from cag_kernels.cpu.products import linear as cpu_linear

    cases = [operands(rows, 67, 848, bias=True, dtype=dtype) for rows in (1, 2, 6, 7, 24, 25, 140)]
    expected = [packed_linear(block, pack_weight(weight), bias) for block, weight, bias in cases]
    monkeypatch.setattr(cpu_linear, "host_blocking", lambda: Blocking(lanes, 4))
    monkeypatch.setattr(cpu_linear, "_compile", cache(cpu_linear.LinearKernel))
    for (block, weight, bias), one in zip(cases, expected, strict=True):
        assert torch.equal(packed_linear(block, pack_weight(weight), bias), one)


def test_rows_that_are_served_at_once_are_about_as_many_each_time():
    from cag_kernels.cpu.products import linear as cpu_linear

    for num_rows in (1, 24, 25, 130, 700):
        for in_features in (64, 576, 1536, 8960, 100_000):
            at_once = cpu_linear._rows_at_once(num_rows, 4 * in_features, 24)
            times = -(-num_rows // at_once)
            assert at_once <= max(24, cpu_linear.CACHED_BYTES // (4 * in_features))
            assert at_once * times - num_rows < times


@compiled
@pytest.mark.parametrize("in_features", [16, 48, 576, 784, 8960])
@pytest.mark.parametrize("out_features", [1, 2, 15, 31, 32, 33, 129])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", KINDS)
def test_every_shape(in_features, out_features, bias, dtype):
    assert_as_good_as_linear(*operands(7, out_features, in_features, bias, dtype))


@compiled
@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_widened_exactly(dtype):
    weight = torch.arange(1 << 16).to(torch.int16).view(dtype).view(-1, 16)
    weight = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))
    assert torch.equal(packed_linear(torch.eye(16), pack_weight(weight)), weight.float().t())


def test_result_ends_where_it_should():
    block, weight, _ = operands(3, 5, 32)
    packed = pack_weight(weight)
    whole = packed_linear(block[None, None], packed)
    assert whole.shape == (1, 1, 3, 5)
    assert torch.equal(whole[0, 0], packed_linear(block, packed))
    reference = packed_linear_reference(block.double(), packed)
    torch.testing.assert_close(whole[0, 0].double(), reference, rtol=1e-5, atol=1e-5)


def test_numbers_behind_the_weight_do_not_count():
    """A part of a longer panel tensor: neighbours must not leak into the last panel's padding."""
    whole = pack_weight(operands(1, 64, 32)[1])
    part = PackedWeight(whole.panels[1:3], 32)
    block = operands(4, 1, 32)[0]
    assert torch.equal(packed_linear(block, part), packed_linear(block, whole)[:, 16:48])


@pytest.mark.parametrize("change", ["features", "bias", "double", "strided bias"])
def test_operands_that_do_not_fit_are_refused(change):
    block, weight, bias = operands(6, 40, 48, bias=True)
    if change == "features":
        block = block[:, :32]
    elif change == "bias":
        bias = bias[:-1]
    elif change == "double":
        block = block.double()
    else:
        bias = torch.stack([bias, bias], dim=1)[:, 0]
    with pytest.raises(ValueError, match="do not fit"):
        packed_linear(block, pack_weight(weight), bias)


def test_strided_blocks_and_gradients_are_served():
    block, weight, bias = operands(6, 40, 48, bias=True)
    packed = pack_weight(weight)
    strided = block.t().contiguous().t()
    assert torch.equal(packed_linear(strided, packed, bias), packed_linear(block, packed, bias))
    for rows in (block, operands(2 * FEW_ROWS + 1, 40, 48)[0]):
        rows.requires_grad_()
        products = [packed_linear(rows, packed, bias), packed_linear(rows, pack_weight(weight * 2), bias)]
        sum(products).sum().backward()
        torch.testing.assert_close(rows.grad, (3 * weight.float().sum(0)).expand_as(rows))


@compiled
def test_threads_do_not_show_in_the_bits():
    before = torch.get_num_threads()
    block, weight, bias = operands(15, 203, 2064, bias=True)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed_linear(block, pack_weight(weight), bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@compiled
@pytest.mark.parametrize("dtype", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_company(dtype):
    """Of every number of rows that a pass has registers for, and of several passes."""
    block, weight, bias = operands(53, 67, 784, bias=True, dtype=dtype)
    packed = pack_weight(weight)
    alone = torch.cat([packed_linear(block[row : row + 1], packed, bias) for row in range(len(block))])
    for rows in range(2, len(block) + 1):
        assert torch.equal(packed_linear(block[:rows], packed, bias), alone[:rows])


@compiled
def test_python_threads_do_not_disturb_each_other():
    """Unpacking threads too: the memory that a weight is unpacked to belongs to one thread."""
    cases = [operands(rows, 131, 576, bias=rows % 2 == 0) for rows in (*range(2, 18), 130, 131, 257, 258)]
    cases = [(block, pack_weight(weight), bias) for block, weight, bias in cases]
    alone = [packed_linear(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: packed_linear(*case), cases * 4))
    assert all(torch.equal(out, expected) for out, expected in zip(together, alone * 4, strict=True))


@compiled
@pytest.mark.parametrize("dtype", KINDS)
def test_warm_up_compiles(dtype):
    from cag_kernels.cpu.products.linear import _compile

    _compile.cache_clear()
    warm_up_linear(dtype)
    assert _compile.cache_info().currsize == 1
