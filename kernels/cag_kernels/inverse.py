"""From the integer codes of a joint transform back to the keys or values of one layer (docs/format.md 5.4, "Values").

An exact integer product, then one scale and mean a channel, the rotation of keys, and rounding: the same bits wherever
it is computed. Entropy decoding stands before it and is not here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.device import triton_runs_on
from cag_kernels.prefixes import FLOATS
from cag_kernels.quantize import narrowed_to
from cag_kernels.rans import CodeBlocks
from cag_kernels.rotation import PAIRINGS, move_by


def inverse_transform(
    codes: Tensor | CodeBlocks,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype,
    mean_of: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    pairing: str = "halves",
    out: Tensor | None = None,
) -> Tensor:
    """Keys or values of one layer, or of several with the same angles; see `inverse_transform_reference`. Codes also as
    `rans.decode_segments` gives them. `out` is where to put them, each head's tokens side by side.

    Raises:
        ValueError: tensors that do not fit together.
    """
    _check(codes, rows, scale, mean, head_dim, dtype, mean_of, angles, pairing)
    if not triton_runs_on(rows.device):
        codes = codes.by_token() if isinstance(codes, CodeBlocks) else codes
        found = inverse_transform_reference(
            codes, rows, scale, mean, head_dim=head_dim, dtype=dtype, mean_of=mean_of, angles=angles, pairing=pairing
        )
        return found if out is None else out.copy_(found)
    from cag_kernels.triton.inverse import invert, operands

    num_tokens = codes.num_tokens if isinstance(codes, CodeBlocks) else len(codes)
    shape = rows.shape[1] // head_dim, num_tokens, head_dim
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=rows.device)
    elif out.shape != shape or out.dtype != dtype or out.stride()[1:] != (head_dim, 1):
        raise ValueError(f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}: {shape} of {dtype} do not fit there")
    return invert(*operands(codes, rows, angles, head_dim, pairing), scale, mean, mean_of, angles, out)


def inverse_transform_reference(
    codes: Tensor,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    *,
    head_dim: int,
    dtype: torch.dtype,
    mean_of: Tensor | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    pairing: str = "halves",
) -> Tensor:
    """`(codes @ rows modulo 2**32) * scale + mean`, turned by the angles, each operation rounded to float32.

    Args:
        codes: int16 `[num_tokens, num_components]`, any strides.
        rows: int16 `[num_components, num_heads * head_dim]`, the channels of a layer, or of several.
        scale: float32 `[num_heads * head_dim]`.
        mean: float32 `[num_heads * head_dim]`, or `[num_means, num_heads * head_dim]` with `mean_of`.
        head_dim: even.
        dtype: of the result: bfloat16 (halves away from zero), float16 (no infinities) or float32.
        mean_of: int32 `[num_tokens]`, which of the means each token has.
        angles: cosines and sines float32 `[num_tokens, num_pairs]` (`rotation.angles`), None for values.
        pairing: as in `rotation.move_keys_reference`.

    Returns:
        `[num_heads, num_tokens, head_dim]`.
    """
    exact = codes.double() @ rows.double()  # each sum is below 2**53
    sums = exact.long().to(torch.int32)  # keeps the lower 32 bits
    values = sums.float() * scale + (mean if mean_of is None else mean[mean_of.long()])
    values = values.reshape(len(codes), rows.shape[1] // head_dim, head_dim).transpose(0, 1)
    if angles is not None:
        values = move_by(values, *angles, pairing)
    return narrowed_to(values.contiguous(), dtype)


def _check(
    codes: Tensor | CodeBlocks,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    head_dim: int,
    dtype: torch.dtype,
    mean_of: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    pairing: str,
) -> None:
    in_blocks = isinstance(codes, CodeBlocks)
    numbers = codes.blocks if isinstance(codes, CodeBlocks) else codes
    num_tokens = codes.num_tokens if isinstance(codes, CodeBlocks) else len(codes)
    turned, num_channels = [] if angles is None else list(angles), rows.shape[-1]
    means = (num_channels,) if mean_of is None else (mean.shape[0], num_channels)
    fits = (
        numbers.ndim == 2 + in_blocks
        and rows.ndim == 2
        and numbers.dtype == rows.dtype == torch.int16
        and numbers.shape[1] == rows.shape[0]
        and scale.shape == (num_channels,)
        and mean.shape == means
        and (mean_of is None or (mean_of.shape == (num_tokens,) and mean_of.dtype == torch.int32))
        and all(part.dtype == torch.float32 for part in (scale, mean, *turned))
        and head_dim > 0
        and head_dim % 2 == 0
        and num_channels % head_dim == 0
        and all(part.ndim == 2 and part.shape == turned[0].shape for part in turned)
        and all(part.shape[0] == num_tokens and 2 * part.shape[1] <= head_dim for part in turned)
    )
    if not fits or dtype not in FLOATS or pairing not in PAIRINGS:
        raise ValueError(
            f"codes {numbers.dtype} {tuple(numbers.shape)} and rows {rows.dtype} {tuple(rows.shape)} do not fit each "
            f"other, a head_dim of {head_dim}, scales, means, angles, {dtype} or {pairing!r}"
        )
