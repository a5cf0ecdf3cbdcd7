"""The compiled steps of a decoder layer against plain torch in float64."""

import math

import numpy as np
import pytest
import torch

from cag_kernels import rows_reference
from cag_kernels.cpu import rows as cpu_rows

ROWS = [1, 2, 7, 16, 33]


def normal(*shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))) * scale


def assert_close(found, expected, in_float32):
    """At most twice the error of the same formula in float32, or float32's rounding of the largest number."""
    rounding = 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert (found.double() - expected).abs().max() <= 2 * (in_float32.double() - expected).abs().max() + rounding


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", [1, 32, 577])
def test_add_and_norm(num_rows, size):
    hidden, update, weight = normal(num_rows, size), normal(num_rows, size, scale=3), normal(size)
    expected = rows_reference.add_and_norm_reference(hidden.double(), update.double(), weight.double(), 1e-5)
    plain = rows_reference.add_and_norm_reference(hidden, update, weight, 1e-5)
    out = torch.full_like(hidden, math.nan)
    cpu_rows.add_and_norm(hidden.numpy(), update.numpy(), weight.numpy(), 1e-5, out.numpy())
    assert_close(hidden, expected[0], plain[0])
    assert_close(out, expected[1], plain[1])


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", [1, 32, 577])
def test_updates_that_are_normalized_before_they_are_added(num_rows, size):
    hidden, update = normal(num_rows, size), normal(num_rows, size, scale=30)
    behind, weight = normal(size), normal(size)
    added = rows_reference.add_normed_reference(hidden.double(), update.double(), behind.double(), 1e-6)
    plain = rows_reference.add_normed_reference(hidden, update, behind, 1e-6)
    only_added, summed, out = hidden.clone(), hidden.clone(), torch.full_like(hidden, math.nan)
    cpu_rows.add_normed(only_added.numpy(), update.numpy(), behind.numpy(), 1e-6)
    assert_close(only_added, added, plain)
    arrays = [tensor.numpy() for tensor in (summed, update, behind, weight, out)]
    cpu_rows.add_normed_and_norm(*arrays[:3], 1e-6, arrays[3], 1e-5, arrays[4])
    assert_close(summed, added, plain)
    normed = rows_reference.head_norm_reference(added, weight.double(), 1e-5)
    assert_close(out, normed, rows_reference.head_norm_reference(plain, weight, 1e-5))


def test_head_norm_touches_its_heads_only():
    projected, weight = normal(5, 96), normal(16)
    before = projected.clone()
    cpu_rows.head_norm(projected.numpy(), 32, 2, weight.numpy(), 1e-6)
    heads = before[:, 32:64].reshape(5, 2, 16)
    expected = rows_reference.head_norm_reference(heads.double(), weight.double(), 1e-6)
    in_float32 = rows_reference.head_norm_reference(heads, weight, 1e-6)
    assert_close(projected[:, 32:64].reshape(5, 2, 16), expected, in_float32)
    assert torch.equal(projected[:, :32], before[:, :32])
    assert torch.equal(projected[:, 64:], before[:, 64:])


STEPS = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}  # from 1 to the next number


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rotate_and_store_in_other_types(dtype):
    test_rotate_and_store(7, (9, 3), 64, dtype)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (2, 1)])
@pytest.mark.parametrize("head_dim", [2, 64, 96])
def test_rotate_and_store(num_rows, heads, head_dim, dtype=torch.bfloat16):
    num_q_heads, num_kv_heads = heads
    page_tokens, num_pages = 4, num_rows + 2
    projected = normal(num_rows, (num_q_heads + 2 * num_kv_heads) * head_dim)
    angles = normal(num_rows, head_dim // 2)
    cosines, sines = torch.cat([angles.cos()] * 2, dim=1), torch.cat([angles.sin()] * 2, dim=1)
    query = torch.full((num_q_heads, num_rows, head_dim), math.nan)
    pool = torch.zeros(2, num_pages, num_kv_heads, page_tokens, head_dim, dtype=dtype)
    order = torch.randperm(num_pages * page_tokens, generator=torch.Generator().manual_seed(num_rows))[:num_rows]
    pages, places = (order // page_tokens).numpy(), (order % page_tokens).numpy()
    arrays = (query.numpy(), *map(cpu_rows.kept_numbers, pool))
    cpu_rows.rotate_and_store(projected.numpy(), cosines.numpy(), sines.numpy(), *arrays, pages, places)
    by_head = projected.view(num_rows, -1, head_dim).transpose(0, 1)
    turned = rows_reference.rotate_reference(by_head, cosines, sines)
    exact = rows_reference.rotate_reference(by_head.double(), cosines.double(), sines.double())
    assert_close(query, exact[:num_q_heads], turned[:num_q_heads])
    keys, values = (side.transpose(1, 2).flatten(0, 1) for side in pool)  # [tokens of all pages, heads, head_dim]
    expected = exact[num_q_heads : num_q_heads + num_kv_heads]
    step = expected.abs().clamp_min(1e-30).log2().floor().exp2() * STEPS[dtype]  # distance of neighbours
    assert ((keys[order].transpose(0, 1).double() - expected).abs() <= 0.5 * step + 1e-6).all()
    assert torch.equal(values[order].transpose(0, 1), by_head[num_q_heads + num_kv_heads :].to(dtype))
    for tensor in (keys, values):
        untouched = torch.ones(len(tensor), dtype=torch.bool)
        untouched[order] = False
        assert not tensor[untouched].any()


def test_rounding_to_float16_is_torchs_own():
    """Ties, numbers too small to be normal, and such as are too large."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1 << 14, generator=generator) * 2.0 ** torch.randint(-28, 18, (1 << 14,), generator=generator)
    halves = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].float().sort().values
    numbers = torch.cat([numbers, halves, (halves[1:] + halves[:-1]) / 2])  # each and what lies between two
    numbers = numbers[: len(numbers) // 64 * 64].view(-1, 64)
    projected = torch.cat([torch.zeros(len(numbers), 128), numbers], dim=1)
    query, angles = torch.empty(1, len(numbers), 64), torch.zeros(len(numbers), 64)
    keys, values = (torch.zeros(1, 1, len(numbers), 64, dtype=torch.float16) for _ in range(2))
    pages, places = np.zeros(len(numbers), np.int64), np.arange(len(numbers))
    pool = cpu_rows.kept_numbers(keys), cpu_rows.kept_numbers(values)
    arrays = projected.numpy(), angles.numpy(), angles.numpy(), query.numpy()
    cpu_rows.rotate_and_store(*arrays, *pool, pages, places)
    assert torch.equal(values[0, 0].view(torch.int16), numbers.half().view(torch.int16))


def test_rounding_is_torchs_own():
    patterns = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32)
    numbers = torch.from_numpy(patterns.view(np.float32)[np.isfinite(patterns.view(np.float32))])
    found = np.array([cpu_rows.narrowed(number) for number in numbers.numpy()], dtype=np.uint16)
    assert torch.equal(torch.from_numpy(found).view(torch.bfloat16), numbers.bfloat16())


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("activation", rows_reference.ACTIVATIONS)
def test_gate(num_rows, activation):
    projected = normal(num_rows, 154, scale=20)
    projected[0, :5] = torch.tensor([-200.0, 200.0, 0.0, -88.0, -4.5])
    out = torch.full((num_rows, 77), math.nan)
    cpu_rows.GATES[activation](projected.numpy(), out.numpy())
    expected = rows_reference.gate_reference(projected.double(), activation)
    assert_close(out, expected, rows_reference.gate_reference(projected, activation))


@pytest.mark.parametrize("activation", rows_reference.ACTIVATIONS)
def test_gates_of_any_size(activation):
    """Beyond where an exponential, or a cube, is a float32."""
    projected = torch.tensor([[1e-30, -1e-30, 90.0, -90.0, 1e10, -1e10, 1e20, -1e20]]).repeat(1, 2)
    projected[:, 8:] = 1.0
    out = torch.full((1, 8), math.nan)
    cpu_rows.GATES[activation](projected.numpy(), out.numpy())
    expected = rows_reference.gate_reference(projected.double(), activation).float()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-17)


def test_exponential_is_as_good_as_float32():
    numbers = np.linspace(-87, 87, 20_001, dtype=np.float32)
    found = np.array([cpu_rows.exponential(number) for number in numbers])
    expected = np.exp(numbers.astype(np.float64))
    # half a unit of the last place, and what rounding the argument's product with log2(e) costs
    assert np.max(np.abs(found / expected - 1) / (1 + np.abs(numbers))) < 2e-7
