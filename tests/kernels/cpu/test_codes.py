"""Compiled attention over a prefix in codes that become numbers: what attention over decoded ones gives, to the bit.

Where a processor multiplies codes as integers, that is the path of what it does not take (`test_code_products`).
"""

import pytest
import torch

from cag_kernels import (
    DensePrefix,
    choose_prefix_path,
    dequantize_prefix,
    has_compiler,
    prefix_attention,
    quantize_prefix,
    segment_attention_reference,
)
from cag_kernels.cpu.attention import segments as cpu
from cag_kernels.cpu.attention.segments import cpu_attention
from cag_kernels.cpu.processor import has_tiles

pytestmark = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")

SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_tokens
    (9, 3, 64, 15, 1000),
    (9, 3, 64, 1, 1000),
    (12, 2, 128, 1, 1025),
    (12, 2, 128, 15, 1025),
    (8, 1, 256, 7, 63),
    (4, 4, 96, 16, 512),
    (4, 4, 32, 3, 2),
    (6, 2, 32, 40, 129),
]
MOST = torch.finfo(torch.float16).max
BITS = [(8, 8), (4, 4), (8, 4), (4, 8)]
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not has_tiles(), reason="no tiles"))]


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """Codes become numbers on all processors."""
    monkeypatch.setattr(cpu, "multiplies_codes", lambda _codes: False)


def make(shape, bits=(8, 8), kept=torch.bfloat16, size=1, **options):
    """A query in float32, and a prefix whose exact tokens are of a type."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_tokens = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sides = torch.randn(2, num_kv_heads, num_tokens, head_dim, generator=generator).mul(size)
    keys, values = sides.clamp(-MOST, MOST).to(kept)
    keys = (keys + 2 * torch.randn(head_dim, generator=generator).mul(size).to(kept)).clamp(-MOST, MOST)
    prefix = quantize_prefix(keys, values, key_bits=bits[0], value_bits=bits[1], **options)
    return torch.randn(num_q_heads, num_queries, head_dim, generator=generator), prefix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_codes_is_attention_over_numbers(shape, bits, dtype):
    query, prefix = make(shape, bits)
    query = query.to(dtype)
    assert choose_prefix_path(query, prefix, window=None, softcap=None) == "compiled"
    numbers = DensePrefix(*dequantize_prefix(prefix, torch.bfloat16))
    plain = query if dtype == torch.float32 or has_tiles() else query.float()
    expected = cpu_attention(plain, *numbers, scale=0.1, offset=numbers.num_tokens)
    assert all(map(torch.equal, prefix_attention(query, prefix, scale=0.1), expected))


@pytest.mark.parametrize("shape", [(9, 3, 64, 1, 1000), (4, 4, 96, 16, 512), (6, 2, 32, 40, 129)])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [2.0**-12, 1, 20_000])
def test_codes_become_numbers_of_the_type_of_exact_tokens(shape, bits, kept, size):
    """Also those that float16 has no number for."""
    query, prefix = make(shape, bits, kept, size, num_exact=20)
    query /= size
    numbers = DensePrefix(*dequantize_prefix(prefix, kept))
    if size == 20_000:
        assert dequantize_prefix(prefix, torch.float32)[0].abs().max() > MOST
    expected = cpu_attention(query, *numbers, scale=0.1, offset=numbers.num_tokens)
    assert all(map(torch.equal, prefix_attention(query, prefix, scale=0.1), expected))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(2, 2), (9, 3), (12, 2)])
def test_a_query_has_the_same_bits_alone_and_in_company(num_q_heads, num_kv_heads, bits):
    """A single one in float32 has code of its own."""
    query, prefix = make((num_q_heads, num_kv_heads, 64, 7, 1077), bits)
    assert choose_prefix_path(query[:, :1], prefix, window=None, softcap=None) == "compiled"
    out, lse = prefix_attention(query, prefix, scale=0.2)
    for index in range(query.shape[1]):
        own = prefix_attention(query[:, index : index + 1], prefix, scale=0.2)
        assert torch.equal(own[0], out[:, index : index + 1])
        assert torch.equal(own[1], lse[:, index : index + 1])


@pytest.mark.parametrize("bits", BITS)
def test_a_single_query_matches_the_oracle(bits):
    query, prefix = make((9, 3, 64, 1, 1500), bits)
    numbers = [side.double() for side in dequantize_prefix(prefix, torch.bfloat16)]
    expected = segment_attention_reference(query.double(), *numbers, scale=0.1, offset=1500)
    for got, want in zip(prefix_attention(query, prefix, scale=0.1), expected, strict=True):
        assert (got.double() - want).abs().max() <= 4e-6 * want.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("num_exact", [0, 1, 17, 130])
@pytest.mark.parametrize("group_tokens", [16, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", TYPES)
def test_exact_tokens_and_groups_of_any_number(num_exact, group_tokens, bits, dtype):
    query, prefix = make((4, 2, 64, 5, 301), bits, num_exact=num_exact, group_tokens=group_tokens, group_channels=32)
    query = query.to(dtype)
    numbers = dequantize_prefix(prefix, torch.bfloat16)
    expected = cpu_attention(query, *numbers, scale=0.1, offset=301)
    assert all(map(torch.equal, prefix_attention(query, prefix, scale=0.1), expected))


@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_around_the_codes_is_read(dtype):
    query, prefix = make((4, 2, 64, 5, 100))
    query = query.to(dtype)
    expected = prefix_attention(query, prefix, scale=0.1)
    wide = torch.full((2, 180, 64), 127, dtype=torch.int8)
    wide[:, 40:140] = prefix.key_codes
    apart = prefix._replace(key_codes=wide[:, 40:140])
    assert all(map(torch.equal, prefix_attention(query, apart, scale=0.1), expected))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, 63, 64, 65, 127, 129, 1023, 1025, 1087, 1089])
def test_every_end_of_the_codes(num_tokens, dtype):
    query, prefix = make((4, 2, 32, 9, num_tokens))
    numbers = dequantize_prefix(prefix, torch.bfloat16)
    expected = cpu_attention(query.to(dtype), *numbers, scale=0.3, offset=num_tokens)
    assert all(map(torch.equal, prefix_attention(query.to(dtype), prefix, scale=0.3), expected))


def test_what_is_not_compiled_for_codes_is_left_to_torch():
    query, prefix = make((4, 2, 64, 5, 100))
    assert choose_prefix_path(query, prefix, window=None, softcap=5.0) == "torch"
    assert choose_prefix_path(query, prefix, window=20, softcap=None) == "compiled"
    assert choose_prefix_path(query, prefix, window=20, softcap=5.0) == "torch"
    assert choose_prefix_path(query.double(), prefix, window=None, softcap=None) == "torch"
    odd, narrow = make((4, 2, 40, 5, 100))
    assert choose_prefix_path(odd, narrow, window=None, softcap=None) == "torch"
