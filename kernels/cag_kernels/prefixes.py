"""What attention reads: an immutable prefix, as numbers or as codes, and the tails of many sessions in pages.

Tensors and sizes only. All tensors of one tuple lie on one device; nobody changes those of a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 32  # of a tail, that compiled code on a CPU takes at a time; its pages hold a multiple of it
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class DensePrefix(NamedTuple):
    """Keys after RoPE and values as they are, `[num_kv_heads, num_tokens, head_dim]`, the last axis contiguous."""

    keys: Tensor
    values: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return self.keys.shape[1]


class Codes(NamedTuple):
    """How a prefix is kept: bits of keys' and values' codes (8 or 4), tokens of a group of keys, channels of a group
    of values."""

    key_bits: int
    value_bits: int
    group_tokens: int
    group_channels: int

    def row_bytes(self, head_dim: int) -> tuple[int, int]:
        """Bytes of a token's codes, of the key and of the value."""
        return head_dim * self.key_bits // 8, head_dim * self.value_bits // 8


class QuantizedPrefix(NamedTuple):
    """Codes with scales and offsets, `x ~ code * scale + offset`; the first tokens are kept exact.

    key_codes, value_codes: with 8 bits int8 `[num_kv_heads, num_tokens, head_dim]`; with 4 bits, codes 0 to 15, uint8
        `[num_kv_heads, num_tokens, head_dim / 2]`, channel `i` in the low and channel `i + head_dim / 2` in the high
        nibble of byte `i`. The last axis is contiguous. Keys and values may differ in bits.
    key_scales, key_offsets: bfloat16 `[num_kv_heads, num_groups, head_dim]`; group `g` begins at token
        `g * group_tokens`, the last one may be shorter.
    value_scales, value_offsets: bfloat16 `[num_kv_heads, num_tokens, num_channel_groups]`; group `g` begins at channel
        `g * group_channels`, the last one may be narrower.
    exact_keys, exact_values: `[num_kv_heads, num_exact, head_dim]`: the first tokens; their codes are not looked at.
    group_tokens: a multiple of 16.
    group_channels: from 1 to head_dim.
    """

    key_codes: Tensor
    key_scales: Tensor
    key_offsets: Tensor
    value_codes: Tensor
    value_scales: Tensor
    value_offsets: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    group_tokens: int
    group_channels: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, exact ones included."""
        return self.key_codes.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self if isinstance(part, Tensor))


Prefix = DensePrefix | QuantizedPrefix
Prefixes = Prefix | Sequence[Prefix]
"""One prefix in one piece, or in pieces that follow each other."""


def pieces_of(prefix: Prefixes | None) -> tuple[Prefix, ...]:
    """The pieces of a prefix, in order; none of None."""
    if prefix is None:
        return ()
    return (prefix,) if isinstance(prefix, DensePrefix | QuantizedPrefix) else tuple(prefix)


class PagedTails(NamedTuple):
    """Each session's own keys and values behind the prefix, in pages of a pool that all sessions share.

    keys, values: `[num_pages, num_kv_heads, page_tokens, head_dim]`, the last axis contiguous.
    pages: int32 `[num_sessions, max_pages]`: a session's pages in order; entries behind its last one do not matter.
    lengths: int32 `[num_sessions]`: tokens of each tail, those of the present queries included.
    query_starts: int32 `[num_sessions + 1]`: session `s` asks queries `[query_starts[s], query_starts[s + 1])`, which
        are the last tokens of its tail.
    max_queries: the most queries of one session.
    """

    keys: Tensor
    values: Tensor
    pages: Tensor
    lengths: Tensor
    query_starts: Tensor
    max_queries: int


def check_prefix(prefix: Prefix, head_dim: int) -> None:
    """Raises: ValueError for tensors that do not fit together, or not a query of `head_dim`."""
    if isinstance(prefix, DensePrefix):
        fits = prefix.keys.ndim == 3 and prefix.keys.shape == prefix.values.shape
        fits = fits and prefix.keys.shape[2] == head_dim and prefix.keys.dtype in FLOATS
        fits = fits and prefix.values.dtype == prefix.keys.dtype
        parts = [prefix.keys, prefix.values]
    else:
        fits = _codes_fit(prefix, head_dim)
        parts = [part for part in prefix if isinstance(part, Tensor)]
    if not fits or len({part.device for part in parts}) != 1 or any(part.stride(-1) != 1 for part in parts):
        shapes = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        raise ValueError(f"parts of a prefix do not fit each other or a head_dim of {head_dim}: {shapes}")


def code_bits(codes: Tensor) -> int:
    """Bits of a code: 8 in int8, 4 in uint8."""
    return 8 if codes.dtype == torch.int8 else 4


def _codes_fit(prefix: QuantizedPrefix, head_dim: int) -> bool:
    if prefix.key_codes.ndim != 3 or prefix.group_tokens < 16 or not 0 < prefix.group_channels <= head_dim:
        return False
    num_heads, num_tokens, _ = prefix.key_codes.shape
    num_groups = -(-num_tokens // prefix.group_tokens)
    channel_groups = -(-head_dim // prefix.group_channels)
    num_exact = prefix.exact_keys.shape[1]
    expected = [
        _codes_like(prefix.key_codes, num_heads, num_tokens, head_dim),
        *[(torch.bfloat16, (num_heads, num_groups, head_dim))] * 2,
        _codes_like(prefix.value_codes, num_heads, num_tokens, head_dim),
        *[(torch.bfloat16, (num_heads, num_tokens, channel_groups))] * 2,
        *[(prefix.exact_keys.dtype, (num_heads, num_exact, head_dim))] * 2,
    ]
    return (
        [(part.dtype, tuple(part.shape)) for part in prefix[:8]] == expected
        and head_dim % 2 == 0
        and prefix.group_tokens % 16 == 0
        and num_exact <= num_tokens
        and prefix.exact_keys.dtype in FLOATS
        and all(part.is_contiguous() for part in (*prefix[1:3], *prefix[4:8]))
    )


def _codes_like(codes: Tensor, num_heads: int, num_tokens: int, head_dim: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """What codes of as many bits must be."""
    if code_bits(codes) == 8:
        return torch.int8, (num_heads, num_tokens, head_dim)
    return torch.uint8, (num_heads, num_tokens, head_dim // 2)


def check_tails(tails: PagedTails, query: Tensor) -> None:
    """Raises: ValueError for tensors that do not fit together or to `query [num_q_heads, num_queries, head_dim]`."""
    num_sessions = tails.lengths.shape[0]
    fits = (
        tails.keys.ndim == 4
        and tails.keys.shape == tails.values.shape
        and tails.keys.dtype == tails.values.dtype
        and tails.keys.shape[3] == query.shape[2]
        and query.shape[0] % tails.keys.shape[1] == 0
        and tails.pages.ndim == 2
        and tails.pages.shape[0] == num_sessions
        and tails.query_starts.shape == (num_sessions + 1,)
        and all(part.dtype == torch.int32 for part in (tails.pages, tails.lengths, tails.query_starts))
        and all(part.device == query.device for part in tails[:5])
        and tails.keys.stride(3) == tails.values.stride(3) == tails.pages.stride(1) == 1
        and 0 < tails.max_queries <= max(1, query.shape[1])
    )
    if not fits:
        shapes = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in tails[:5])
        raise ValueError(f"parts of the tails do not fit each other or a query {tuple(query.shape)}: {shapes}")
