"""Every path of segment attention against the reference in float64, on odd sizes, groups, masks and strides."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cag_kernels import choose_path, merge_segments, segment_attention, segment_attention_reference
from cag_kernels.attention import _device_tile
from cag_kernels.blocks import blocks_serve
from cag_kernels.cpu.attention.segments import cpu_attention_serves
from cag_kernels.flash import fused_attention
from cag_kernels.tiled import tiled_attention

SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (9, 3, 64, 1, 1),
    (9, 3, 64, 7, 131),
    (12, 2, 128, 15, 257),
    (4, 4, 96, 3, 65),
    (8, 1, 256, 33, 70),
]
LATENT = (4, 1, 576, 5, 70)


def make(shape, dtype, seed=0):
    """Random query, keys and values; keys and values are slices of larger buffers, as in a session's tail."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator).to(dtype)
    buffers = torch.randn(2, num_kv_heads, num_keys + 5, head_dim, generator=generator).to(dtype)
    return query, buffers[0, :, 2 : 2 + num_keys], buffers[1, :, 2 : 2 + num_keys]


def oracle(query, keys, values, **kwargs):
    """The reference in float64."""
    return segment_attention_reference(query.double(), keys.double(), values.double(), **kwargs)


def assert_close(found, query, keys, values, **kwargs):
    """Error against the float64 oracle at most twice that of the plain reference in the same precision."""
    expected, expected_lse = oracle(query, keys, values, **kwargs)
    plain, plain_lse = segment_attention_reference(query, keys, values, **kwargs)
    for got, want, ordinary in ((found[0], expected, plain), (found[1], expected_lse, plain_lse)):
        assert not torch.isnan(got).any()
        seen = torch.isfinite(want)
        assert torch.equal(seen, torch.isfinite(got))
        if not seen.any():
            continue
        rounding = 4 * torch.finfo(torch.float32).eps * want[seen].abs().max().clamp_min(1.0)
        bound = 2 * (ordinary.double() - want)[seen].abs().max() + rounding
        assert (got.double() - want)[seen].abs().max() <= bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", ["behind", "end", "middle"])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tile_tokens", [16, 1024])
def test_tiled_matches_oracle(shape, position, window, softcap, tile_tokens):
    query, keys, values = make(shape, torch.float32)
    num_queries, num_keys = query.shape[1], keys.shape[1]
    offset = {"behind": num_keys + 3, "end": max(0, num_keys - num_queries), "middle": num_keys // 3}[position]
    kwargs = {"scale": 0.3, "offset": offset, "window": window, "softcap": softcap}
    found = tiled_attention(query, keys, values, **kwargs, tile_tokens=tile_tokens)
    assert_close(found, query, keys, values, **kwargs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("behind", [True, False])
def test_fused_matches_oracle(shape, behind):
    query, keys, values = make(shape, torch.float32)
    num_queries, num_keys = query.shape[1], keys.shape[1]
    if num_queries > num_keys:
        pytest.skip("the queries are longer than the segment")
    kwargs = {"scale": 0.2, "offset": num_keys if behind else num_keys - num_queries}
    assert_close(fused_attention(query, keys, values, **kwargs), query, keys, values, **kwargs)


@pytest.mark.parametrize("shape", [*SHAPES, LATENT])
@pytest.mark.parametrize("query_dtype, kv_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_public_op_on_bfloat16_keys(shape, query_dtype, kv_dtype):
    """Keys held in bfloat16: with a float32 query the error is float32's; with a bfloat16 query, bfloat16's."""
    query, keys, values = make(shape, kv_dtype)
    query = query.to(query_dtype)
    offset = max(0, keys.shape[1] - query.shape[1])
    out, lse = segment_attention(query, keys, values, scale=0.125, offset=offset)
    expected, expected_lse = oracle(query, keys, values, scale=0.125, offset=offset)
    tolerance = 2e-6 if query_dtype == torch.float32 else 2 * torch.finfo(torch.bfloat16).eps
    scale = expected.abs().max().clamp_min(1.0)
    assert (out.double() - expected).abs().max() <= tolerance * scale * 4
    assert (lse.double() - expected_lse).abs().max() <= tolerance * expected_lse.abs().max().clamp_min(1.0) * 4


def test_dispatch_depends_on_sizes_dtypes_and_masks_only():
    query, keys, _ = make((9, 3, 64, 7, 131), torch.bfloat16)
    plain = {"window": None, "softcap": None, "offset": 131}
    few = "compiled" if cpu_attention_serves(query, keys) else "fused"  # where the processor multiplies bfloat16
    many = "blocks" if blocks_serve(query, keys) else "fused"
    assert choose_path(query, keys, **plain) == few
    assert choose_path(query.repeat(1, 30, 1), keys, **{**plain, "offset": 130}) == many
    assert choose_path(query.float(), keys, **{**plain, "offset": 124}) == "tiled"  # 21 rows, some keys hidden
    assert choose_path(query.float().repeat(1, 7, 1), keys, **{**plain, "offset": 82}) == "fused"  # 147 rows
    assert choose_path(query, keys, **{**plain, "softcap": 3.0}) == "tiled"
    windowed = "compiled" if cpu_attention_serves(query, keys) else "tiled"
    assert choose_path(query, keys, **{**plain, "window": 5}) == windowed
    assert choose_path(query, keys, **{**plain, "window": 5, "offset": 124}) == "tiled"
    assert choose_path(query, keys, **{**plain, "window": 138}) == few


def test_fused_kernels_of_a_gpu_get_the_heads_that_they_take():
    """Tensors of a GPU without its memory, so that none is needed."""
    found = {}
    with FakeTensorMode():
        for head_dim in (64, 100, 256, 264, 512):
            query, keys = (torch.empty(8, count, head_dim, dtype=torch.float16, device="cuda") for count in (32, 1000))
            for offset in (968, 1000):
                found[head_dim, offset] = choose_path(query, keys, window=None, softcap=None, offset=offset)
    assert {head_dim for (head_dim, _), path in found.items() if path == "fused"} == {64, 256}
    assert {path for (head_dim, _), path in found.items() if head_dim not in (64, 256)} == {"tiled"}


@pytest.mark.parametrize("cuts", [(), (1,), (50, 51), (100, 130)])
def test_merge_of_parts_is_the_whole(cuts):
    query, keys, values = make((12, 2, 128, 5, 131), torch.float32)
    expected, _ = oracle(query, keys, values, scale=0.1, offset=131)
    bounds = [0, *cuts, 131]
    parts = [
        segment_attention(query, keys[:, a:b], values[:, a:b], scale=0.1, offset=131 - a)
        for a, b in itertools.pairwise(bounds)
    ]
    assert (merge_segments(parts).double() - expected).abs().max() < 1e-6


def test_merge_ignores_a_part_in_which_a_query_sees_nothing():
    query, keys, values = make((4, 4, 96, 3, 65), torch.float32)
    whole = segment_attention(query, keys, values, scale=0.1, offset=65, window=10)
    blind = segment_attention(query, keys[:, :20], values[:, :20], scale=0.1, offset=65, window=10)
    assert torch.isneginf(blind[1]).all()
    assert not blind[0].any()
    assert torch.allclose(merge_segments([whole, blind]), whole[0])


@pytest.mark.parametrize(
    "query, keys, offset",
    [((4, 3, 8), (3, 5, 8), 5), ((4, 3, 8), (2, 5, 16), 5), ((4, 3, 8), (2, 5, 8), -1), ((4, 3), (2, 5, 8), 5)],
)
def test_shapes_that_do_not_fit_are_refused(query, keys, offset):
    with pytest.raises(ValueError, match=r"expected|multiple|offset"):
        segment_attention(torch.zeros(query), torch.zeros(keys), torch.zeros(keys), scale=1.0, offset=offset)


@pytest.mark.parametrize("attend", [tiled_attention, fused_attention, segment_attention])
@pytest.mark.parametrize(("num_queries", "offset"), [(9, 70), (70, 0), (20, 50)])
def test_keys_that_are_the_values(attend, num_queries, offset):
    """As latents are: the same numbers as with a copy for values."""
    query, keys, _ = make((8, 1, 576, num_queries, 70), torch.bfloat16)
    query = query.float()
    found = attend(query, keys, keys, scale=0.1, offset=offset)
    for got, want in zip(found, attend(query, keys, keys.clone(), scale=0.1, offset=offset), strict=True):
        assert torch.equal(got, want)
    assert_close(found, query, keys, keys, scale=0.1, offset=offset)


@pytest.mark.parametrize(("num_rows", "expected"), [(16, 1 << 20), (240, 68 * 1024), (8192, 2048), (1 << 20, 1024)])
def test_tiles_on_a_gpu_are_as_long_as_scores_are_few(num_rows, expected):
    assert _device_tile(num_rows) == expected


def test_keys_and_values_of_two_types_are_refused():
    query, keys, values = make((4, 2, 64, 3, 65), torch.float32)
    for sides in ((keys.bfloat16(), values), (keys, values.bfloat16())):
        with pytest.raises(ValueError, match="one type"):
            segment_attention(query, *sides, scale=1.0, offset=65)
