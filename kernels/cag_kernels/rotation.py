"""Keys moved to other positions: a rotary embedding (RoPE) turns by angles that grow with the position, so moving a key
by some tokens turns it further by that many steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.device import triton_serves

PAIRINGS = ("halves", "adjacent")


def move_keys(keys: Tensor, distances: Tensor, inverse_frequencies: Tensor, *, pairing: str = "halves") -> Tensor:
    """Keys as they would be at other positions; see `move_keys_reference`. Nothing is changed.

    Raises:
        ValueError: tensors that do not fit together, or an unknown pairing.
    """
    _check(keys, distances, inverse_frequencies, pairing)
    if not triton_serves(keys):
        return move_keys_reference(keys, distances, inverse_frequencies, pairing=pairing)
    from cag_kernels.triton.rotation import rotate

    return rotate(keys, *angles(distances, inverse_frequencies), pairing)


def move_keys_reference(
    keys: Tensor, distances: Tensor, inverse_frequencies: Tensor, *, pairing: str = "halves"
) -> Tensor:
    """`a' = a cos - b sin`, `b' = b cos + a sin` with `angle = distance * inverse_frequency` for each pair `(a, b)`.

    Args:
        keys: `[num_kv_heads, num_tokens, head_dim]`, after RoPE, as they are at their old positions.
        distances: integers `[num_tokens]`, new minus old position of each token.
        inverse_frequencies: `[num_pairs]`, radians a token; at most half as many as channels, further channels stay as
            they are.
        pairing: "halves" turns channel `i` with `i + num_pairs` (Llama, Qwen), "adjacent" `2 i` with `2 i + 1` (GPT-J).

    Returns:
        New keys in the dtype of the old; cosines and sines are computed in double precision, products in float32
        (float64 for float64 keys).

    Source: RoFormer, arXiv:2104.09864.
    """
    dtype = torch.promote_types(keys.dtype, torch.float32)
    return move_by(keys.to(dtype), *angles(distances, inverse_frequencies, dtype), pairing).to(keys.dtype)


def move_by(keys: Tensor, cosines: Tensor, sines: Tensor, pairing: str) -> Tensor:
    """New keys, each pair of channels turned by its angle `[num_tokens, num_pairs]`; all of one dtype."""
    num_pairs = cosines.shape[1]
    moved, channels = keys.clone(), torch.arange(2 * num_pairs, device=keys.device)
    pairs = channels.view(2, num_pairs) if pairing == "halves" else channels.view(num_pairs, 2).t()
    first, second = keys[..., pairs[0]], keys[..., pairs[1]]
    moved[..., pairs[0]] = first * cosines - second * sines
    moved[..., pairs[1]] = second * cosines + first * sines
    return moved


def angles(distances: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[num_tokens, num_pairs]`, computed in double precision and rounded to `dtype`."""
    turned = distances.double()[:, None] * inverse_frequencies.double()[None, :]
    return turned.cos().to(dtype), turned.sin().to(dtype)


def _check(keys: Tensor, distances: Tensor, inverse_frequencies: Tensor, pairing: str) -> None:
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing is {pairing!r}, not one of {', '.join(PAIRINGS)}")
    fits = keys.ndim == 3 and distances.shape == keys.shape[1:2] and inverse_frequencies.ndim == 1
    if not fits or 2 * inverse_frequencies.shape[0] > keys.shape[2] or distances.is_floating_point():
        raise ValueError(
            f"keys {tuple(keys.shape)}, distances {distances.dtype} {tuple(distances.shape)} and inverse frequencies "
            f"{tuple(inverse_frequencies.shape)} do not fit each other"
        )
