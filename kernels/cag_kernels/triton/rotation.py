"""Triton kernel of `rotation.move_keys`.

`a' = a cos - b sin`, `b' = b cos + a sin`. Grid: `(blocks of tokens, key/value heads)`. Computes in float32, rounds
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.triton.numbers import converted, rounded

BLOCK_TOKENS = 32


@triton.jit
def turn(
    keys, cosines, sines, out, num_tokens, head_stride, token_stride,
    head_dim: tl.constexpr, num_pairs: tl.constexpr, block_dim: tl.constexpr, step: tl.constexpr,
    partner: tl.constexpr, block_tokens: tl.constexpr,
):  # fmt: skip
    """Turn pair `i` of a block of tokens, channels `i * step` and `i * step + partner`; copy the channels behind."""
    tokens, channels = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens), tl.arange(0, block_dim)
    is_token, head = (tokens < num_tokens)[:, None], tl.program_id(1).to(tl.int64)
    read = keys + head * head_stride + tokens[:, None].to(tl.int64) * token_stride
    write = out + (head * num_tokens + tokens[:, None]) * head_dim
    mask = is_token & (channels < num_pairs)[None, :]
    place = tokens[:, None] * num_pairs + channels[None, :]
    cosine, sine = tl.load(cosines + place, mask=mask, other=0.0), tl.load(sines + place, mask=mask, other=0.0)
    one = channels[None, :] * step
    first = converted(tl.load(read + one, mask=mask, other=0.0), tl.float32)
    second = converted(tl.load(read + one + partner, mask=mask, other=0.0), tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(write + one, rounded(first * cosine - second * sine, dtype), mask=mask)
    tl.store(write + one + partner, rounded(second * cosine + first * sine, dtype), mask=mask)
    rest = 2 * num_pairs + channels[None, :]
    mask = is_token & (rest < head_dim)
    tl.store(write + rest, tl.load(read + rest, mask=mask, other=0.0), mask=mask)


def rotate(keys: Tensor, cosines: Tensor, sines: Tensor, pairing: str) -> Tensor:
    """New keys, contiguous; `cosines`, `sines` are float32 `[num_tokens, num_pairs]`, contiguous."""
    num_kv_heads, num_tokens, head_dim = keys.shape
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    out = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    num_pairs = cosines.shape[1]
    step, partner = (1, num_pairs) if pairing == "halves" else (2, 1)
    if num_tokens:
        turn[(triton.cdiv(num_tokens, BLOCK_TOKENS), num_kv_heads)](
            keys, cosines, sines, out, num_tokens, *keys.stride()[:2], head_dim=head_dim, num_pairs=num_pairs,
            block_dim=triton.next_power_of_2(head_dim), step=step, partner=partner, block_tokens=BLOCK_TOKENS,
        )  # fmt: skip
    return out
