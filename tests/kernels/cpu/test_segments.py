"""The compiled path against the float64 oracle, its choice, its independence of threads and of leftovers in memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cag_kernels import attention as dispatch
from cag_kernels import available_paths, choose_path, segment_attention, segment_attention_reference
from cag_kernels.cpu import threads as cpu_threads
from cag_kernels.cpu.attention import segments as cpu
from cag_kernels.cpu.attention.segments import attention_kernel, cpu_attention, cpu_attention_serves, warm_up

pytest.importorskip("llvmlite")
from cag_kernels.cpu.attention.panel import Blocking
from cag_kernels.cpu.tape import Tape

SHAPES = [  # num_q_heads, num_kv_heads, head_dim, num_queries, num_keys
    (9, 3, 64, 15, 1000),
    (9, 3, 64, 1, 3001),
    (9, 3, 64, 48, 63),
    (12, 2, 128, 15, 1000),
    (12, 2, 128, 1, 513),
    (8, 1, 256, 7, 63),
    (8, 1, 256, 1, 1),
    (4, 4, 96, 16, 512),
    (4, 4, 96, 1, 1000),
    (10, 2, 80, 31, 3001),
    (10, 2, 80, 2, 7),
    (7, 1, 16, 11, 129),
]
OTHERS = [torch.float16, torch.float32]  # types of keys and values besides bfloat16


def make(shape, seed=0, kept=torch.bfloat16):
    """A float32 query; keys and values in a type that are slices of larger buffers full of NaN."""
    num_q_heads, num_kv_heads, head_dim, num_queries, num_keys = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_q_heads, num_queries, head_dim, generator=generator)
    buffers = torch.full((2, num_kv_heads, num_keys + 70, head_dim), torch.nan, dtype=kept)
    inside = buffers[:, :, 3 : 3 + num_keys]
    inside.copy_(torch.randn(inside.shape, generator=generator))
    return query, inside[0], inside[1]


def assert_close(found, query, keys, values, scale):
    """Error against the float64 oracle at most twice that of the plain reference in float32, plus a few roundings."""
    kwargs = {"scale": scale, "offset": keys.shape[1]}
    expected = segment_attention_reference(query.double(), keys.double(), values.double(), **kwargs)
    plain = segment_attention_reference(query, keys, values, **kwargs)
    for got, want, ordinary in zip(found, expected, plain, strict=True):
        assert got.shape == want.shape
        assert got.dtype == torch.float32
        spacing = torch.finfo(torch.float32).eps * want.abs().max().clamp_min(1.0)
        bound = 2 * (ordinary.double() - want).abs().max() + 4 * spacing
        assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_matches_oracle_and_reads_nothing_around_the_keys(shape, num_threads, threads):
    threads(num_threads)
    query, keys, values = make(shape)
    found = cpu_attention(query, keys, values, scale=shape[2] ** -0.5, offset=keys.shape[1])
    assert_close(found, query, keys, values, shape[2] ** -0.5)


@pytest.mark.parametrize("kept", OTHERS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[7], SHAPES[9], SHAPES[11]])
def test_keys_of_other_types(shape, kept):
    query, keys, values = make(shape, kept=kept)
    assert choose_path(query, keys, window=None, softcap=None, offset=keys.shape[1]) == "compiled"
    found = cpu_attention(query, keys, values, scale=shape[2] ** -0.5, offset=keys.shape[1])
    assert_close(found, query, keys, values, shape[2] ** -0.5)


@pytest.mark.parametrize("num_queries", [1, 2, 5, 6, 10, 11, 13, 16, 21, 26, 32, 37, 48])
def test_every_number_of_vectors_of_rows(num_queries):
    query, keys, values = make((6, 2, 32, num_queries, 100), seed=num_queries)
    assert_close(cpu_attention(query, keys, values, scale=0.4, offset=100), query, keys, values, 0.4)


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("head_dim", [16, 128])
def test_every_group_of_a_single_query(group, head_dim):
    query, keys, values = make((2 * group, 2, head_dim, 1, 85), seed=group)
    assert_close(cpu_attention(query, keys, values, scale=0.2, offset=85), query, keys, values, 0.2)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(2, 2), (3, 1), (8, 2), (9, 3), (16, 2)])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 128, 256])
def test_a_query_has_the_same_bits_alone_and_in_company(num_q_heads, num_kv_heads, head_dim, kept=torch.bfloat16):
    """A single one of few rows has code of its own."""
    query, keys, values = make((num_q_heads, num_kv_heads, head_dim, 7, 1077), kept=kept)
    out, lse = cpu_attention(query, keys, values, scale=0.2, offset=1077)
    for index in range(query.shape[1]):
        own = cpu_attention(query[:, index : index + 1], keys, values, scale=0.2, offset=1077)
        assert torch.equal(own[0], out[:, index : index + 1])
        assert torch.equal(own[1], lse[:, index : index + 1])


@pytest.mark.parametrize("kept", OTHERS)
@pytest.mark.parametrize("head_dim", [32, 48, 128])
def test_a_query_over_keys_of_other_types_has_the_same_bits_alone_and_in_company(head_dim, kept):
    test_a_query_has_the_same_bits_alone_and_in_company(9, 3, head_dim, kept)


@pytest.mark.parametrize("kept", OTHERS)
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("lanes", [8, 16])
def test_keys_of_other_types_in_vectors_of_any_width(lanes, num_queries, kept, monkeypatch):
    query, keys, values = make((6, 2, 48, num_queries, 777), kept=kept)
    kernel = attention_kernel(48, Blocking(lanes, lanes // 2), 3 if num_queries == 1 else None, kept=kept)
    monkeypatch.setattr(cpu, "compiled_kernel", lambda *_which: kernel)
    assert_close(cpu_attention(query, keys, values, scale=0.2, offset=777), query, keys, values, 0.2)


@pytest.mark.parametrize("num_queries", [1, 15])
def test_keys_smaller_than_normal_float16_are_not_lost(num_queries):
    query, keys, values = make((4, 2, 64, num_queries, 300), kept=torch.float16)
    keys, values = keys * 2.0**-20, values * 2.0**-20
    assert keys.abs().max() < torch.finfo(torch.float16).tiny
    found = cpu_attention(query * 2.0**20, keys, values, scale=0.125, offset=300)
    assert_close(found, query * 2.0**20, keys, values, 0.125)
    expected = segment_attention_reference(
        query.double() * 2.0**20, keys.double(), values.double(), scale=0.125, offset=300
    )
    assert (found[0].double() - expected[0]).abs().max() <= 1e-5 * expected[0].abs().max()


@pytest.mark.parametrize("num_queries", [1, 2, 9])
@pytest.mark.parametrize("blocking", [Blocking(8, 4), Blocking(8, 8), Blocking(16, 8, tile=32, range_tokens=96)])
def test_other_processors_blocking(blocking, num_queries, monkeypatch):
    """Vectors of eight, as on a processor without AVX-512, and other cuts of the work."""
    query, keys, values = make((6, 2, 64, num_queries, 777))
    few_rows = 3 if num_queries == 1 else None
    kernel = attention_kernel(64, blocking, few_rows)
    monkeypatch.setattr(cpu, "compiled_kernel", lambda *_which: kernel)
    found = cpu_attention(query, keys, values, scale=0.2, offset=777)
    assert_close(found, query, keys, values, 0.2)
    tape = Tape()
    with tape.recording():
        recorded = cpu_attention(query, keys, values, scale=0.2, offset=777)
    for _ in range(2):
        for part in recorded:
            part.fill_(torch.nan)
        tape.run()
        assert all(map(torch.equal, recorded, found))


@pytest.mark.parametrize("num_queries", [1, 15])
def test_huge_scores_neither_overflow_nor_lose_the_largest(num_queries):
    query, keys, values = make((4, 2, 64, num_queries, 900))
    out, lse = cpu_attention(query * 1e4, keys * 1e3, values, scale=10.0, offset=900)
    expected, expected_lse = segment_attention_reference(
        query.double() * 1e4, (keys * 1e3).double(), values.double(), scale=10.0, offset=900
    )
    assert torch.allclose(out.double(), expected, atol=1e-6)
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 15])
def test_a_damaged_key_is_not_hidden(num_queries):
    query, keys, values = make((4, 2, 64, num_queries, 900))
    keys[1, 700, 5] = torch.nan
    out, lse = cpu_attention(query, keys, values, scale=0.1, offset=900)
    assert torch.isnan(out[2:]).all()
    assert torch.isnan(lse[2:]).all()
    assert not torch.isnan(out[:2]).any()


@pytest.mark.parametrize("num_queries", [1, 15])
def test_bits_do_not_depend_on_the_number_of_threads(num_queries, threads):
    query, keys, values = make((9, 3, 64, num_queries, 2900))
    results = []
    for num_threads in (1, 2, 3, 5):
        threads(num_threads)
        results.append(cpu_attention(query, keys, values, scale=0.1, offset=2900))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_threads_of_python_where_there_is_no_openmp_of_gnu(monkeypatch, threads):
    threads(3)
    query, keys, values = make((9, 3, 64, 15, 1500))
    expected = cpu_attention(query, keys, values, scale=0.1, offset=1500)
    monkeypatch.setattr(cpu_threads, "openmp_parallel", lambda: None)
    found = cpu_attention(query, keys, values, scale=0.1, offset=1500)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_calls_of_several_python_threads_at_once():
    inputs = [make((9, 3, 64, 1 + seed, 700 + 100 * seed), seed) for seed in range(6)]
    expected = [cpu_attention(*tensors, scale=0.1, offset=5000) for tensors in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensors: cpu_attention(*tensors, scale=0.1, offset=5000), inputs * 10))
    for index, (out, lse) in enumerate(found):
        assert torch.equal(out, expected[index % 6][0])
        assert torch.equal(lse, expected[index % 6][1])


def test_scratch_of_inference_mode_serves_later_calls():
    query, keys, values = make((9, 3, 64, 15, 4000))
    with torch.inference_mode():
        expected = cpu_attention(query, keys, values, scale=0.1, offset=4000)
    found = cpu_attention(query, keys, values, scale=0.1, offset=4000)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_values_with_other_strides():
    query, keys, values = make((4, 2, 64, 3, 50))
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(cpu_attention(query, keys, turned, scale=0.1, offset=50), query, keys, values, 0.1)


def test_what_is_not_served():
    query, keys, _ = make((4, 2, 64, 3, 50))
    assert cpu_attention_serves(query, keys)
    assert not cpu_attention_serves(query.double(), keys)
    assert not cpu_attention_serves(query, keys.double())
    assert not cpu_attention_serves(query.bfloat16(), keys.half())
    assert not cpu_attention_serves(query.bfloat16(), keys.float())
    assert not cpu_attention_serves(query, keys[:, ::2])
    assert not cpu_attention_serves(query, keys[:, :0])
    assert not cpu_attention_serves(query[..., :40], keys[..., :40])
    assert not cpu_attention_serves(query.clone().requires_grad_(), keys)


def test_dispatch(monkeypatch):
    query, keys, values = make((9, 3, 64, 7, 131))
    plain = {"window": None, "softcap": None, "offset": 131}
    assert choose_path(query, keys, **plain) == "compiled"
    assert choose_path(query, keys, **{**plain, "offset": 124}) == "tiled"
    assert choose_path(query, keys, **{**plain, "softcap": 3.0}) == "tiled"
    assert choose_path(query, keys, **{**plain, "window": 9}) == "compiled"
    assert choose_path(query, keys, **{**plain, "window": 9, "offset": 124}) == "tiled"
    assert "compiled" in available_paths(torch.device("cpu"))
    assert "compiled" not in available_paths(torch.device("cuda"))
    found = segment_attention(query, keys, values, scale=0.1, offset=131)
    assert torch.equal(found[0], cpu_attention(query, keys, values, scale=0.1, offset=131)[0])
    monkeypatch.setattr(cpu, "has_compiler", lambda: False)
    monkeypatch.setattr(dispatch, "has_compiler", lambda: False)
    assert choose_path(query, keys, **plain) == "tiled"
    assert "compiled" not in available_paths(torch.device("cpu"))
    found = segment_attention(query, keys, values, scale=0.1, offset=131)
    assert_close(found, query, keys, values, 0.1)


def test_warm_up_takes_any_head_dimension():
    warm_up([64, 40, 1024], group_sizes=[3, 100])
    assert cpu.compiled_kernel(64) is cpu.compiled_kernel(64)
