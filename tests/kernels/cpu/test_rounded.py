"""Attention and linear layers whose rows are rounded to bfloat16, for a question's rows, against float64 oracles: by
tiles (AMX) and by products of pairs (AVX512_BF16), whatever of both the processor has."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch

from cag_kernels import (
    DensePrefix,
    choose_path,
    dot_linear,
    dot_linear_serves,
    dot_product,
    has_dots,
    has_tiles,
    linear,
    prefix_attention,
    quantize_prefix,
    rows_stay_apart,
    segment_attention,
    segment_attention_reference,
    tile_linear,
    tile_linear_serves,
    tile_product,
)
from cag_kernels.cpu.attention import segments
from cag_kernels.cpu.attention.segments import cpu_attention, cpu_attention_serves
from cag_kernels.linear import tile_linear_reference
from cag_kernels.tiled import tiled_attention

pytest.importorskip("llvmlite")
from cag_kernels.cpu.tape import Tape

ATTENTION = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (9, 3, 64, 15, 1000),
    (9, 3, 64, 1, 3001),
    (9, 3, 64, 48, 63),
    (12, 2, 128, 15, 1000),
    (12, 2, 128, 1, 513),
    (8, 1, 256, 7, 63),
    (8, 1, 256, 1, 1),
    (4, 4, 96, 16, 512),
    (4, 4, 96, 1, 777),
    (6, 2, 32, 37, 129),
    (10, 2, 160, 31, 2047),
    (20, 2, 160, 1, 600),
    (4, 1, 576, 9, 701),
    (8, 2, 576, 1, 1029),
]
HEAD_DIMS = [32, 64, 96, 128, 160, 256, 576]
LINEAR = [  # num_rows, out_features, in_features
    (1, 64, 32),
    (15, 576, 576),
    (16, 130, 64),
    (17, 77, 96),
    (33, 1000, 160),
    (128, 64, 1536),
    (3, 32, 1056),
    (1, 100, 8960),
    (7, 49, 8960),
    (25, 33, 2080),
]
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 24, 25, 48, 49, 128]
LENGTHS = [96, 1024, 1056, 1536, 2080]  # of rows; from 1,024 on one may be met in stretches
SOME = [[0], [39], [7, 8], list(range(5, 22)), list(range(1, 40, 2)), list(range(39, -1, -1))]  # of 40 rows


class Way(NamedTuple):
    """What multiplies, the least number of its output features, and whether the processor has it."""

    linear: Any
    serves: Any
    product: Any
    least_features: int
    is_there: bool


WAYS = {
    "tiles": Way(tile_linear, tile_linear_serves, tile_product, 32, has_tiles()),
    "dots": Way(dot_linear, dot_linear_serves, dot_product, 16, has_dots()),
}


@pytest.fixture(autouse=True, params=[name for name, way in WAYS.items() if way.is_there])
def way(request, monkeypatch):
    """Each that the processor has; it would take tiles where it has both."""
    if request.param == "dots":
        for module in (segments, linear):
            monkeypatch.setattr(module, "has_tiles", lambda: False)
    return WAYS[request.param]


def make(shape, seed=0):
    """A bfloat16 query; keys and values that are slices of a larger buffer full of NaN, across lines of memory."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator).bfloat16()
    buffer = torch.full((1 + 2 * num_kv_heads * (num_keys + 70) * head_dim,), torch.nan, dtype=torch.bfloat16)
    sides = buffer[1:].view(2, num_kv_heads, num_keys + 70, head_dim)[:, :, 3 : 3 + num_keys]
    sides.copy_(torch.randn(sides.shape, generator=generator))
    return query, sides[0], sides[1]


def rounded_weights(query, keys, values, scale):
    """Plain torch with float32 scores whose weights are rounded to bfloat16: the precision of both ways."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (side.float().repeat_interleave(group, dim=0) for side in (keys, values))
    scores = query.float() @ keys.mT * scale
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights.bfloat16().float() @ values / weights.sum(-1, keepdim=True), scores.logsumexp(-1)


def assert_close(found, query, keys, values, scale):
    """At most twice the error of plain torch in the same precision, plus that of a short exponential."""
    kwargs = {"scale": scale, "offset": keys.shape[1]}
    expected = segment_attention_reference(query.double(), keys.double(), values.double(), **kwargs)
    for got, want, plain in zip(found, expected, rounded_weights(query, keys, values, scale), strict=True):
        assert got.shape == want.shape
        assert got.dtype == torch.float32
        bound = 2 * (plain.double() - want).abs().max() + 1e-4 * want.abs().max().clamp_min(1.0)
        assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("shape", ATTENTION)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_attention_matches_the_oracle_and_reads_nothing_around_the_keys(shape, num_threads, threads):
    threads(num_threads)
    query, keys, values = make(shape)
    assert cpu_attention_serves(query, keys)
    assert choose_path(query, keys, window=None, softcap=None, offset=keys.shape[1]) == "compiled"
    found = segment_attention(query, keys, values, scale=shape[2] ** -0.5, offset=keys.shape[1])
    assert_close(found, query, keys, values, shape[2] ** -0.5)


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("num_keys", [*range(1, 131), 255, *range(509, 516), 640, 1023, 1025])
def test_every_end_of_the_keys(num_keys, num_queries):
    query, keys, values = make((6, 2, 64, num_queries, num_keys), seed=num_keys)
    assert_close(cpu_attention(query, keys, values, scale=0.2, offset=num_keys), query, keys, values, 0.2)


@pytest.mark.parametrize("num_queries", [1, 2, 5, 6, 10, 11, 16, 17, 32, 33, 48, 49, 80])
def test_every_number_of_vectors_of_rows(num_queries):
    query, keys, values = make((6, 2, 32, num_queries, 200), seed=num_queries)
    assert_close(cpu_attention(query, keys, values, scale=0.4, offset=200), query, keys, values, 0.4)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_a_query_alone_has_the_bits_that_it_has_in_company(head_dim, rows, threads):
    """Of few rows a key/value head, for which there may be code of their own."""
    query, keys, values = make((2 * rows, 2, head_dim, 19, 1077))
    query[:, ::4] *= 8  # their maxima grow later and further
    together = cpu_attention(query, keys, values, scale=0.2, offset=1077)
    for place, num_threads in ((0, 1), (1, 2), (8, 3), (18, 5)):
        threads(num_threads)
        alone = cpu_attention(query[:, place : place + 1], keys, values, scale=0.2, offset=1077)
        assert all(torch.equal(mine, whole[:, place : place + 1]) for mine, whole in zip(alone, together, strict=True))


@pytest.mark.parametrize("num_keys", [*range(1, 131), *range(509, 516)])
def test_a_query_alone_has_the_same_bits_at_every_end_of_the_keys(num_keys):
    query, keys, values = make((6, 2, 64, 9, num_keys), seed=num_keys)
    together = cpu_attention(query, keys, values, scale=0.3, offset=num_keys)
    alone = cpu_attention(query[:, 4:5], keys, values, scale=0.3, offset=num_keys)
    assert all(torch.equal(mine, whole[:, 4:5]) for mine, whole in zip(alone, together, strict=True))


@pytest.mark.parametrize("num_queries", [1, 15])
@pytest.mark.parametrize("scale", [1e-4, 8.0])
def test_huge_scores_neither_overflow_nor_lose_the_largest(scale, num_queries):
    query, keys, values = make((4, 2, 64, num_queries, 901))
    query, keys = query * 2.0**13, keys * 2.0**10
    out, lse = cpu_attention(query, keys, values, scale=scale, offset=901)
    expected, expected_lse = segment_attention_reference(
        query.double(), keys.double(), values.double(), scale=scale, offset=901
    )
    assert torch.allclose(out.double(), expected, atol=1e-3)
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-5)


@pytest.mark.parametrize("num_queries", [1, 15])
def test_a_damaged_key_is_not_hidden(num_queries):
    query, keys, values = make((4, 2, 64, num_queries, 900))
    keys[1, 700, 5] = torch.nan
    out, lse = cpu_attention(query, keys, values, scale=0.1, offset=900)
    assert torch.isnan(out[2:]).all()
    assert torch.isnan(lse[2:]).all()
    assert not torch.isnan(out[:2]).any()


@pytest.mark.parametrize("num_queries", [1, 15])
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_keys", [1, 64, 77, 901])
def test_a_damaged_last_value_stays_in_its_channel(num_keys, damage, num_queries):
    """The last key of an odd number may have a pair that weighs nothing."""
    query, keys, values = make((4, 2, 64, num_queries, num_keys))
    expected = cpu_attention(query, keys, values, scale=0.1, offset=num_keys)
    values[1, -1, 37] = damage
    out, lse = cpu_attention(query, keys, values, scale=0.1, offset=num_keys)
    assert not out[2:, :, 37].isfinite().any()
    out[2:, :, 37] = expected[0][2:, :, 37]
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_bits_do_not_depend_on_the_number_of_threads(way, threads):
    query, keys, values = make((9, 3, 64, 15, 2900))
    block, weight, long = torch.randn(15, 64), torch.randn(1000, 64).bfloat16(), torch.randn(100, 2080).bfloat16()
    results = []
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        attention = cpu_attention(query, keys, values, scale=0.1, offset=2900)
        products = way.linear(block, weight), way.linear(block.repeat(1, 33)[:, :2080], long)
        results.append((*attention, *products))
    for result in results[1:]:
        assert all(torch.equal(found, first) for found, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_rows_bits_do_not_depend_on_its_company(num_threads, coded, threads):
    """Rows share vectors of 16 with others, at other places, and before and behind other vectors."""
    threads(num_threads)
    query, keys, values = make((9, 3, 64, 40, 2301))
    query[:, ::7] *= 8  # their maxima grow later and further
    prefix = quantize_prefix(keys, values, key_bits=8, value_bits=8) if coded else DensePrefix(keys, values)
    assert rows_stay_apart(query, prefix)
    out, lse = prefix_attention(query, prefix, scale=0.2)
    for some in SOME:
        found = prefix_attention(query[:, some], prefix, scale=0.2)
        assert torch.equal(found[0], out[:, some])
        assert torch.equal(found[1], lse[:, some])


@pytest.mark.parametrize("num_queries", [1, 9])
def test_calls_from_several_python_threads(num_queries, way, threads):
    threads(2)
    problems = [make((6, 2, 64, num_queries, 400 + seed), seed=seed) for seed in range(8)]
    weight = torch.randn(130, 1056, generator=torch.Generator().manual_seed(0)).bfloat16()

    def compute(problem):
        rows = problem[1].reshape(-1)[: 7 * 1056].view(7, 1056).float()
        return *cpu_attention(*problem, scale=0.1, offset=4000), way.linear(rows, weight)

    alone = [compute(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(compute, problems * 4))
    for index, found in enumerate(together):
        assert all(map(torch.equal, found, alone[index % len(problems)]))


def test_score_caps_are_left_to_the_tiled_path():
    query, keys, values = make((4, 2, 64, 3, 200))
    found = segment_attention(query, keys, values, scale=0.1, offset=200, window=50, softcap=2.0)
    expected = tiled_attention(query, keys, values, scale=0.1, offset=200, window=50, softcap=2.0)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("head_dim", [16, 48, 80, 608])
def test_head_dimensions_that_are_no_whole_products_are_not_served(head_dim):
    query, keys, values = make((4, 2, head_dim, 3, 200))
    assert not segments.attends_in_bfloat16(head_dim)
    assert not cpu_attention_serves(query, keys)
    assert cpu_attention_serves(query.float(), keys) == (head_dim <= segments.MAX_HEAD_DIM)
    found = segment_attention(query, keys, values, scale=0.1, offset=200)
    expected = segment_attention_reference(query.double(), keys.double(), values.double(), scale=0.1, offset=200)
    assert all(torch.allclose(mine.double(), want, atol=0.05) for mine, want in zip(found, expected, strict=True))


def test_keys_of_other_types_are_not_met_in_bfloat16():
    query, keys, _ = make((4, 2, 64, 3, 200))
    assert not cpu_attention_serves(query, keys.half())
    assert not cpu_attention_serves(query, keys.float())
    assert not cpu_attention_serves(query.half(), keys)


def inside(shape, generator, dtype=torch.float32):
    """Numbers in the midst of a buffer full of NaN, across lines of memory."""
    size = math.prod(shape)
    buffer = torch.full((size + 2 * 101,), torch.nan, dtype=dtype)
    return buffer[101 : 101 + size].view(shape).copy_(torch.randn(shape, generator=generator))


def layer(rows, out_features, in_features, bias=True):
    generator = torch.Generator().manual_seed(rows + out_features + in_features)
    weight = inside((out_features, in_features), generator, torch.bfloat16)
    return inside((rows, in_features), generator), weight, inside((out_features,), generator) if bias else None


def assert_product(found, block, weight, bias):
    """At most twice the error of plain torch in float32, plus a few roundings."""
    expected = tile_linear_reference(block.double(), weight, None if bias is None else bias.double())
    plain = tile_linear_reference(block, weight, bias)
    rounding = torch.finfo(torch.float32).eps * block.shape[1] ** 0.5 * 4
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max() + rounding


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_linear_matches_the_oracle_and_reads_nothing_around(shape, bias, num_threads, way, threads):
    threads(num_threads)
    block, weight, start = layer(*shape, bias)
    assert way.serves(weight)
    assert_product(way.linear(block, weight, start), block, weight, start)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("in_features", LENGTHS)
def test_every_number_of_rows_of_every_length(num_rows, in_features, way):
    block, weight, bias = layer(num_rows, 50, in_features)
    assert_product(way.linear(block, weight, bias), block, weight, bias)


@pytest.mark.parametrize("num_rows", [1, 7, 25])
@pytest.mark.parametrize("in_features", [64, 1056])
def test_every_number_of_output_features(num_rows, in_features, way, threads):
    threads(2)
    for out_features in range(way.least_features, 67):
        block, weight, bias = layer(num_rows, out_features, in_features)
        assert_product(way.linear(block, weight, bias), block, weight, bias)
    assert not way.serves(weight[: way.least_features - 1])


@pytest.mark.parametrize("in_features", LENGTHS)
def test_a_row_of_a_block_has_the_same_bits_in_any_company(in_features, way, threads):
    block, weight, bias = layer(128, 90, in_features)
    whole = way.linear(block, weight, bias)
    for num_threads, some in enumerate((*SOME, *(list(range(count)) for count in ROWS), range(122, 128)), 1):
        threads(1 + num_threads % 5)
        assert torch.equal(way.linear(block[some], weight, bias), whole[some])


@pytest.mark.parametrize("num_rows", [1, 7, 25])
@pytest.mark.parametrize("in_features", [96, 1056])
def test_a_recorded_product_reads_its_rows_anew_and_writes_nothing_around(num_rows, in_features, way, threads):
    threads(2)
    block, weight, bias = layer(num_rows, 90, in_features)
    buffer = torch.full((num_rows + 4, 90), torch.nan)
    out, rows, product, tape = buffer[2:-2], block.clone(), way.product(weight, bias), Tape()
    with tape.recording():
        product.into(rows, out)
    for factor in (1, -3, 0.1):
        rows.copy_(block * factor)
        out.fill_(torch.nan)
        tape.run()
        assert torch.equal(out, way.linear(block * factor, weight, bias))
        assert torch.equal(out, product(block * factor))
    assert buffer[:2].isnan().all()
    assert buffer[-2:].isnan().all()


@pytest.mark.parametrize("in_features", [64, 1056])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38])
def test_what_is_no_number_in_a_row_stays_there(value, in_features, way):
    block, weight, _ = layer(13, 90, in_features)
    expected = way.linear(block, weight)
    block[5, 33] = value
    found = way.linear(block, weight)
    assert torch.equal(found[5].isnan(), tile_linear_reference(block, weight)[5].isnan())
    assert not found[5].isfinite().any()
    assert torch.equal(found[:5], expected[:5])
    assert torch.equal(found[6:], expected[6:])


def test_blocks_of_any_shape(way):
    block, weight, bias = layer(30, 90, 64)
    flat = way.linear(block, weight, bias)
    assert torch.equal(way.linear(block.view(2, 3, 5, 64), weight, bias), flat.view(2, 3, 5, 90))
    assert torch.equal(way.linear(block[::3], weight, bias), flat[::3])
    assert torch.equal(way.linear(block[4], weight, bias), flat[4])
    assert torch.equal(way.linear(block, weight, bias.repeat_interleave(2)[::2]), flat)


def test_linear_refuses_what_does_not_fit(way):
    weight = torch.randn(64, 64).bfloat16()
    refused = [weight.float(), weight[: way.least_features - 1], weight[:, :48], weight.T[::2].T, weight.half()]
    for block, wrong in (
        (torch.randn(3, 32), weight),
        (torch.randn(3, 64).bfloat16(), weight),
        (torch.randn(0, 64), weight),
        *((torch.randn(3, other.shape[1]), other) for other in refused),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            way.linear(block, wrong)
    for bias in (torch.randn(63), torch.randn(64).double()):
        with pytest.raises(ValueError, match="does not fit"):
            way.linear(torch.randn(3, 64), weight, bias)
    for other in refused:
        assert not way.serves(other)
        with pytest.raises(ValueError, match="not served"):
            way.product(other)


def test_tiles_come_before_products_of_pairs():
    assert dot_linear_serves(torch.randn(64, 64).bfloat16()) != segments.has_tiles()
