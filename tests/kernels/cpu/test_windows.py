"""Sliding windows in compiled attention on a CPU: the oracle's numbers, and a row's bits whatever shares the call."""

import pytest
import torch

from cag_kernels import (
    DensePrefix,
    PagedTails,
    QuantizedPrefix,
    cascade_attention,
    choose_path,
    choose_prefix_path,
    dequantize_prefix,
    prefix_attention,
    quantize_prefix,
    rows_stay_apart,
    segment_attention,
)
from cag_kernels.cpu.attention import segments as cpu
from cag_kernels.cpu.attention.segments import (
    attends_in_bfloat16,
    attention_kernel,
    cpu_attention,
    cpu_quantized_attention,
)
from cag_kernels.cpu.processor import has_dots, has_tiles
from cag_kernels.cpu.tape import Tape
from cag_kernels.prefix_reference import cascade_attention_reference, prefix_attention_reference

pytest.importorskip("llvmlite")
from cag_kernels.cpu.attention.panel import Blocking

in_bfloat16 = pytest.mark.skipif(not attends_in_bfloat16(64), reason="no products of bfloat16")
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=in_bfloat16)]
SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (4, 1, 256, 20, 1023),
    (4, 1, 256, 1, 1700),
    (4, 2, 64, 9, 2500),
    (9, 3, 64, 15, 1000),
    (4, 4, 96, 7, 513),
    (12, 3, 128, 40, 700),
    (6, 2, 32, 5, 63),
    (4, 4, 64, 1, 1),
    (40, 2, 64, 1, 600),
]
WINDOWS = [1, 17, 64, 65, 300, 512, 1300, 5000]
FORMS = ["numbers", (8, 8), (4, 4), (8, 4)]


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """Codes become numbers on all processors; see `test_code_products` for where they are multiplied as integers."""
    monkeypatch.setattr(cpu, "multiplies_codes", lambda _codes: False)


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
    """Plain torch in the precision that products of bfloat16 have: float32 scores, weights rounded to bfloat16."""
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
    (and a short exponential, where weights are rounded: codes meet float32 without tiles); nothing where a row sees
    nothing."""
    rounded = query.dtype == torch.bfloat16 and (isinstance(prefix, DensePrefix) or has_tiles())
    scale = scale or query.shape[2] ** -0.5
    expected = reference(query, prefix, behind, window, torch.float64, scale)
    if rounded:
        plain = rounded_weights(query, prefix, behind, window, scale)
    else:
        plain = reference(query, prefix, behind, window, torch.float32, scale)
    least = 1e-4 if rounded else 8 * torch.finfo(torch.float32).eps
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


@pytest.mark.parametrize("window", [1, 3, 64, 100, 131, 4000])
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("dtype", TYPES)
def test_places_are_those_behind_the_offset_where_none_are_given(window, num_queries, dtype):
    query, prefix, _ = make((6, 2, 64, num_queries, 130), dtype)
    behind = torch.arange(num_queries, dtype=torch.int32) + 2
    found = cpu_attention(query, *prefix, scale=0.125, offset=131, window=window)
    assert_close(found, query, prefix, behind, window)
    assert all(map(torch.equal, found, attend(query, prefix, behind, window)))


@pytest.mark.parametrize("window", [1, 70, 300])
@pytest.mark.parametrize("blocking", [Blocking(8, 4), Blocking(8, 8), Blocking(16, 8, tile=32, range_tokens=96)])
@pytest.mark.parametrize("num_queries", [1, 13])
def test_other_processors_blocking(blocking, window, num_queries, monkeypatch):
    kernel = attention_kernel(64, blocking, has_window=True)
    monkeypatch.setattr(cpu, "compiled_kernel", lambda *_which: kernel)
    query, prefix, behind = make((6, 2, 64, num_queries, 777), torch.float32)
    assert_close(attend(query, prefix, behind, window), query, prefix, behind, window)


@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 127, 255, 256, 257, 511, 513, 640])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_end_of_the_keys_and_every_beginning_of_windows(num_keys, dtype):
    query, prefix, _ = make((2, 1, 32, 150, num_keys), dtype, seed=num_keys)
    behind = torch.arange(150, dtype=torch.int32)
    assert_close(attend(query, prefix, behind, 140), query, prefix, behind, 140)


@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_see_nothing_are_zeros_beside_others_and_alone(num_queries, dtype):
    query, prefix, _ = make((4, 1, 64, num_queries, 600), dtype)
    behind = torch.full((num_queries,), 50, dtype=torch.int32)
    for window in (50, 20, 1):
        out, lse = attend(query, prefix, behind, window)
        assert out.count_nonzero() == 0
        assert (lse == -torch.inf).all()
    behind[-1] = 3
    out, lse = attend(query, prefix, behind, 50)
    assert out[:, :-1].count_nonzero() == 0
    assert (lse[:, :-1] == -torch.inf).all()
    assert out[:, -1].count_nonzero()
    assert lse[:, -1].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [30, 200, 600, 1200])
def test_a_rows_bits_do_not_depend_on_its_company_or_on_threads(form, dtype, window, threads):
    query, prefix, behind = make((9, 3, 64, 40, 1900), dtype, form)
    behind[-1] = 0  # sees furthest back
    query[:, ::7] *= 8  # their maxima grow later and further
    out, lse = attend(query, prefix, behind, window)
    for num_threads in (1, 3):
        threads(num_threads)
        assert all(map(torch.equal, attend(query, prefix, behind, window), (out, lse)))
    for some in ([0], [39], [7, 8], list(range(5, 22)), list(range(1, 40, 2)), list(range(39, -1, -1))):
        found = attend(query[:, some].contiguous(), prefix, behind[some], window)
        assert torch.equal(found[0], out[:, some])
        assert torch.equal(found[1], lse[:, some])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [40, 300])
def test_hidden_keys_weigh_nothing_however_large(dtype, window):
    """Not even where they are all that a piece or a range holds for a row, while others see them."""
    query, prefix, _ = make((8, 2, 64, 17, 1500), dtype)
    behind = torch.arange(17, dtype=torch.int32) + 1
    behind[5] = -1200 + window  # stands where none may, only to see far back; it is not looked at below
    rows = [row for row in range(17) if row != 5]
    expected = attend(query, prefix, behind, window)
    least = prefix.num_tokens - window + 1  # of key places that the first row sees
    for keys, values in ((1e30, 1e30), (-1e30, -1e30), (0.0, 3e38)):
        prefix.keys[:, :least] = keys
        prefix.values[:, :least] = values
        out, lse = attend(query, prefix, behind, window)
        assert torch.equal(out[:, rows], expected[0][:, rows])
        assert torch.equal(lse[:, rows], expected[1][:, rows])


@pytest.mark.parametrize("scale", [1e-4, 8.0])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_queries", [1, 15])
def test_huge_scores_neither_overflow_nor_lose_the_largest(scale, dtype, num_queries):
    query, prefix, behind = make((4, 2, 64, num_queries, 900), dtype)
    query, prefix = query * 2.0**13, DensePrefix(prefix.keys * 2.0**10, prefix.values)
    for window in (1, 90, 700):
        out, lse = attend(query, prefix, behind, window, scale=scale)
        expected, expected_lse = reference(query, prefix, behind, window, torch.float64, scale)
        assert torch.allclose(out.double(), expected, atol=1e-3)
        assert torch.allclose(lse.double(), expected_lse, rtol=1e-5)


@pytest.mark.parametrize("num_queries", [1, 15])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_damaged_key_that_is_seen_is_not_hidden_and_one_far_before_is_not_read(num_queries, dtype):
    query, prefix, behind = make((4, 2, 64, num_queries, 900), dtype)
    behind.clamp_(max=30)
    prefix.keys[:, :600] = torch.nan
    prefix.values[:, :600] = torch.nan
    assert not torch.isnan(attend(query, prefix, behind, 200)[0]).any()
    prefix.keys[1, 850, 5] = torch.nan
    out, lse = attend(query, prefix, behind, 200)
    assert torch.isnan(out[2:]).all()
    assert torch.isnan(lse[2:]).all()
    assert not torch.isnan(out[:2]).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_queries", [1, 12])
def test_a_recorded_call_reads_positions_anew(form, dtype, num_queries, threads):
    threads(2)
    query, prefix, behind = make((4, 2, 64, num_queries, 1100), dtype, form)
    into = torch.empty(4, num_queries, 64), torch.empty(4, num_queries)
    tape, positions = Tape(), behind.clone()
    with tape.recording():
        attend(query, prefix, positions, 300, into=into)
    for step in (0, 1, 150, 290, 40):
        positions.copy_(behind + step)
        tape.run()
        assert all(map(torch.equal, into, attend(query, prefix, behind + step, 300)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [10, 100])
def test_the_public_operations_take_it(form, dtype, window):
    query, prefix, behind = make((4, 2, 64, 12, 300), dtype, form)
    assert choose_prefix_path(query, prefix, window=window, softcap=None) == "compiled"
    positions = (behind + prefix.num_tokens - 1).repeat_interleave(2)[::2]
    found = prefix_attention(query, prefix, scale=0.125, window=window, positions=positions)
    assert all(map(torch.equal, found, attend(query, prefix, behind, window)))
    assert rows_stay_apart(query, prefix, window=window)
    assert choose_prefix_path(query, prefix, window=window, softcap=3.0) == "torch"


@pytest.mark.parametrize("dtype", TYPES)
def test_a_segment_takes_it(dtype):
    query, prefix, _ = make((4, 2, 64, 12, 300), dtype)
    plain = {"scale": 0.125, "offset": 304}
    assert choose_path(query, prefix.keys, window=100, softcap=None, offset=304) == "compiled"
    found = segment_attention(query, *prefix, window=100, **plain)
    assert all(map(torch.equal, found, cpu_attention(query, *prefix, window=100, **plain)))
    assert all(
        map(torch.equal, segment_attention(query, *prefix, window=316, **plain), cpu_attention(query, *prefix, **plain))
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [5, 40, 200, 1000])
def test_a_prefix_in_pieces_with_tails_behind_is_one_attention(form, window):
    """Rows at the beginning of their tails see the prefix, later ones only their tail, all of them joined."""
    query, prefix, _ = make((4, 2, 64, 60, 300), torch.float32, form)
    first = make((4, 2, 64, 60, 100), torch.float32)[1]
    lengths, counts = [90, 10, 47], [30, 10, 20]
    pages = torch.arange(9, dtype=torch.int32).view(3, 3)
    pool = torch.randn(2, 9, 2, 32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    tails = PagedTails(*pool, pages, torch.tensor(lengths, dtype=torch.int32), starts, max(counts))
    kwargs = {"scale": 0.125, "window": window}
    found = cascade_attention(query, [first, prefix], tails, **kwargs)
    numbers = [numbers_of(piece, torch.float64) for piece in (first, prefix)]
    exact = tails._replace(keys=tails.keys.double(), values=tails.values.double())
    expected = cascade_attention_reference(query.double(), numbers, exact, **kwargs)
    plain = cascade_attention_reference(
        query, [numbers_of(piece, torch.float32) for piece in (first, prefix)], tails, **kwargs
    )
    assert (found - expected).abs().max() <= 2 * (plain - expected).abs().max() + 4e-6


def test_kernels_are_made_ahead():
    cpu.warm_up([64, 40], group_sizes=[3], windows=[None, 20])
    assert cpu.compiled_kernel(64, None, 20) is cpu.compiled_kernel(64, 100, 900)
    assert cpu.compiled_kernel(64, None, 20) is not cpu.compiled_kernel(64)
    cpu.warm_up_tiles([64, 40], windows=[None, 20])
    if has_tiles():
        assert cpu.tile_kernel(64, 20) is cpu.tile_kernel(64, 512)
        assert len({cpu.tile_kernel(64, window) for window in (None, 20, 4096)}) == 3
    cpu.warm_up_dots([64, 40], group_sizes=[3], windows=[None, 20])
    if has_dots():
        assert cpu.dot_kernel(64, None, 20) is cpu.dot_kernel(64, 3, 900)
        assert len({cpu.dot_kernel(64, rows, window) for rows, window in ((None, None), (3, None), (3, 20))}) == 3


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("left_out", [512, 1024, 777])
def test_a_prefix_may_be_kept_from_a_later_token_on(dtype, left_out):
    """With the same bits, even, where whole ranges are left out."""
    query, prefix, behind = make((4, 1, 256, 12, 1900), dtype)
    kept = DensePrefix(*(side[:, left_out:] for side in prefix))
    found, expected = attend(query, kept, behind, 700), attend(query, prefix, behind, 700)
    assert_close(found, query, prefix, behind, 700)
    assert left_out == 777 or all(map(torch.equal, found, expected))
