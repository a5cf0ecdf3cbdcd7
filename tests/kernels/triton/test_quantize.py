"""Codes, scales and offsets from the Triton kernels are those of the torch reference, to the bit, and decode to it."""

import pytest
import torch

from cag_kernels.quantize import Coded, dequantize_reference, quantize_reference
from cag_kernels.triton.quantize import dequantize_on_device, quantize_on_device
from oracle import normal

GROUPS = [(64, 1), (48, 1), (1, 64), (1, 40), (1, 1000)]  # tokens, channels


def assert_same_bits(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", [(3, 131, 64), (1, 67, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_are_the_references(device, bits, groups, shape, dtype):
    numbers = normal(*shape, dtype=dtype) * 3 - 1
    numbers[0, -3:, :5] = 0.0
    numbers[-1, :, 1] = 4.25  # a channel without spread
    sizes = {"group_tokens": groups[0], "group_channels": min(groups[1], shape[2])}
    expected = quantize_reference(numbers, bits=bits, num_exact=3, **sizes)
    assert_same_bits(quantize_on_device(numbers.to(device), bits=bits, num_exact=3, **sizes), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_the_references(device, bits, groups, dtype):
    sizes = {"group_tokens": groups[0], "group_channels": min(groups[1], 96)}
    coded = quantize_reference(normal(2, 133, 96) * 100, bits=bits, **sizes)
    coded.scales[0, 0, 0] = 3e5  # beyond float16
    expected = dequantize_reference(coded, dtype=dtype, **sizes)
    found = dequantize_on_device(*(part.to(device) for part in coded), dtype=dtype, **sizes)
    assert_same_bits([found], [expected])


def test_strided_numbers_and_no_numbers(device):
    wide = normal(2, 70, 128, dtype=torch.bfloat16)
    sizes = {"bits": 4, "group_tokens": 1, "group_channels": 32, "num_exact": 0}
    for numbers in (wide[:, 3:66, 16:80], wide[..., ::2], wide[:, :0]):
        expected = quantize_reference(numbers.contiguous(), **sizes)
        assert_same_bits(quantize_on_device(numbers.to(device), **sizes), expected)
        assert isinstance(expected, Coded)
