"""The small steps between the products of a decoder layer, each in one launch on a CUDA device: residual and norm,
rotation and storing, gating.

A network does them with some thirty operators a layer, which for few rows cost more than the products do. Each public
operation stands beside its reference, which serves everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.device import triton_runs_on
from cag_kernels.rows_reference import add_and_norm_reference, gate_reference, head_norm_reference, rotate_reference


def add_and_norm(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    ahead: Tensor | None = None,
) -> Tensor:
    """`residual += update`, and its RMS norm times `weight`, computed in float32 and rounded once.

    Args:
        residual: float32 `[num_rows, size]`, contiguous; changed in place.
        update: `[num_rows, size]` in any dtype, contiguous, or None for nothing.
        weight: float32 `[size]`.
        epsilon: added to the mean square.
        dtype: of the result.
        ahead: weight `[out_features, in_features]` of the product that follows; a device may call some of it into its
            cache meanwhile.

    Returns:
        `[num_rows, size]`.

    Raises:
        ValueError: tensors that do not fit together.
    """
    like = residual if update is None else update
    if residual.dtype != torch.float32 or weight.dtype != torch.float32 or like.shape != residual.shape:
        raise ValueError(f"a residual {residual.dtype} {tuple(residual.shape)} does not fit {tuple(like.shape)}")
    if weight.shape != residual.shape[1:] or not residual.is_contiguous() or not like.is_contiguous():
        raise ValueError(f"rows {tuple(residual.shape)} do not fit a weight {tuple(weight.shape)}, or have gaps")
    if triton_runs_on(residual.device):
        from cag_kernels.triton.rows import add_and_norm_on_device

        return add_and_norm_on_device(residual, update, weight, epsilon, dtype, ahead)
    added, normed = add_and_norm_reference(
        residual, residual.new_zeros(()) if update is None else update, weight, epsilon
    )
    residual.copy_(added)
    return normed.to(dtype)


def rotate_and_store(
    projected: Tensor,
    rotation: tuple[Tensor, Tensor],
    sides: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    epsilon: float = 0.0,
) -> Tensor:
    """Turn queries and keys, put keys and values into pages; computed in float32 and rounded once.

    Args:
        projected: `[num_rows, (num_q_heads + 2 * num_kv_heads) * head_dim]`, contiguous: queries, keys, values.
        rotation: cosines and sines, float32 `[num_rows, head_dim]`, contiguous; the second half repeats the first,
            pairs stand half a head apart.
        sides: keys and values `[num_pages, num_kv_heads, page_tokens, head_dim]` of one dtype; written to.
        places: page and place in it of each row, int64 `[num_rows]` each.
        norms: weights float32 `[head_dim]` of RMS norms of each head of query and key before they are turned, or None.
        epsilon: of these norms.

    Returns:
        The queries `[num_q_heads, num_rows, head_dim]` in the dtype of `projected`, rows side by side in memory.

    Raises:
        ValueError: tensors that do not fit together.
    """
    num_kv_heads, head_dim = sides[0].shape[1], sides[0].shape[3]
    num_heads, rest = divmod(projected.shape[1], head_dim)
    fits = rest == 0 and num_heads > 2 * num_kv_heads and projected.is_contiguous() and sides[0].shape == sides[1].shape
    fits = fits and sides[0].stride() == sides[1].stride() and sides[0].stride(3) == 1 and head_dim % 2 == 0
    fits = fits and all(part.shape == (projected.shape[0], head_dim) for part in rotation)
    fits = fits and all(part.shape == projected.shape[:1] and part.dtype == torch.int64 for part in places)
    if not fits:
        raise ValueError(f"projected rows {tuple(projected.shape)} do not fit pages {tuple(sides[0].shape)}")
    if triton_runs_on(projected.device):
        from cag_kernels.triton.rows import rotate_and_store_on_device

        return rotate_and_store_on_device(projected, rotation, sides, places, norms, epsilon)
    return rotate_and_store_reference(projected, rotation, sides, places, norms, epsilon)


def rotate_and_store_reference(
    projected: Tensor,
    rotation: tuple[Tensor, Tensor],
    sides: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    epsilon: float = 0.0,
) -> Tensor:
    """As `rotate_and_store`; computes in float32, in float64 where `projected` has it."""
    num_kv_heads, head_dim = sides[0].shape[1], sides[0].shape[3]
    num_heads = projected.shape[1] // head_dim
    heads = projected.to(torch.promote_types(projected.dtype, torch.float32)).view(
        projected.shape[0], num_heads, head_dim
    )
    query, keys, values = torch.split(heads.transpose(0, 1), [num_heads - 2 * num_kv_heads, num_kv_heads, num_kv_heads])
    query, keys = (
        part if weight is None else head_norm_reference(part, weight, epsilon)
        for part, weight in zip((query, keys), norms, strict=True)
    )
    pages, rows = places
    for side, new in zip(sides, (rotate_reference(keys, *rotation), values), strict=True):
        side[pages, :, rows] = new.transpose(0, 1).to(side.dtype)
    return rotate_reference(query, *rotation).to(projected.dtype)


def gate(projected: Tensor, ahead: Tensor | None = None) -> Tensor:
    """`silu(left) * right` of the halves of `[num_rows, 2 * size]`, contiguous; in float32, rounded once.

    `ahead`: as in `add_and_norm`.

    Raises:
        ValueError: rows with gaps, or of odd length.
    """
    if projected.ndim != 2 or projected.shape[1] % 2 or not projected.is_contiguous():
        raise ValueError(f"expected contiguous rows of even length, found {tuple(projected.shape)}")
    if triton_runs_on(projected.device):
        from cag_kernels.triton.rows import gate_on_device

        return gate_on_device(projected, ahead)
    return gate_reference(projected.float()).to(projected.dtype)
