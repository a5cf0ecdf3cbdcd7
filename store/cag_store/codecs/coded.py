"""Keys or values of a layer as codes with scales and offsets: what a reader may keep in place of decoded numbers.

A codec of groups (`int8`, `int4`) can hand out its segments like this, so that memory takes the codec's bytes and
whoever attends dequantizes what it reads. Knows shapes and arrays only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cag_store.dtypes import Array


class CodedShape(NamedTuple):
    """Sizes of a `CodedSide` of `num_kv_heads` heads: `num_coded` tokens have codes, the first `num_first` of them are
    exact besides, and `num_recent` tokens behind them are exact only."""

    num_kv_heads: int
    head_dim: int
    num_coded: int
    num_first: int
    num_recent: int
    bits: int
    group_tokens: int
    group_channels: int
    grouped_along: str

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.num_coded + self.num_recent

    def kept_from(self, token: int) -> CodedShape:
        """Of a side without its first tokens: whole groups, and all that are exact besides codes, or none."""
        if token == 0:
            return self
        left = max(self.num_coded - token, 0)
        recent = min(self.num_recent, self.num_tokens - token)
        return self._replace(num_coded=left, num_first=max(self.num_first - token, 0), num_recent=recent)

    @property
    def shapes(self) -> CodedShapes:
        """Shapes of the arrays of a side."""
        return _shapes(self)


class CodedShapes(NamedTuple):
    """Shapes of the arrays of a `CodedSide`, in its order."""

    codes: tuple[int, int, int]
    scales: tuple[int, int, int]
    offsets: tuple[int, int, int]
    first: tuple[int, int, int]
    recent: tuple[int, int, int]


@lru_cache(maxsize=64)
def _shapes(side: CodedShape) -> CodedShapes:
    """See `CodedShape.shapes`; the layers of a model have few."""
    heads, tokens, width = side.num_kv_heads, side.num_coded, side.head_dim
    by_token = (heads, -(-tokens // side.group_tokens), width)
    by_channel = (heads, tokens, -(-width // side.group_channels))
    groups = by_token if side.grouped_along == "tokens" else by_channel
    codes = (heads, tokens, width * side.bits // 8)
    return CodedShapes(codes, groups, groups, (heads, side.num_first, width), (heads, side.num_recent, width))


class CodedSide(NamedTuple):
    """Writable arrays, `x ~ code * scale + offset`.

    codes: `[num_kv_heads, num_coded, row_bytes]`, int8 of 8 bits or uint8 of 4 (docs/format.md 5.3). scales, offsets:
    bfloat16 bit patterns, of keys `[num_kv_heads, num_groups, head_dim]`, of values `[num_kv_heads, num_coded,
    num_channel_groups]`. first, recent: storage dtype, `[num_kv_heads, num_first (num_recent), head_dim]`.
    """

    codes: Array
    scales: Array
    offsets: Array
    first: Array
    recent: Array

    def fits(self, shape: CodedShape, dtype: np.dtype[np.generic]) -> bool:
        """Whether these are the arrays of a shape."""
        code_dtype = np.dtype(np.int8 if shape.bits == 8 else np.uint8)
        dtypes = (code_dtype, np.dtype(np.uint16), np.dtype(np.uint16), dtype, dtype)
        found = [(array.shape, array.dtype, array.flags.writeable) for array in self]
        return found == [(size, kind, True) for size, kind in zip(shape.shapes, dtypes, strict=True)]
