"""Attention on a CUDA device against the float64 oracle on the CPU. `make test-gpu`."""

import pytest
import torch

from cag_kernels import (
    DensePrefix,
    PagedTails,
    cascade_attention,
    choose_prefix_path,
    merge_segments,
    quantize_prefix,
    segment_attention,
    segment_attention_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SHAPES = [(9, 3, 64, 7, 131), (12, 2, 128, 15, 1025), (32, 8, 128, 33, 3001), (8, 1, 256, 1, 70)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_end", [True, False])
def test_matches_the_oracle(shape, dtype, at_end):
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(num_keys)
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator).to(dtype)
    keys, values = torch.randn(2, num_kv_heads, num_keys, head_dim, generator=generator).to(dtype)
    kwargs = {"scale": head_dim**-0.5, "offset": num_keys - num_queries if at_end else num_keys}
    expected, expected_lse = segment_attention_reference(query.double(), keys.double(), values.double(), **kwargs)
    out, lse = segment_attention(query.cuda(), keys.cuda(), values.cuda(), **kwargs)
    bound = 8 * torch.finfo(dtype).eps * expected.abs().max().clamp_min(1.0)
    assert (out.cpu().double() - expected).abs().max() <= bound
    assert (lse.cpu().double() - expected_lse).abs().max() <= 8 * torch.finfo(dtype).eps * expected_lse.abs().max()


def test_parts_merge_to_the_whole():
    query, keys, values = (torch.randn(4, n, 64, device="cuda") for n in (5, 300, 300))
    whole, _ = segment_attention(query, keys, values, scale=0.1, offset=300)
    parts = [
        segment_attention(query, keys[:, a:b], values[:, a:b], scale=0.1, offset=300 - a)
        for a, b in ((0, 100), (100, 300))
    ]
    assert torch.allclose(merge_segments(parts), whole, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", 8, 4])
@pytest.mark.parametrize("num_queries", [1, 32])
def test_operations_on_prefixes_are_those_of_the_reference(kind, num_queries):
    """The public operations, served by Triton, in the shape of Llama 3.1 8B; the kernels have tests in `triton/`."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(num_queries)
    keys, values = torch.randn(2, 8, 5003, 128, generator=generator).bfloat16()
    query = torch.randn(32, 2 * num_queries, 128, generator=generator).bfloat16()
    prefix = DensePrefix(keys, values)
    if kind != "plain":
        prefix = quantize_prefix(keys, values, key_bits=kind, value_bits=kind)
        on_device = quantize_prefix(keys.cuda(), values.cuda(), key_bits=kind, value_bits=kind)
        assert all(torch.equal(got.cpu(), want) for got, want in zip(on_device[:8], prefix[:8], strict=True))
    pool = torch.randn(2, 9, 8, 16, 128, generator=generator).bfloat16()
    integers = [[[3, 5, 1], [4, 8, 2]], [37, 33], [0, num_queries, 2 * num_queries]]
    tails = PagedTails(*pool, *(torch.tensor(part, dtype=torch.int32) for part in integers), num_queries)
    expected = cascade_attention(query.double(), prefix, tails, scale=128**-0.5)
    moved = [type(part)(*(x.cuda() if torch.is_tensor(x) else x for x in part)) for part in (prefix, tails)]
    assert choose_prefix_path(query.cuda(), moved[0], window=None, softcap=3.0) == "triton"
    found = cascade_attention(query.cuda(), *moved, scale=128**-0.5)
    bound = 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (found.cpu().double() - expected).abs().max() <= bound
