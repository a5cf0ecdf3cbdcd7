"""Tile products (AMX) against float64 oracles: attention and linear layers for a question's rows."""

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cag_kernels import (
    DensePrefix,
    choose_path,
    has_compiler,
    prefix_attention,
    quantize_prefix,
    segment_attention,
    segment_attention_reference,
    tile_linear,
    tile_linear_serves,
)
from cag_kernels.cpu.attention.segments import cpu_attention, cpu_attention_serves
from cag_kernels.linear import tile_linear_reference, tile_mlp_reference
from cag_kernels.rows_reference import ACTIVATIONS
from cag_kernels.tiled import tiled_attention

if has_compiler():
    from cag_kernels.cpu.products.tile_mlp import TileMlp, serves
    from cag_kernels.cpu.tape import Tape
    from cag_kernels.cpu.tiles import has_tiles
pytestmark = pytest.mark.skipif(
    not has_compiler() or not has_tiles(), reason="this processor has no tiles of bfloat16 (AMX)"
)

ATTENTION = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (9, 3, 64, 15, 1000),
    (9, 3, 64, 1, 3001),
    (9, 3, 64, 48, 63),
    (12, 2, 128, 15, 1000),
    (12, 2, 128, 1, 513),
    (8, 1, 256, 7, 63),
    (8, 1, 256, 1, 1),
    (4, 4, 96, 16, 512),
    (6, 2, 32, 37, 129),
    (10, 2, 160, 31, 2047),
]
LINEAR = [(1, 64, 32), (15, 576, 576), (16, 130, 64), (17, 77, 96), (33, 1000, 160), (128, 64, 1536), (3, 32, 1056)]
MLP = [
    (1, 64, 96, 64),
    (15, 576, 1536, 576),
    (16, 32, 32, 32),
    (17, 96, 160, 77),
    (40, 1056, 64, 1000),
    (128, 64, 96, 48),
]


def make(shape, seed=0):
    """A bfloat16 query; keys and values that are slices of larger buffers full of NaN."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator).bfloat16()
    buffers = torch.full((2, num_kv_heads, num_keys + 70, head_dim), torch.nan, dtype=torch.bfloat16)
    inside = buffers[:, :, 3 : 3 + num_keys]
    inside.copy_(torch.randn(inside.shape, generator=generator))
    return query, inside[0], inside[1]


def rounded_weights(query, keys, values, scale):
    """Plain torch with float32 scores whose weights are rounded to bfloat16: the precision that tiles have."""
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


@pytest.mark.parametrize("num_keys", [1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 511, 512, 513, 640])
def test_every_end_of_the_keys(num_keys):
    query, keys, values = make((6, 2, 64, 5, num_keys), seed=num_keys)
    assert_close(cpu_attention(query, keys, values, scale=0.2, offset=num_keys), query, keys, values, 0.2)


@pytest.mark.parametrize("num_queries", [1, 2, 5, 6, 10, 11, 16, 17, 32, 33, 48, 49, 80])
def test_every_number_of_vectors_of_rows(num_queries):
    query, keys, values = make((6, 2, 32, num_queries, 200), seed=num_queries)
    assert_close(cpu_attention(query, keys, values, scale=0.4, offset=200), query, keys, values, 0.4)


def test_huge_scores_neither_overflow_nor_lose_the_largest():
    query, keys, values = make((4, 2, 64, 15, 900))
    query, keys = query * 2.0**13, keys * 2.0**10
    out, lse = cpu_attention(query, keys, values, scale=8.0, offset=900)
    expected, expected_lse = segment_attention_reference(
        query.double(), keys.double(), values.double(), scale=8.0, offset=900
    )
    assert torch.allclose(out.double(), expected, atol=1e-3)
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-5)


def test_a_damaged_key_is_not_hidden():
    query, keys, values = make((4, 2, 64, 15, 900))
    keys[1, 700, 5] = torch.nan
    out, lse = cpu_attention(query, keys, values, scale=0.1, offset=900)
    assert torch.isnan(out[2:]).all()
    assert torch.isnan(lse[2:]).all()
    assert not torch.isnan(out[:2]).any()


def test_bits_do_not_depend_on_the_number_of_threads(threads):
    query, keys, values = make((9, 3, 64, 15, 2900))
    block, weight = torch.randn(15, 64), torch.randn(1000, 64).bfloat16()
    results = []
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        attention = cpu_attention(query, keys, values, scale=0.1, offset=2900)
        results.append((*attention, tile_linear(block, weight)))
    for result in results[1:]:
        assert all(torch.equal(found, first) for found, first in zip(result, results[0], strict=True))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_rows_bits_do_not_depend_on_its_company(num_threads, coded, threads):
    """Rows share vectors of 16 with others, at other places, and before and behind other vectors."""
    threads(num_threads)
    query, keys, values = make((9, 3, 64, 40, 2300))
    query[:, ::7] *= 8  # their maxima grow later and further
    prefix = quantize_prefix(keys, values, key_bits=8, value_bits=8) if coded else DensePrefix(keys, values)
    out, lse = prefix_attention(query, prefix, scale=0.2)
    for some in ([0], [39], [7, 8], list(range(5, 22)), list(range(1, 40, 2)), list(range(39, -1, -1))):
        found = prefix_attention(query[:, some], prefix, scale=0.2)
        assert torch.equal(found[0], out[:, some])
        assert torch.equal(found[1], lse[:, some])


def test_calls_from_several_python_threads(threads):
    threads(2)
    problems = [make((6, 2, 64, 9, 400 + seed), seed=seed) for seed in range(8)]
    alone = [cpu_attention(*problem, scale=0.1, offset=4000) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda problem: cpu_attention(*problem, scale=0.1, offset=4000), problems * 4))
    for index, found in enumerate(together):
        assert all(map(torch.equal, found, alone[index % len(problems)]))


def test_the_librarys_tiles_are_left_as_they_were(threads):
    """A library that configured tiles for itself finds its configuration again: its products keep their bits."""
    threads(1)
    left, right = torch.randn(200, 320).bfloat16(), torch.randn(320, 130).bfloat16()
    query, keys, values = make((4, 2, 64, 3, 200))
    before = left @ right
    for _ in range(3):
        cpu_attention(query, keys, values, scale=0.1, offset=200)
        assert torch.equal(left @ right, before)
        tile_linear(torch.randn(3, 64), torch.randn(64, 64).bfloat16())
        assert torch.equal(left @ right, before)


def test_score_caps_are_left_to_the_tiled_path():
    query, keys, values = make((4, 2, 64, 3, 200))
    found = segment_attention(query, keys, values, scale=0.1, offset=200, window=50, softcap=2.0)
    expected = tiled_attention(query, keys, values, scale=0.1, offset=200, window=50, softcap=2.0)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_linear_matches_the_oracle(shape, bias, num_threads, threads):
    threads(num_threads)
    rows, out_features, in_features = shape
    generator = torch.Generator().manual_seed(sum(shape))
    block = torch.randn(2, rows, in_features, generator=generator)[1]
    weight = torch.randn(out_features, in_features, generator=generator).bfloat16()
    start = torch.randn(out_features, generator=generator) if bias else None
    assert tile_linear_serves(weight)
    found = tile_linear(block, weight, start)
    expected = tile_linear_reference(block.double(), weight, None if start is None else start.double())
    plain = tile_linear_reference(block, weight, start)
    rounding = torch.finfo(torch.float32).eps * in_features**0.5 * 4
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max() + rounding


def test_linear_refuses_what_does_not_fit():
    weight = torch.randn(64, 64).bfloat16()
    for block, wrong in (
        (torch.randn(3, 32), weight),
        (torch.randn(3, 64).bfloat16(), weight),
        (torch.randn(0, 64), weight),
        (torch.randn(3, 64), weight.float()),
        (torch.randn(3, 64), weight[:16]),
        (torch.randn(3, 48), weight[:, :48]),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            tile_linear(block, wrong)
    with pytest.raises(ValueError, match="does not fit"):
        tile_linear(torch.randn(3, 64), weight, torch.randn(63))


def test_permission_was_asked_for():
    """Linux gives a process tiles on request only; whoever runs tiles has asked."""
    permitted = ctypes.c_uint64()
    arch_prctl, get_permitted = 158, 0x1022
    assert ctypes.CDLL(None).syscall(arch_prctl, get_permitted, ctypes.byref(permitted)) == 0
    assert permitted.value >> 18 & 1


def test_code_from_a_file_asks_for_permission_too():
    """A process that finds its code made emits nothing, and yet no tile may be its first."""
    text = (
        "import torch; from cag_kernels.cpu.attention import segments as cpu; q = torch.ones(3, 1, 64).bfloat16();"
        "k = torch.ones(1, 70, 64).bfloat16(); print(cpu.cpu_attention(q, k, k, scale=0.1, offset=70)[0].sum().item())"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert abs(float(done.stdout) - 3 * 64) < 1e-3 * 3 * 64


def mlp_of(shape):
    """Rows and weights whose gates are in the range of a network's."""
    num_rows, in_features, size, out_features = shape
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(num_rows, in_features, generator=generator)
    gate_and_up = torch.randn(2 * size, in_features, generator=generator) * 2 * in_features**-0.5
    return rows, gate_and_up.bfloat16(), torch.randn(out_features, size, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", MLP)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_middle_of_a_layer_matches_the_oracle(shape, num_threads, activation, threads):
    threads(num_threads)
    rows, gate_and_up, down = mlp_of(shape)
    assert serves(gate_and_up, down)
    found = TileMlp(gate_and_up, down, activation)(rows)
    expected = tile_mlp_reference(rows.double(), gate_and_up, down, activation)
    plain = tile_mlp_reference(rows, gate_and_up, down, activation)
    # a gated number next to the middle of two bfloat16 is rounded to the other one by the least difference before it
    steps = 2.0**-8 * (rows.double().abs().amax() + 1) * down.double().abs().amax()
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max() + steps
    assert (found.double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_any_size_and_no_number(activation):
    gate_and_up, down = torch.eye(32).repeat(2, 1).bfloat16(), torch.eye(32).bfloat16()
    values = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 87.0, -87.0, -90.0, 200.0, -200.0, 1e4, -1e4]
    rows = torch.diag(torch.tensor(values + [1.0] * 19))
    expected = ACTIVATIONS[activation](rows.double()) * rows.double()
    mlp = TileMlp(gate_and_up, down, activation)
    assert torch.allclose(mlp(rows).double(), expected, rtol=2.0**-7, atol=1e-29)
    rows[5, 5] = torch.nan
    assert torch.isnan(mlp(rows)[5]).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5, 70])
def test_the_middle_of_a_layer_has_the_same_bits_recorded_by_any_threads_and_among_any_rows(num_threads, threads):
    rows, gate_and_up, down = mlp_of((40, 576, 1536, 576))
    mlp = TileMlp(gate_and_up, down)
    threads(1)
    expected = mlp(rows)
    threads(num_threads)
    assert torch.equal(mlp(rows), expected)
    for first, last in ((0, 1), (3, 19), (3, 20), (39, 40)):
        assert torch.equal(mlp(rows[first:last].contiguous()), expected[first:last])
    tape, out = Tape(), torch.empty_like(expected)
    with tape.recording():
        mlp.into(rows, out)
    for _ in range(3):
        out.fill_(torch.nan)
        tape.run()
        assert torch.equal(out, expected)


def test_the_middle_of_a_layer_refuses_what_it_does_not_compute():
    gate_and_up, down = torch.randn(128, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    assert serves(gate_and_up, down)
    assert not serves(gate_and_up[:96], down)
    assert not serves(gate_and_up[:, :48], down)
    assert not serves(gate_and_up, down[:, :48])
    assert not serves(torch.randn(96, 64).bfloat16(), torch.randn(64, 48).bfloat16())
