"""Compiled attention over paged tails: the reference's numbers, and each row's bits whatever shares the call."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cag_kernels import has_compiler, paged_attention, prefix_attention, rows_stay_apart, wide
from cag_kernels.cpu import paged as cpu_paged
from cag_kernels.cpu.attention import panel
from cag_kernels.cpu.paged import Tails
from cag_kernels.cpu.tape import Tape
from cag_kernels.linear import (
    dot_linear,
    dot_linear_serves,
    dot_product,
    tile_linear,
    tile_linear_serves,
    tile_product,
)
from cag_kernels.prefix_reference import paged_attention_reference
from cag_kernels.prefixes import BLOCK_TOKENS, DensePrefix, PagedTails
from cag_kernels.quantize import quantize_prefix
from cag_kernels.rows_reference import attend_tails_reference

SCALE = 0.25
SESSIONS = {  # (tokens of the tail, of which new, of which skipped)
    "one": [(1, 1, 0)],
    "decoding": [(33, 1, 0), (1, 1, 0), (32, 1, 0), (100, 1, 0)],
    "questions and answers": [(20, 20, 0), (65, 1, 0), (70, 33, 0), (31, 1, 0)],
    "behind what was seen": [(70, 7, 63), (40, 1, 0), (90, 2, 88)],
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def paged(sessions, num_kv_heads, head_dim, page_tokens=BLOCK_TOKENS, dtype=torch.bfloat16):
    """A pool of poisoned pages with the sessions' tokens in scattered ones."""
    lengths, counts, skipped = (np.array(column, dtype=np.int32) for column in zip(*sessions, strict=True))
    needed = [-(-int(length) // page_tokens) for length in lengths]
    order = np.random.default_rng(sum(needed)).permutation(sum(needed) + 3)
    pages = np.full((len(sessions), max(needed)), -1, dtype=np.int32)
    pool = torch.full((2, len(order), num_kv_heads, page_tokens, head_dim), math.nan, dtype=dtype)
    first = 0
    for row, count, length in zip(pages, needed, lengths, strict=True):
        row[:count] = order[first : first + count]
        first += count
        for token in range(length):
            pool[:, row[token // page_tokens], :, token % page_tokens] = normal(2, num_kv_heads, head_dim, seed=token)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    arrays = [torch.from_numpy(array) for array in (pages, lengths, starts)]
    return PagedTails(*pool, *arrays, int(counts.max())), skipped


def attend(query, tails, skipped, parts=None, sessions=None, num_threads=1, window=None):
    num_q_heads, num_rows, head_dim = query.shape
    before, lses = parts or (query.new_empty(0, num_q_heads, num_rows, head_dim), query.new_empty(0))
    out = torch.full((num_rows, num_q_heads * head_dim), math.nan)
    logsumexps = torch.full((num_q_heads, num_rows), math.nan)
    arrays = Tails(*(part.numpy() for part in tails[2:5]), skipped)
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        arrays.attend(query, *tails[:2], SCALE, before, lses, out, logsumexps, sessions, window)
    finally:
        torch.set_num_threads(threads)
    return out, logsumexps


def assert_close(found, expected, in_float32):
    rounding = 8 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert (found.double() - expected).abs().max() <= 2 * (in_float32.double() - expected).abs().max() + rounding


HEADS, HEAD_DIMS = [(9, 3), (4, 4), (6, 1), (14, 2), (16, 1)], [16, 64, 96]  # two to eight heads have rows of their own
CALLS = [  # kind, num_parts, window: what was skipped is in a part
    (kind, num_parts, window)
    for kind in SESSIONS
    for num_parts in ((1, 2) if kind == "behind what was seen" else (0, 1, 2))
    for window in (None, 1, 5, 32, 34, 1000)
]


@pytest.mark.parametrize(
    ("kind", "num_parts", "window", "heads", "head_dim"),
    [(*call, heads, HEAD_DIMS[(i + j) % 3]) for i, call in enumerate(CALLS) for j, heads in enumerate(HEADS)],
)
def test_numbers_are_those_of_the_reference(kind, heads, head_dim, num_parts, window):
    """Each call with all heads and all head dimensions, and these in each of their pairs over the calls."""
    num_q_heads, num_kv_heads = heads
    tails, skipped = paged(SESSIONS[kind], num_kv_heads, head_dim)
    num_rows = int(tails.query_starts[-1])
    query = normal(num_q_heads, num_rows, head_dim)
    parts = normal(num_parts, num_q_heads, num_rows, head_dim), normal(num_parts, num_q_heads, num_rows) * 3
    found = attend(query, tails, skipped, parts if num_parts else None, window=window)

    def reference(dtype):
        others = [(out.to(dtype), lse.to(dtype)) for out, lse in zip(*parts, strict=True)]
        return attend_tails_reference(query.to(dtype), tails, skipped.tolist(), SCALE, others, window)

    for mine, exact, plain in zip(found, reference(torch.float64), reference(torch.float32), strict=True):
        assert_close(mine, exact, plain)


def check_numbers(kind, heads, head_dim, dtype):
    num_q_heads, num_kv_heads = heads
    tails, skipped = paged(SESSIONS[kind], num_kv_heads, head_dim, dtype=dtype)
    num_rows = int(tails.query_starts[-1])
    query, lse = normal(num_q_heads, num_rows, head_dim), normal(1, num_q_heads, num_rows)
    parts = (normal(1, num_q_heads, num_rows, head_dim), lse) if skipped.any() else None
    found = attend(query, tails, skipped, parts, window=40)

    def reference(dtype):
        others = [(parts[0][0].to(dtype), parts[1][0].to(dtype))] if parts else []
        return attend_tails_reference(query.to(dtype), tails, skipped.tolist(), SCALE, others, 40)

    for mine, exact, plain in zip(found, reference(torch.float64), reference(torch.float32), strict=True):
        assert_close(mine, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SESSIONS)
def test_tails_of_other_types(kind, dtype):
    check_numbers(kind, (9, 3), 64, dtype)


@pytest.mark.parametrize("head_dim", [2, 15, 20, 72, 100, 320, 576])
@pytest.mark.parametrize("kind", SESSIONS)
def test_heads_that_vectors_do_not_fill_and_wide_ones(kind, head_dim):
    check_numbers(kind, (6, 2), head_dim, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 24, 64])
@pytest.mark.parametrize("kind", SESSIONS)
def test_vectors_of_eight_numbers(kind, head_dim, dtype, monkeypatch):
    monkeypatch.setattr(panel, "host_blocking", lambda: panel.Blocking(8, 4))
    monkeypatch.setattr(cpu_paged, "_compile", cpu_paged._compile.__wrapped__)
    check_numbers(kind, (9, 3), head_dim, dtype)


def test_loops_for_a_lesser_processor_leave_float16_to_others():
    """numba compiles for the one that somebody has named to it, and it is no use that this one can do more. What our
    own compiler made is for this one."""
    script = """
import torch
from cag_kernels import PagedTails, paged_attention
from cag_kernels.cpu.floats import loops_read_floats
from cag_kernels.prefix_reference import paged_attention_reference
assert not loops_read_floats(torch.float16) and loops_read_floats(torch.bfloat16)
keys, values = torch.randn(2, 2, 2, 32, 64).half()
integers = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([[0, 1]], [40], [0, 2])]
query, tails = torch.randn(4, 2, 64), PagedTails(keys, values, *integers, 2)
found = [attend(query, tails, scale=0.1) for attend in (paged_attention, paged_attention_reference)]
torch.testing.assert_close(*found)
"""
    environment = os.environ | {"NUMBA_CPU_NAME": "generic"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_scores_far_apart_stay_finite():
    """An online softmax meets its largest score in the first block, in the last, or nowhere near zero."""
    tails, skipped = paged([(100, 3, 0)], 1, 16)
    tails.keys[tails.pages[0, 3].item()] *= 400
    query = normal(2, 3, 16) * 30
    found = attend(query, tails, skipped)
    exact = attend_tails_reference(query.double(), tails, [0], SCALE, [])
    plain = attend_tails_reference(query, tails, [0], SCALE, [])
    for mine, expected, in_float32 in zip(found, exact, plain, strict=True):
        assert mine.isfinite().all()
        assert_close(mine, expected, in_float32)


@pytest.mark.parametrize("page_tokens", [BLOCK_TOKENS, 4 * BLOCK_TOKENS])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("group", [1, 3, 6, 8, 10])
def test_a_row_has_the_same_bits_alone_in_company_and_on_any_number_of_threads(page_tokens, window, group):
    sessions = [(45, 1, 0), (150, 40, 0), (600, 1, 0), (64, 3, 0)]
    tails, skipped = paged(sessions, 2, 64, page_tokens)
    query = normal(2 * group, int(tails.query_starts[-1]), 64)
    together, lses = attend(query, tails, skipped, num_threads=1, window=window)
    assert all(map(torch.equal, attend(query, tails, skipped, num_threads=3, window=window), (together, lses)))
    for index, (length, count, _) in enumerate(sessions):
        begin = int(tails.query_starts[index])
        for first, last in ((0, count), (count - 1, count), (0, count // 2)):  # other rows of its own are company too
            if first == last:
                continue
            alone = PagedTails(
                *tails[:2],
                tails.pages[index : index + 1],
                torch.tensor([length - count + last], dtype=torch.int32),
                torch.tensor([0, last - first], dtype=torch.int32),
                last - first,
            )
            rows = slice(begin + first, begin + last)
            out, lse = attend(query[:, rows].contiguous(), alone, skipped[:1], window=window)
            assert torch.equal(out, together[rows])
            assert torch.equal(lse, lses[:, rows])


def test_pages_of_one_size_or_another_and_one_long_page_give_the_same_bits():
    sessions, query = [(90, 5, 0)], normal(4, 5, 32)
    found = [attend(query, *paged(sessions, 2, 32, page_tokens)) for page_tokens in (32, 64, 90, 128)]
    assert all(torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1]) for out, lse in found[1:])


def test_only_the_sessions_of_a_call_are_written():
    tails, skipped = paged(SESSIONS["questions and answers"], 2, 32)
    query = normal(4, int(tails.query_starts[-1]), 32)
    whole, _ = attend(query, tails, skipped)
    out, _ = attend(query, tails, skipped, sessions=(1, 3))
    rows = slice(int(tails.query_starts[1]), int(tails.query_starts[3]))
    assert torch.equal(out[rows], whole[rows])
    assert out[: rows.start].isnan().all()
    assert out[rows.stop :].isnan().all()


def test_a_window_as_long_as_the_tails_changes_no_bit():
    tails, skipped = paged(SESSIONS["questions and answers"], 2, 32)
    query = normal(4, int(tails.query_starts[-1]), 32)
    assert all(map(torch.equal, attend(query, tails, skipped, window=70), attend(query, tails, skipped)))


def test_pages_before_the_windows_are_not_read():
    tails, skipped = paged([(100, 3, 0)], 2, 32)
    query = normal(4, 3, 32)
    expected = attend(query, tails, skipped, window=10)
    tails.keys[tails.pages[0, :2]] = math.nan
    tails.values[tails.pages[0, :2]] = math.nan
    assert all(map(torch.equal, attend(query, tails, skipped, window=10), expected))


def test_a_recorded_call_serves_a_tail_that_grows():
    tails, skipped = paged([(140, 2, 0), (70, 1, 0)], 2, 32)
    query, nothing = normal(4, 3, 32), torch.empty(0)
    out, logsumexps = torch.empty(3, 4 * 32), torch.empty(4, 3)
    pages, lengths, starts = (part.numpy() for part in tails[2:5])
    recorded, tape = Tails(pages, lengths, starts, skipped), Tape()
    with tape.recording():
        recorded.attend(query, *tails[:2], SCALE, nothing, nothing, out, logsumexps, window=40)
    for lengths[:] in ((60, 12), (61, 13), (140, 70)):
        tape.run()
        expected = attend(query, tails, skipped, window=40)
        assert torch.equal(out, expected[0])
        assert torch.equal(logsumexps, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_the_public_operation_takes_it(dtype, window, monkeypatch):
    tails, _ = paged(SESSIONS["questions and answers"], 2, 32)
    query = normal(4, int(tails.query_starts[-1]) + 2, 32).to(dtype)  # the last two belong to nobody
    expected = paged_attention_reference(query.double(), tails, scale=SCALE, window=window)
    plain = paged_attention_reference(query.float(), tails, scale=SCALE, window=window)
    monkeypatch.setattr("cag_kernels.prefix.session_by_session", None)  # the compiled path is the one
    found = paged_attention(query, tails, scale=SCALE, window=window)
    for mine, exact, in_float32 in zip(found, expected, plain, strict=True):
        seen = exact.isfinite()
        assert torch.equal(mine.isfinite(), seen)
        assert_close(mine[seen], exact[seen], in_float32[seen])


@pytest.mark.parametrize("codec", ["plain", "int8", "int4"])
@pytest.mark.parametrize("num_tokens", [70, 1500])
def test_queries_that_stay_apart_have_the_same_bits_in_any_company(codec, num_tokens):
    keys, values = normal(2, 2, num_tokens, 64).bfloat16().unbind()
    prefix = DensePrefix(keys, values)
    if codec != "plain":
        bits = int(codec[3:])
        prefix = quantize_prefix(keys, values, key_bits=bits, value_bits=bits, group_tokens=64, num_exact=4)
    checked = 0
    for dtype in (torch.float32, torch.bfloat16):
        query = normal(6, 60, 64).to(dtype)
        if not rows_stay_apart(query, prefix):
            continue
        checked += 1
        out, lse = prefix_attention(query, prefix, scale=SCALE)
        for first, last in ((0, 1), (7, 9), (59, 60), (3, 40)):
            mine = prefix_attention(query[:, first:last], prefix, scale=SCALE)
            assert torch.equal(mine[0], out[:, first:last])
            assert torch.equal(mine[1], lse[:, first:last])
    assert checked or not has_compiler()


@pytest.mark.parametrize(
    ("linear", "serves", "product_of"),
    [(tile_linear, tile_linear_serves, tile_product), (dot_linear, dot_linear_serves, dot_product)],
    ids=["tiles", "dots"],
)
def test_products_of_bfloat16_give_a_row_the_same_bits_in_any_company(linear, serves, product_of):
    weight, bias = normal(200, 96).bfloat16(), normal(200)
    if not serves(weight):
        pytest.skip("this processor has no such products, or takes others")
    rows, product = normal(50, 96), product_of(weight, bias)
    whole = product(rows)
    assert torch.equal(whole, linear(rows, weight, bias))
    for first, last in ((0, 1), (17, 18), (0, 16), (5, 40), (49, 50)):
        assert torch.equal(product(rows[first:last].contiguous()), whole[first:last])


@pytest.mark.parametrize("kind", SESSIONS)
@pytest.mark.parametrize("window", [None, 5, 34])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("heads", "head_dim"), [((6, 1), 576), ((4, 2), 20)])
@pytest.mark.parametrize("one_side", [False, True])
def test_wide_heads_in_operations_that_wait_for_nothing(kind, window, softcap, heads, head_dim, one_side, monkeypatch):
    """What a GPU records where no kernel serves: of latents, whose values are their keys, some sessions at a time."""
    tails, _ = paged(SESSIONS[kind], heads[1], head_dim)
    if one_side:
        tails = tails._replace(values=tails.keys)
    monkeypatch.setattr(wide, "GATHERED_NUMBERS", 2 * tails.pages.shape[1] * tails.keys[0].numel())
    query = normal(heads[0], int(tails.query_starts[-1]), head_dim)
    masks = {"scale": SCALE, "window": window, "softcap": softcap}
    found = wide.wide_paged_attention(query, tails, **masks)
    expected = paged_attention_reference(query.double(), tails, **masks)
    in_float32 = paged_attention_reference(query, tails, **masks)
    for got, want, plain in zip(found, expected, in_float32, strict=True):
        assert got.shape == want.shape
        assert_close(got, want, plain)


def test_wide_heads_of_sequences_that_ask_nothing():
    """Rows and sequences that pad a step see what they see, and change nothing."""
    tails, _ = paged([(33, 1, 0), (40, 1, 0)], 1, 24)
    query = normal(4, 4, 24)
    expected = paged_attention_reference(query[:, :2].double(), tails, scale=SCALE)
    nothing = torch.zeros(1, 2, dtype=torch.int32)
    padded = tails._replace(
        pages=torch.cat([tails.pages, nothing]),
        lengths=torch.tensor([33, 40, 0], dtype=torch.int32),
        query_starts=torch.tensor([0, 1, 2, 2], dtype=torch.int32),
    )
    found = wide.wide_paged_attention(query, padded, scale=SCALE)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got[:, :2].double(), want, atol=1e-6, rtol=1e-5)
    assert not found[0].isnan().any()
