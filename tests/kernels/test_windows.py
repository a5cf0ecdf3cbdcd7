"""Sliding windows in compiled attention on a CPU: the oracle's numbers, and a row's bits whatever shares the call."""

import pytest
import torch

from cag_kernels import DensePrefix, QuantizedPrefix, dequantize_prefix, has_compiler, quantize_prefix
from cag_kernels.cpu import cpu_attention, cpu_quantized_attention, has_tiles
from cag_kernels.prefix_reference import prefix_attention_reference

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs llvmlite")

TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not has_tiles(), reason="no tiles"))]
SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (4, 1, 256, 20, 1023),
    (4, 1, 256, 1, 1700),
    (9, 3, 64, 15, 1000),
    (4, 4, 96, 7, 513),
    (12, 3, 128, 40, 700),
    (6, 2, 32, 5, 63),
    (4, 4, 64, 1, 1),
    (40, 2, 64, 1, 600),
]
WINDOWS = [1, 2, 17, 64, 65, 300, 512, 5000]
FORMS = ["numbers", (8, 8), (4, 4), (8, 4)]


def make(shape, dtype, form="numbers", seed=0):
    """A query; a prefix that is a slice of larger buffers full of NaN, or codes; places of queries, counted from the
    segment's last key: neighbours, and one each that sees all, one key and nothing of short windows."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator).to(dtype)
    buffers = torch.full((2, num_kv_heads, num_keys + 70, head_dim), torch.nan, dtype=torch.bfloat16)
    inside = buffers[:, :, 3 : 3 + num_keys]
    inside.copy_(torch.randn(inside.shape, generator=generator))
    prefix = DensePrefix(*inside)
    if form != "numbers":
        prefix = quantize_prefix(*prefix, key_bits=form[0], value_bits=form[1], num_exact=min(5, num_keys))
    behind = torch.arange(num_queries, dtype=torch.int32) + 1
    behind[num_queries // 3 :: 5] += 37
    behind[num_queries // 2 :: 7] = 0
    behind[num_queries // 5 :: 9] += 480
    return query, prefix, behind


def attend(query, prefix, behind, window, into=None, scale=None):
    scale = scale or query.shape[2] ** -0.5
    kwargs = {"scale": scale, "offset": prefix.num_tokens - 1, "window": window, "positions": behind, "into": into}
    if isinstance(prefix, QuantizedPrefix):
        return cpu_quantized_attention(query, prefix, **kwargs)
    return cpu_attention(query, *prefix, **kwargs)


def numbers_of(prefix, dtype):
    sides = dequantize_prefix(prefix, torch.bfloat16) if isinstance(prefix, QuantizedPrefix) else prefix
    return DensePrefix(*(side.to(dtype) for side in sides))


def reference(query, prefix, behind, window, dtype, scale):
    positions = behind + prefix.num_tokens - 1
    numbers = numbers_of(prefix, dtype)
    return prefix_attention_reference(query.to(dtype), numbers, scale=scale, positions=positions, window=window)


def rounded_weights(query, prefix, behind, window, scale):
    """Plain torch in the precision that tiles have: float32 scores, weights rounded to bfloat16."""
    keys, values = (
        side.repeat_interleave(query.shape[0] // side.shape[0], dim=0) for side in numbers_of(prefix, torch.float32)
    )
    scores = query.float() @ keys.mT * scale
    places = behind[:, None] + prefix.num_tokens - 1
    hidden = torch.arange(prefix.num_tokens) <= places - window
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return weights.bfloat16().float() @ values / total, scores.logsumexp(-1)


def assert_close(found, query, prefix, behind, window, scale=None):
    """Error against the float64 oracle at most twice that of plain torch in the same precision, plus a few roundings
    (and a short exponential, where tiles serve); nothing where a row sees nothing."""
    tiles, scale = query.dtype == torch.bfloat16, scale or query.shape[2] ** -0.5
    expected = reference(query, prefix, behind, window, torch.float64, scale)
    if tiles:
        plain = rounded_weights(query, prefix, behind, window, scale)
    else:
        plain = reference(query, prefix, behind, window, torch.float32, scale)
    least = 1e-4 if tiles else 4 * torch.finfo(torch.float32).eps
    for got, want, ordinary in zip(found, expected, plain, strict=True):
        assert got.dtype == torch.float32
        sees = want.isfinite()
        assert torch.equal(got.isfinite(), sees)
        assert torch.equal(got[~sees].double(), want[~sees])
        got, want, ordinary = got[sees].double(), want[sees], ordinary[sees].double()
        if want.numel():
            bound = 2 * (ordinary - want).abs().max() + least * want.abs().max().clamp_min(1.0)
            assert (got - want).abs().max() <= bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_of_the_oracle(shape, window, dtype, form):
    query, prefix, behind = make(shape, dtype, form)
    assert_close(attend(query, prefix, behind, window), query, prefix, behind, window)
