"""Attention over a prefix in codes by 16-bit integers, as on a processor with AVX2: the oracle's numbers, to a fraction
of what bfloat16 loses, and a row's bits whatever shares the call."""

import pytest
import torch

from cag_kernels import choose_prefix_path, dequantize_prefix, quantize_prefix
from cag_kernels.cpu.attention import segments as cpu
from cag_kernels.cpu.attention.segments import attention_kernel, cpu_quantized_attention
from cag_kernels.cpu.processor import has_tiles, vector_lanes
from cag_kernels.cpu.tape import Tape
from cag_kernels.prefixes import Codes
from cag_kernels.report import prefix_paths

pytest.importorskip("llvmlite")
import llvmlite.binding as llvm

from cag_kernels.cpu.attention.few_codes import few_codes_serve
from cag_kernels.cpu.attention.panel import Blocking
from cag_kernels.cpu.pairs import pairs_win

pytestmark = pytest.mark.skipif(not llvm.get_host_cpu_features().get("avx2", False), reason="no 16-bit products")

BITS = [(8, 8), (4, 4), (8, 4), (4, 8)]
NARROW, WIDE = Blocking(8, 4), Blocking(16, 8)  # the latter by halves where vectors have 8 lanes
HOST = WIDE if pairs_win(16) else NARROW
SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_tokens
    (9, 3, 64, 15, 1000),
    (9, 3, 64, 1, 1000),
    (12, 2, 128, 1, 1025),
    (12, 2, 128, 7, 1025),
    (8, 1, 256, 5, 600),
    (4, 4, 96, 16, 512),
    (4, 1, 96, 33, 577),
    (6, 2, 32, 40, 129),
]


@pytest.fixture(autouse=True)
def integers(monkeypatch):
    """Integers also where tiles would serve, in this processor's vectors; gives a switch to another blocking."""

    def use(blocking):
        monkeypatch.setattr(cpu, "code_kernel", _kernels(blocking))

    use(HOST)
    return use


def _kernels(blocking):
    def kernel(head_dim, codes, _tiles, window=None, rows=None, dtype=torch.bfloat16):
        few_rows = cpu._few_rows(head_dim, rows, window) if few_codes_serve(head_dim, codes, blocking) else None
        key = blocking, head_dim, codes, window is not None, few_rows
        if (*key, dtype) not in _made:
            arguments = *key[1:2], blocking, few_rows, codes, window is not None, True, dtype
            _made[*key, dtype] = attention_kernel(*arguments)
        return _made[*key, dtype]

    return kernel


_made = {}


def make(shape, bits=(8, 8), seed=0, kept=torch.bfloat16, **options):
    """A query; a prefix whose channels lie apart and whose tokens' values differ in size."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_tokens = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    keys, values = torch.randn(2, num_kv_heads, num_tokens, head_dim, generator=generator)
    keys = keys + 2 * torch.randn(head_dim, generator=generator)
    values = values * torch.randn(num_tokens, 1, generator=generator).exp()
    sides = (side.to(kept) for side in (keys, values))
    prefix = quantize_prefix(*sides, key_bits=bits[0], value_bits=bits[1], **options)
    return torch.randn(num_q_heads, num_queries, head_dim, generator=generator), prefix


def met(prefix, tile=64):
    """Keys and values that are met, in float64: `code * scale + offset`, in tiles with exact tokens of their type."""
    stop = -(-prefix.exact_keys.shape[1] // tile) * tile
    sides = [side.clone() for side in dequantize_prefix(prefix, torch.float64)]
    for side, rounded in zip(sides, dequantize_prefix(prefix, prefix.exact_keys.dtype), strict=True):
        side[:, :stop] = rounded[:, :stop].double()
    return sides


def oracle(query, sides, scale, hidden=None):
    keys, values = (side.repeat_interleave(query.shape[0] // side.shape[0], dim=0) for side in sides)
    scores = query.to(keys.dtype) @ keys.mT * scale
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ values, scores.logsumexp(-1)


def plain(query, sides, scale, hidden=None):
    """Torch with everything that meets something rounded to bfloat16, and sums in float32."""
    keys, values = (side.repeat_interleave(query.shape[0] // side.shape[0], dim=0) for side in sides)
    scores = query.bfloat16().float() @ keys.bfloat16().float().mT * scale
    scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
    return weights.bfloat16().float() @ values.bfloat16().float() / total, scores.logsumexp(-1)


def assert_near(query, prefix, scale, found, hidden=None, part=0.25):
    """Error at most a part of plain torch's in bfloat16, of which twice may be lost, and a few roundings of float32."""
    sides = met(prefix)
    expected, ordinary = oracle(query, sides, scale, hidden), plain(query, [s.float() for s in sides], scale, hidden)
    for got, want, lossy in zip(found, expected, ordinary, strict=True):
        sees = want.isfinite()
        assert torch.equal(got.isfinite(), sees)
        got, want, lossy = got[sees].double(), want[sees], lossy[sees].double()
        if want.numel():
            roundings = 8 * torch.finfo(torch.float32).eps * want.abs().max().clamp_min(1.0)
            assert (got - want).abs().max() <= part * (lossy - want).abs().max() + roundings


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("num_exact", [0, 4])
def test_numbers_are_those_of_the_oracle(shape, bits, num_exact):
    query, prefix = make(shape, bits, num_exact=num_exact)
    for scale in (shape[2] ** -0.5, 1.0):
        assert_near(query, prefix, scale, cpu_quantized_attention(query, prefix, scale=scale))


@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_queries", [1, 15])
@pytest.mark.parametrize("blocking", [NARROW, WIDE])
def test_exact_tokens_of_other_types(blocking, num_queries, kept, integers):
    integers(blocking)
    query, prefix = make((9, 3, 64, num_queries, 1000), kept=kept, num_exact=70)
    assert prefix.exact_keys.dtype == kept
    assert_near(query, prefix, 0.125, cpu_quantized_attention(query, prefix, scale=0.125))


@pytest.mark.parametrize("num_queries", [1, 3, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21])
def test_every_number_of_vectors_of_rows(num_queries):
    query, prefix = make((4, 2, 32, num_queries, 200), num_exact=0)
    assert_near(query, prefix, 0.3, cpu_quantized_attention(query, prefix, scale=0.3))


@pytest.mark.parametrize(
    "num_tokens", [1, 2, 3, 5, 31, 33, 63, 64, 65, 66, 67, 127, 129, 511, 513, 1023, 1025, 1087, 1089]
)
@pytest.mark.parametrize("num_exact", [0, 4, 70])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_every_end_of_the_codes_and_of_exact_tokens(num_tokens, num_exact, bits):
    query, prefix = make((4, 2, 32, 9, num_tokens), bits, num_exact=num_exact)
    assert_near(query, prefix, 0.3, cpu_quantized_attention(query, prefix, scale=0.3))


@pytest.mark.parametrize("group_tokens", [64, 128, 192, 512])
@pytest.mark.parametrize("group_channels", [16, 32, 48, 64, 96])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_groups_of_any_number(group_tokens, group_channels, head_dim):
    sizes = {"group_tokens": group_tokens, "group_channels": group_channels}
    query, prefix = make((4, 2, head_dim, 5, 701), (8, 4), **sizes)
    assert_near(query, prefix, 0.2, cpu_quantized_attention(query, prefix, scale=0.2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "head_dim"), [(2, 2, 64), (9, 3, 64), (12, 2, 128), (16, 1, 96)]
)
@pytest.mark.parametrize("num_exact", [0, 4])
def test_a_query_has_the_same_bits_alone_and_in_company(num_q_heads, num_kv_heads, head_dim, bits, num_exact):
    query, prefix = make((num_q_heads, num_kv_heads, head_dim, 7, 1077), bits, num_exact=num_exact)
    query[:, 2] *= 9
    out, lse = cpu_quantized_attention(query, prefix, scale=0.2)
    for index in range(query.shape[1]):
        own = cpu_quantized_attention(query[:, index : index + 1], prefix, scale=0.2)
        assert torch.equal(own[0], out[:, index : index + 1])
        assert torch.equal(own[1], lse[:, index : index + 1])


SINGLE = [  # rows of a key/value head, head_dim, num_tokens, num_exact, tokens and channels of a group
    (1, 64, 1077, 4, (64, 64)),
    (2, 32, 513, 0, (128, 32)),
    (3, 64, 1025, 70, (192, 32)),
    (4, 128, 641, 4, (64, 64)),
    (5, 96, 130, 0, (64, 96)),  # a key's codes are no whole number of what is turned at once
    (6, 128, 577, 64, (64, 128)),
    (7, 256, 65, 4, (64, 64)),
    (8, 160, 1, 0, (64, 160)),
    (8, 64, 2, 1, (64, 64)),
]


@pytest.mark.parametrize(
    ("shape", "bits"), [(shape, BITS[(first + number) % 4]) for number, shape in enumerate(SINGLE) for first in (0, 1)]
)
def test_code_for_one_query_has_the_bits_of_code_for_any_number(shape, bits, integers, monkeypatch):
    assert_bits_of_one_query(HOST, shape, bits, integers, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("blocking", [NARROW, WIDE])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SINGLE)
def test_code_for_one_query_has_these_bits_on_other_processors(shape, bits, blocking, integers, monkeypatch):
    assert_bits_of_one_query(blocking, shape, bits, integers, monkeypatch)


def assert_bits_of_one_query(blocking, shape, bits, integers, monkeypatch):
    rows, head_dim, num_tokens, num_exact, groups = shape
    sizes = {"group_tokens": groups[0], "group_channels": groups[1]}
    query, prefix = make((2 * rows, 2, head_dim, 1, num_tokens), bits, num_exact=num_exact, **sizes)
    query[1] *= 9
    integers(blocking)
    found = cpu_quantized_attention(query, prefix, scale=0.2)
    assert_near(query, prefix, 0.2, found)
    monkeypatch.setattr(cpu, "MAX_FEW_ROWS", 0)
    assert all(map(torch.equal, cpu_quantized_attention(query, prefix, scale=0.2), found))


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_heads_that_code_for_one_query_does_not_take(head_dim, integers):
    assert not few_codes_serve(head_dim, Codes(8, 8, 64, head_dim), WIDE)
    integers(WIDE)
    query, prefix = make((4, 2, head_dim, 3, 200))
    together = cpu_quantized_attention(query, prefix, scale=0.2)
    assert_near(query, prefix, 0.2, together)
    alone = cpu_quantized_attention(query[:, :1].contiguous(), prefix, scale=0.2)
    assert torch.equal(alone[0], together[0][:, :1])


@pytest.mark.parametrize("num_queries", [1, 15])
def test_bits_depend_neither_on_threads_nor_on_a_recording(num_queries, threads):
    query, prefix = make((9, 3, 64, num_queries, 2900))
    results = []
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        results.append(cpu_quantized_attention(query, prefix, scale=0.1))
    tape, into = Tape(), tuple(torch.full_like(part, torch.nan) for part in results[0])
    with tape.recording():
        cpu_quantized_attention(query, prefix, scale=0.1, into=into)
    tape.run()
    for found in (*results[1:], into):
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("window", [1, 17, 64, 65, 300, 513, 5000])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4)])
@pytest.mark.parametrize("shape", [(9, 3, 64, 15, 1000), (4, 1, 128, 1, 1700), (4, 2, 64, 9, 63), (12, 2, 64, 40, 700)])
def test_windows_are_those_of_the_oracle(shape, bits, window):
    query, prefix = make(shape, bits)
    num_queries, num_tokens = query.shape[1], prefix.num_tokens
    behind = torch.arange(num_queries, dtype=torch.int32)
    behind[num_queries // 3 :: 5] += 37
    behind[num_queries // 2 :: 7] = 0
    behind[num_queries // 5 :: 9] += 480
    seen = {"offset": num_tokens - 1, "window": window}
    found = cpu_quantized_attention(query, prefix, scale=0.2, positions=behind, **seen)
    hidden = torch.arange(num_tokens) <= (behind + num_tokens - 1 - window)[:, None]
    assert_near(query, prefix, 0.2, found, hidden)
    for some in ([0], [num_queries - 1], list(range(0, num_queries, 2))):
        own = cpu_quantized_attention(query[:, some].contiguous(), prefix, scale=0.2, positions=behind[some], **seen)
        assert torch.equal(own[0], found[0][:, some])
        assert torch.equal(own[1], found[1][:, some])


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("num_queries", [1, 13])
@pytest.mark.parametrize("blocking", [WIDE, Blocking(8, 8), Blocking(16, 8, tile=32, range_tokens=96)])
def test_other_processors_blocking(blocking, num_queries, bits, window, integers):
    """Lanes and blocks do not show in the bits; tiles and ranges do."""
    query, prefix = make((6, 2, 64, num_queries, 777), bits, num_exact=0)
    seen = {"offset": 776, "window": window, "positions": torch.arange(num_queries, dtype=torch.int32)}
    integers(NARROW)
    expected = cpu_quantized_attention(query, prefix, scale=0.2, **seen)
    integers(blocking)
    found = cpu_quantized_attention(query, prefix, scale=0.2, **seen)
    hidden = None if window is None else torch.arange(777) <= (seen["positions"] + 776 - window)[:, None]
    assert_near(query, prefix, 0.2, found, hidden)
    assert blocking.tile == 32 or all(map(torch.equal, found, expected))


def test_a_query_of_zeros_and_of_denormal_numbers_is_a_mean():
    query, prefix = make((4, 2, 64, 9, 300), num_exact=0)
    mean = met(prefix)[1].mean(1).repeat_interleave(2, dim=0)
    for factor in (0.0, 1e-40, 1e-30):
        out, lse = cpu_quantized_attention(query * factor, prefix, scale=0.2)
        assert torch.allclose(out.double(), mean[:, None].expand_as(out), atol=1e-4)
        assert torch.allclose(lse, torch.full_like(lse, 300.0).log())


@pytest.mark.parametrize("num_queries", [1, 15])
def test_huge_scores_neither_overflow_nor_lose_the_largest(num_queries):
    query, prefix = make((4, 2, 64, num_queries, 900), num_exact=0)
    query = query * 1e4
    prefix = prefix._replace(key_scales=prefix.key_scales * 1e3, key_offsets=prefix.key_offsets * 1e3)
    out, lse = cpu_quantized_attention(query, prefix, scale=10.0)
    expected = oracle(query, met(prefix), 10.0)[1]
    assert expected.abs().max() > 1e9
    assert (lse - expected).abs().max() < 1e-4 * expected.abs().max()
    nearest = torch.cdist(out.double(), met(prefix)[1].repeat_interleave(2, dim=0)).amin(-1)
    assert (nearest < 1e-3).all()  # one key's values


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**100])
def test_values_of_any_magnitude(factor):
    query, prefix = make((4, 2, 64, 5, 300))
    expected = cpu_quantized_attention(query, prefix, scale=0.2)
    sides = (prefix.value_scales * factor, prefix.value_offsets * factor, prefix.exact_values * factor)
    other = prefix._replace(value_scales=sides[0], value_offsets=sides[1], exact_values=sides[2])
    out, lse = cpu_quantized_attention(query, other, scale=0.2)
    assert torch.allclose(out / factor, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_constant_groups_with_a_scale_of_zero(bits):
    query, prefix = make((4, 2, 64, 5, 300), bits)
    keys, values = dequantize_prefix(prefix, torch.bfloat16)
    keys[:, 64:192, ::3] = 1.5
    values[:, 100:200] = -0.75
    values[:, 250:] = 0.0
    prefix = quantize_prefix(keys, values, key_bits=bits[0], value_bits=bits[1], num_exact=0)
    assert (prefix.key_scales == 0).any()
    assert (prefix.value_scales == 0).any()
    assert_near(query, prefix, 0.2, cpu_quantized_attention(query, prefix, scale=0.2))


def test_scales_far_apart_leave_the_small_ones_their_share():
    """Rounding goes by the largest product of a row, not by the largest scale."""
    query, prefix = make((4, 2, 64, 9, 640), num_exact=0)
    key_scales, value_scales = prefix.key_scales.clone(), prefix.value_scales.clone()
    key_scales[:, :, 7] *= 64
    value_scales[:, ::64] *= 64
    query[:, :, 7] /= 64
    prefix = prefix._replace(key_scales=key_scales, value_scales=value_scales)
    assert_near(query, prefix, 0.1, cpu_quantized_attention(query, prefix, scale=0.1))


@pytest.mark.parametrize("num_queries", [1, 15])
@pytest.mark.parametrize("field", ["key_scales", "key_offsets", "value_scales", "value_offsets"])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_a_damaged_number_is_not_hidden(num_queries, field, damage):
    query, prefix = make((4, 2, 64, num_queries, 900))
    parts = getattr(prefix, field).clone()
    parts[1, -1] = damage
    out, lse = cpu_quantized_attention(query, prefix._replace(**{field: parts}), scale=0.1)
    assert not out[2:].isfinite().any()
    assert out[:2].isfinite().all()
    assert field.startswith("value") or not lse[2:].isfinite().any()


@pytest.mark.parametrize("num_queries", [1, 15])
def test_a_damaged_query_is_not_hidden(num_queries):
    query, prefix = make((4, 2, 64, num_queries, 900))
    query[3, 0, 5] = torch.nan
    out, lse = cpu_quantized_attention(query, prefix, scale=0.1)
    assert out[3, 0].isnan().all()
    assert lse[3, 0].isnan()
    assert out[:3].isfinite().all()


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_nothing_around_the_codes_is_read(bits):
    query, prefix = make((4, 2, 64, 5, 101), bits)
    expected = cpu_quantized_attention(query, prefix, scale=0.1)
    parts = {}
    for name in ("key_codes", "value_codes"):
        codes = getattr(prefix, name)
        wide = torch.full((2, 181, codes.shape[2]), 127, dtype=codes.dtype)
        wide[:, 40:141] = codes
        parts[name] = wide[:, 40:141]
    assert all(map(torch.equal, cpu_quantized_attention(query, prefix._replace(**parts), scale=0.1), expected))


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("head_dim", [512, 576])
def test_codes_of_the_largest_magnitude_do_not_overflow(num_queries, head_dim):
    query, prefix = make((2, 1, head_dim, num_queries, 200), num_exact=0)
    full = torch.full_like(prefix.key_codes, 127)
    prefix = prefix._replace(key_codes=full, value_codes=full)
    query = query.abs().clamp(0.99, 1.0)
    prefix = prefix._replace(key_scales=torch.full_like(prefix.key_scales, 0.01))
    assert_near(query, prefix, 0.01, cpu_quantized_attention(query, prefix, scale=0.01))


@pytest.mark.skipif(has_tiles() or vector_lanes() != 8, reason="other products come first")
def test_dispatch(monkeypatch):
    """Where groups of keys are whole tiles and the processor has the products; the report says so."""
    monkeypatch.undo()
    assert pairs_win(8)
    assert cpu.multiplies_codes(Codes(4, 8, 128, 16))
    assert not cpu.multiplies_codes(Codes(8, 8, 16, 64))
    query, prefix = make((4, 2, 64, 5, 101))
    assert choose_prefix_path(query, prefix, window=None, softcap=None) == "compiled"
    assert "integers" in prefix_paths(torch.device("cpu"))["prefix, 8 and 4 bits"]
    found = cpu_quantized_attention(query, prefix, scale=0.2)
    assert_near(query, prefix, 0.2, found)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"avx2": False})
    pairs_win.cache_clear()
    assert not pairs_win(8)
    assert not pairs_win(16)
    assert "dequantized" in prefix_paths(torch.device("cpu"))["prefix, 8 and 4 bits"]
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"avx512f": True, "avx512bw": True, "avx512vnni": True})
    pairs_win.cache_clear()
    assert pairs_win(16)
    pairs_win.cache_clear()
