"""From the integer codes of a joint transform back to the keys or values of one layer (docs/format.md 5.4, "Values").

An exact integer product, then one scale and mean a channel, the rotation of keys, and rounding: the same bits wherever
it is computed. Entropy decoding stands before it and is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.device import MAX_HEAD_DIM, triton_runs_on
from cag_kernels.prefixes import FLOATS
from cag_kernels.quantize import narrowed_to
from cag_kernels.rotation import PAIRINGS, move_by


def inverse_transform(
    codes: Tensor,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype,
    angles: tuple[Tensor, Tensor] | None = None,
    pairing: str = "halves",
) -> Tensor:
    """Keys or values of one layer; see `inverse_transform_reference`.

    Raises:
        ValueError: tensors that do not fit together.
    """
    _check(codes, rows, scale, mean, head_dim, dtype, angles, pairing)
    if not triton_runs_on(codes.device) or head_dim > MAX_HEAD_DIM:
        return inverse_transform_reference(
            codes, rows, scale, mean, head_dim=head_dim, dtype=dtype, angles=angles, pairing=pairing
        )
    from cag_kernels.triton_inverse import invert

    return invert(codes, rows, scale, mean, angles, head_dim, dtype, pairing)


def inverse_transform_reference(
    codes: Tensor,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype,
    angles: tuple[Tensor, Tensor] | None = None,
    pairing: str = "halves",
) -> Tensor:
    """`(codes @ rows modulo 2**32) * scale + mean`, turned by the angles, each operation rounded to float32.

    Args:
        codes: int16 `[num_tokens, num_components]`, any strides: transposed as `rans.decode_segments` gives them.
        rows: int16 `[num_components, num_kv_heads * head_dim]`, the layer's channels.
        scale, mean: float32 `[num_kv_heads * head_dim]`.
        head_dim: even.
        dtype: of the result: bfloat16 (halves away from zero), float16 (no infinities) or float32.
        angles: cosines and sines float32 `[num_tokens, num_pairs]` (`rotation.angles`), None for values.
        pairing: as in `rotation.move_keys_reference`.

    Returns:
        `[num_kv_heads, num_tokens, head_dim]`.
    """
    exact = codes.double() @ rows.double()  # each sum is below 2**53
    sums = exact.long().to(torch.int32)  # keeps the lower 32 bits
    values = (sums.float() * scale + mean).reshape(len(codes), rows.shape[1] // head_dim, head_dim).transpose(0, 1)
    if angles is not None:
        values = move_by(values, *angles, pairing)
    return narrowed_to(values.contiguous(), dtype)


def _check(
    codes: Tensor,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    head_dim: int,
    dtype: torch.dtype,
    angles: tuple[Tensor, Tensor] | None,
    pairing: str,
) -> None:
    num_channels = rows.shape[-1]
    turned = [] if angles is None else list(angles)
    fits = (
        codes.ndim == rows.ndim == 2
        and codes.dtype == rows.dtype == torch.int16
        and codes.shape[1] == rows.shape[0]
        and scale.shape == mean.shape == (num_channels,)
        and all(part.dtype == torch.float32 for part in (scale, mean, *turned))
        and head_dim > 0
        and head_dim % 2 == 0
        and num_channels % head_dim == 0
        and all(part.ndim == 2 and part.shape == turned[0].shape for part in turned)
        and all(part.shape[0] == codes.shape[0] and 2 * part.shape[1] <= head_dim for part in turned)
    )
    if not fits or dtype not in FLOATS or pairing not in PAIRINGS:
        raise ValueError(
            f"codes {codes.dtype} {tuple(codes.shape)} and rows {rows.dtype} {tuple(rows.shape)} do not fit each "
            f"other, a head_dim of {head_dim}, scales, means, angles, {dtype} or {pairing!r}"
        )
