"""Attention over one prefix, plain and quantized, against the float64 oracle: odd lengths, masks, strides, splits."""

import pytest
import torch

from cag_kernels.triton.launch import attend
from cag_kernels.triton.prefix import plan_splits
from oracle import check_prefix_attention as check
from oracle import make_prefix, moved, normal

SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_tokens
    (9, 3, 64, 3, 331),
    (4, 1, 128, 5, 577),
    (2, 2, 96, 1, 131),
    (2, 1, 256, 2, 65),
    (4, 4, 64, 1, 1),
]
KINDS = {
    "plain": "plain",
    "int8": {"key_bits": 8, "value_bits": 8, "group_channels": 256},
    "int4": {"key_bits": 4, "value_bits": 4},
    "wide keys": {"key_bits": 8, "value_bits": 4, "group_channels": 32, "group_tokens": 32},
}
MASKS = [(100, None), (None, 5.0), (70, 2.0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_matches_the_oracle(device, shape, kind):
    check(device, shape, kind, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("window, softcap", MASKS)
def test_windows_and_caps(device, kind, window, softcap):
    check(device, (4, 2, 64, 3, 150), kind, torch.bfloat16, window, softcap)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types(device, kind, dtype):
    check(device, (4, 2, 128, 1, 150), kind, dtype)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("num_queries", [17, 70])
def test_many_rows_dequantize_the_tile(device, kind, num_queries):
    """34 and 140 rows a key/value head: one and two blocks of rows, whose keys are not folded into the query."""
    check(device, (2, 1, 64, num_queries, 90), kind, torch.bfloat16)


@pytest.mark.parametrize("num_exact", [0, 1, 70, 90])
def test_exact_tokens(device, num_exact):
    """32 rows: of four, plain torch's largest error is small by luck in one of thirty draws."""
    check(device, (4, 1, 64, 8, 90), KINDS["int4"], torch.bfloat16, num_exact=num_exact)


@pytest.mark.parametrize("group_channels", [128, 64, 32])
@pytest.mark.parametrize("num_queries", [1, 9])
def test_nibbles_are_dequantized_in_pairs(device, group_channels, num_queries):
    """4 bits on both sides: one scale a token, one for each half of the channels, more."""
    kind = {"key_bits": 4, "value_bits": 4, "group_channels": group_channels}
    check(device, (8, 2, 128, num_queries, 203), kind, torch.bfloat16)


def test_a_row_behind_the_window_sees_nothing(device):
    prefix = moved(make_prefix("plain", 1, 40, 64, torch.float32), device)
    positions = torch.tensor([45, 39], dtype=torch.int32, device=device)
    kwargs = {"scale": 0.1, "positions": positions, "window": 5, "softcap": None}
    out, lse = attend(normal(1, 2, 64).to(device), prefix, None, 2, **kwargs)
    assert not out[0, 0].any()
    assert torch.isneginf(lse[0, 0])
    assert torch.isfinite(lse[0, 1])


def test_a_prefix_without_tokens(device):
    prefix = moved(make_prefix("plain", 2, 0, 64, torch.float32), device)
    out, lse = attend(
        normal(4, 3, 64).to(device), prefix, None, 2, scale=1.0, positions=None, window=None, softcap=None
    )
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_splits_cover_all_tokens_and_fill_the_processors():
    prefix = make_prefix("plain", 8, 85, 128, torch.bfloat16)
    for num_tokens in (1, 255, 256, 85_000):
        longer = prefix._replace(keys=prefix.keys[:, :1].expand(-1, num_tokens, -1))
        for num_rows in (4, 64, 256):
            plan = plan_splits(longer, num_rows, 128, 132)
            assert (plan.num_splits - 1) * plan.split_tokens < num_tokens <= plan.num_splits * plan.split_tokens
            assert plan.row_blocks * plan.block_rows >= num_rows
            if num_tokens == 85_000:
                assert plan.num_splits * plan.row_blocks * 8 > 0.9 * 132
