"""The steps between products against the float64 oracle, and the public operations against the kernels."""

import pytest
import torch

from cag_kernels.rows import add_and_norm, gate, rotate_and_store, rotate_and_store_reference
from cag_kernels.rows_reference import add_and_norm_reference, gate_reference
from cag_kernels.triton.rows import add_and_norm_on_device, gate_on_device, rotate_and_store_on_device
from oracle import normal

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_rounded(found, expected, dtype, roundings=1.0):
    """Within the roundings of a dtype, and of float32 sums behind them."""
    bound = roundings * torch.finfo(dtype).eps * expected.abs().clamp_min(1e-3) + 1e-5 * expected.abs().max()
    assert ((found.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 130])
@pytest.mark.parametrize("has_update", [True, False])
def test_add_and_norm(device, dtype, size, has_update):
    residual, weight = normal(5, size), normal(size)
    update = normal(5, size, dtype=dtype, seed=1) if has_update else None
    kept = residual.clone().to(device)
    moved = None if update is None else update.to(device)
    found = add_and_norm_on_device(kept, moved, weight.to(device), 1e-5, dtype)
    added, expected = add_and_norm_reference(
        residual.double(), update.double() if has_update else 0.0, weight.double(), 1e-5
    )
    assert_rounded(kept, added, torch.float32, 2)
    assert found.dtype == dtype
    assert_rounded(found, expected, dtype)
    public = residual.clone()
    assert_rounded(add_and_norm(public, update, weight, 1e-5, dtype), expected, dtype)
    torch.testing.assert_close(public, kept.cpu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, head_dim", [((4, 2), 64), ((3, 1), 96)])
@pytest.mark.parametrize("norms", [(False, False), (True, True)])
def test_rotate_and_store(device, dtype, heads, head_dim, norms):
    num_q_heads, num_kv_heads = heads
    projected = normal(3, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = normal(3, head_dim // 2).repeat(1, 2)
    rotation = angles.cos().contiguous(), angles.sin().contiguous()
    weights = tuple(normal(head_dim, seed=index) if norm else None for index, norm in enumerate(norms))
    pages, places = torch.tensor([4, 1, 4]), torch.tensor([7, 0, 2])
    pool = torch.full((2, 5, num_kv_heads, 8, head_dim), torch.nan, dtype=dtype)
    expected_pool = pool.double()
    expected = rotate_and_store_reference(
        projected.double(), [part.double() for part in rotation], tuple(expected_pool), (pages, places),
        tuple(None if weight is None else weight.double() for weight in weights), 1e-6,
    )  # fmt: skip
    on_device = [[None if part is None else part.to(device) for part in parts] for parts in (rotation, weights)]
    filled = pool.clone().to(device)
    found = rotate_and_store_on_device(
        projected.to(device), on_device[0], tuple(filled), (pages.to(device), places.to(device)), on_device[1], 1e-6
    )
    assert found.dtype == dtype
    assert found.shape == (num_q_heads, 3, head_dim)
    assert_rounded(found, expected, dtype, 2)
    written = ~torch.isnan(expected_pool)
    assert torch.equal(written, ~torch.isnan(filled.cpu()))
    assert written.sum() == 2 * 3 * num_kv_heads * head_dim
    assert_rounded(filled.cpu()[written], expected_pool[written], dtype, 2)
    public = pool.clone()
    queries = rotate_and_store(projected, rotation, tuple(public), (pages, places), weights, 1e-6)
    assert_rounded(queries, expected, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(device, dtype):
    projected = normal(3, 2 * 1100, dtype=dtype, scale=4.0)
    expected = gate_reference(projected.double())
    assert_rounded(gate_on_device(projected.to(device)), expected, dtype)
    assert_rounded(gate(projected), expected, dtype)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        add_and_norm(torch.zeros(2, 8), torch.zeros(2, 7), torch.ones(8), 0.0, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        add_and_norm(torch.zeros(2, 8), None, torch.ones(7), 0.0, torch.float32)
    with pytest.raises(ValueError, match="do not fit pages"):
        pool, places = torch.zeros(2, 1, 1, 4, 8), torch.zeros(2, dtype=torch.int64)
        rotate_and_store(torch.zeros(2, 16), (torch.ones(2, 8),) * 2, tuple(pool), (places, places))
    with pytest.raises(ValueError, match="even length"):
        gate(torch.zeros(2, 7))
