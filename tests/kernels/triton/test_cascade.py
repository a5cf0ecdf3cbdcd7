"""Tails in pages, and the shared prefix before them, against the float64 oracle: sessions of different lengths."""

import pytest
import torch

from cag_kernels import DensePrefix, PagedTails, dequantize_prefix
from cag_kernels.prefix_reference import (
    cascade_attention_reference,
    paged_attention_reference,
    query_positions,
    tail_of,
)
from cag_kernels.triton.launch import attend
from oracle import assert_close, make_prefix, moved, normal, plain_prefix_attention, plain_tail_attention

LENGTHS, COUNTS = [5, 37, 1, 70], [2, 1, 1, 7]
MASKS = [(None, None), (20, None), (None, 5.0)]


def make_tails(num_kv_heads, head_dim, dtype, page_tokens, lengths=LENGTHS, counts=COUNTS):
    """Pages in random order, everything that no session wrote is NaN, and no session has the pages behind its last."""
    num_pages = sum(-(-length // page_tokens) for length in lengths) + 2
    keys, values = torch.full((2, num_pages, num_kv_heads, page_tokens, head_dim), torch.nan, dtype=dtype)
    free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_tokens)).tolist()
    pages = torch.full((len(lengths), -(-max(lengths) // page_tokens) + 1), -1, dtype=torch.int32)
    for session, length in enumerate(lengths):
        for index, first in enumerate(range(0, length, page_tokens)):
            page, count = free.pop(), min(page_tokens, length - first)
            pages[session, index] = page
            for side, pool in enumerate((keys, values)):
                pool[page, :, :count] = normal(num_kv_heads, count, head_dim, seed=2 * session + side + first)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return PagedTails(keys, values, pages, torch.tensor(lengths, dtype=torch.int32), starts, max(counts))


def plain_paged(query, tails, **kwargs):
    """Plain torch in the query's precision, session by session."""
    starts = tails.query_starts.tolist()
    parts = [
        plain_tail_attention(query[:, first:last], *tail_of(tails, session, length), **kwargs)
        for session, (first, last, length) in enumerate(
            zip(starts[:-1], starts[1:], tails.lengths.tolist(), strict=True)
        )
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


@pytest.mark.parametrize("heads, head_dim, page_tokens", [((6, 2), 64, 16), ((4, 1), 96, 5), ((2, 2), 128, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window, softcap", MASKS)
def test_tails_match_the_oracle(device, heads, head_dim, page_tokens, dtype, window, softcap):
    tails = make_tails(heads[1], head_dim, dtype, page_tokens)
    query = normal(heads[0], sum(COUNTS), head_dim, dtype=dtype)
    kwargs = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    expected = paged_attention_reference(query.double(), tails, **kwargs)
    plain = plain_paged(query, tails, **kwargs)
    found = attend(query.to(device), None, moved(tails, device), 2, positions=None, **kwargs)
    assert_close(found, expected, plain)


def test_long_tails_are_split_and_queries_of_no_session_see_nothing(device):
    tails = make_tails(1, 64, torch.float32, 64, lengths=[1100, 3], counts=[2, 0])
    query = normal(2, 4, 64)
    kwargs = {"scale": 0.125, "window": None, "softcap": None}
    expected = paged_attention_reference(query.double(), tails, **kwargs)
    found = attend(query.to(device), None, moved(tails, device), 2, positions=None, **kwargs)
    assert_close(found, expected, paged_attention_reference(query, tails, **kwargs))
    assert torch.isneginf(found[1][:, 2:]).all()


@pytest.mark.parametrize("kind", ["plain", {"key_bits": 4, "value_bits": 4, "num_exact": 2}])
@pytest.mark.parametrize("window, softcap", MASKS)
def test_cascade_matches_the_oracle(device, kind, window, softcap):
    num_q_heads, num_kv_heads, head_dim, dtype = 4, 2, 64, torch.bfloat16
    tails, prefix = make_tails(num_kv_heads, head_dim, dtype, 16), make_prefix(kind, num_kv_heads, 97, head_dim, dtype)
    query = normal(num_q_heads, sum(COUNTS), head_dim, dtype=dtype)
    kwargs = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
    expected = cascade_attention_reference(query.double(), prefix, tails, **kwargs)
    positions = query_positions(tails, 97, query.shape[1])
    shared, shared_lse = plain_prefix_attention(query, prefix, positions=positions, **kwargs)
    own, own_lse = plain_paged(query, tails, **kwargs)
    plain = torch.lerp(shared, own, torch.sigmoid(own_lse - shared_lse)[..., None].to(dtype))
    on_device = [moved(part, device) for part in (query, prefix, tails)]
    found, _ = attend(*on_device, 2, positions=positions.to(device), dtype=dtype, **kwargs)
    assert found.dtype == dtype
    assert_close([found], [expected], [plain])


def test_one_attention_over_everything_is_the_same(device):
    """The cascade against attention over prefix and tail joined: no bookkeeping of positions can hide behind parts."""
    tails, prefix = make_tails(2, 64, torch.float32, 16), make_prefix("plain", 2, 50, 64, torch.float32)
    query = normal(4, sum(COUNTS), 64)
    kwargs = {"scale": 0.125, "window": 33, "softcap": None}
    positions = query_positions(tails, 50, query.shape[1])
    on_device = [moved(part, device) for part in (query, prefix, tails)]
    found, _ = attend(*on_device, 2, positions=positions.to(device), **kwargs)
    starts = tails.query_starts.tolist()
    for session, length in enumerate(LENGTHS):
        own = slice(starts[session], starts[session + 1])
        joined = [
            torch.cat([shared, tail], dim=1)
            for shared, tail in zip(prefix, tail_of(tails, session, length), strict=True)
        ]
        expected, _ = plain_tail_attention(query[:, own].double(), *joined, **kwargs)
        torch.testing.assert_close(found[:, own].cpu().double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window, softcap", MASKS)
def test_a_prefix_in_pieces_is_the_same_as_in_one(device, window, softcap):
    """Codes, and behind them what is exact, as caches in `int8` and `int4` are held."""
    tails, coded = make_tails(2, 64, torch.float32, 16), make_prefix({"key_bits": 8, "value_bits": 8}, 2, 128, 64, None)
    recent = DensePrefix(*normal(2, 2, 9, 64))
    query = normal(4, sum(COUNTS), 64)
    kwargs = {"scale": 0.125, "window": window, "softcap": softcap}
    dense = dequantize_prefix(coded, torch.float32)
    whole = DensePrefix(*(torch.cat(sides, 1) for sides in zip(dense, recent, strict=True)))
    expected = cascade_attention_reference(query.double(), whole, tails, **kwargs)
    in_pieces = cascade_attention_reference(query.double(), [coded, recent], tails, **kwargs)
    torch.testing.assert_close(in_pieces, expected, atol=1e-5, rtol=0)
    positions = query_positions(tails, 137, query.shape[1])
    on_device = [moved(part, device) for part in (query, coded, recent, tails, positions)]
    found, _ = attend(on_device[0], on_device[1:3], on_device[3], 2, positions=on_device[4], **kwargs)
    torch.testing.assert_close(found.cpu().double(), expected, atol=2e-5, rtol=0)
