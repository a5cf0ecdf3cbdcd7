"""Causal attention of many queries by compiled code for queries behind keys, against a float64 oracle."""

import pytest
import torch

from cag_kernels import choose_path, has_compiler, segment_attention, segment_attention_reference
from cag_kernels.blocks import PIECE_ROWS, TRIANGLE_TOKENS, block_attention, blocks_serve
from cag_kernels.cpu.attention.segments import attends_in_bfloat16
from cag_kernels.cpu.processor import has_dots, has_tiles
from cag_kernels.tiled import tiled_attention

pytestmark = pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")

ROUNDED = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not attends_in_bfloat16(64), reason="no products of bfloat16")
)
SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (9, 3, 64, 512, 512),
    (9, 3, 64, 300, 1500),
    (4, 1, 256, 129, 700),
    (6, 2, 96, 2 * TRIANGLE_TOKENS + 1, 2 * TRIANGLE_TOKENS + 1),
    (4, 4, 128, 150, 151),
    (8, 1, 32, 700, 640),  # behind all keys
]


def make(shape, dtype):
    """A query, and keys and values that are slices of larger buffers full of NaN."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator).to(dtype)
    buffers = torch.full((2, num_kv_heads, num_keys + 70, head_dim), torch.nan, dtype=torch.bfloat16)
    inside = buffers[:, :, 3 : 3 + num_keys]
    inside.copy_(torch.randn(inside.shape, generator=generator))
    return query, inside[0], inside[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, ROUNDED])
@pytest.mark.parametrize("window", [None, 1, 17, TRIANGLE_TOKENS, 200, 640])
def test_a_block_matches_the_oracle(shape, dtype, window):
    query, keys, values = make(shape, dtype)
    num_queries, num_keys = query.shape[1], keys.shape[1]
    offset = num_keys - num_queries if num_queries <= num_keys else num_keys
    hides = window is not None and window < offset + num_queries
    kwargs = {"scale": shape[2] ** -0.5, "offset": offset, "window": window if hides else None}
    found = block_attention(query, keys, values, **kwargs)
    expected = segment_attention_reference(query.double(), keys.double(), values.double(), **kwargs)
    rounding = 1e-5 if dtype == torch.float32 else 2.0**-8
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        seen = torch.isfinite(want)
        assert torch.equal(torch.isfinite(got), seen)
        assert torch.allclose(got[seen].double(), want[seen], rtol=rounding, atol=rounding)


@pytest.mark.skipif(not has_dots() or has_tiles(), reason="another path is quicker here")
def test_prefill_goes_this_way_in_bfloat16_alone():
    query, keys, values = make((9, 3, 64, 300, 1500), torch.bfloat16)
    rule = {"window": None, "softcap": None, "offset": 1200}
    assert choose_path(query, keys, **rule) == "blocks"
    assert choose_path(query, keys, **rule | {"window": 100}) == "blocks"
    assert choose_path(query, keys, **rule | {"softcap": 3.0}) == "tiled"
    assert choose_path(query, keys, **rule | {"offset": 1100}) == "tiled"
    assert not blocks_serve(query.float(), keys)
    found = segment_attention(query, keys, values, scale=0.1, offset=1200, window=100)
    assert all(map(torch.equal, found, block_attention(query, keys, values, scale=0.1, offset=1200, window=100)))


def test_queries_that_see_no_key_of_a_segment_find_nothing():
    query, keys, values = make((4, 2, 64, 300, 200), torch.float32)
    out, lse = block_attention(query, keys, values, scale=0.1, offset=210, window=20)
    expected = tiled_attention(query, keys, values, scale=0.1, offset=210, window=20)
    assert torch.equal(lse == -torch.inf, expected[1] == -torch.inf)
    assert not out[:, 10:].any()
    assert (lse[:, 10:] == -torch.inf).all()


def test_memory_of_sums_under_way_is_bounded(monkeypatch):
    """However long the prefix is: fewer rows are served at once then, with the same bits."""
    query, keys, values = make((4, 2, 64, 400, 1500), torch.float32)
    whole = block_attention(query, keys, values, scale=0.1, offset=1500)
    monkeypatch.setattr("cag_kernels.blocks._SCRATCH_NUMBERS", 1)
    sizes = []

    def attend(piece, *sides, **kwargs):
        sizes.append(piece.shape[1])
        return segment_attention(piece, *sides, **kwargs)

    monkeypatch.setattr("cag_kernels.blocks.cpu_attention", attend)
    pieces = block_attention(query, keys, values, scale=0.1, offset=1500)
    assert max(sizes) * 2 == TRIANGLE_TOKENS < PIECE_ROWS
    assert all(map(torch.equal, pieces, whole))
