"""The public op and its dispatch: which path serves a call is decided from dtypes, device and sizes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.blocks import TRIANGLE_TOKENS, block_attention, blocks_serve
from cag_kernels.cpu.attention.segments import cpu_attention, cpu_attention_serves
from cag_kernels.cpu.processor import has_compiler, has_dots, has_tiles
from cag_kernels.flash import fused_attention, fused_serves, has_flash_attn
from cag_kernels.tiled import TILE_TOKENS, tiled_attention

FUSED_MIN_ROWS = 128  # rows of query a key/value head from which converting the keys whole pays; see docs/log.md
DEVICE_SCORES = 1 << 24  # of a tile on a GPU, 64 MiB in float32, unless rows alone make more
COMPILED_MAX_ROWS = 512  # rows a key/value head up to which the compiled path is the quickest; see docs/log.md


def segment_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    offset: int,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries over one segment of keys and values; see `reference.segment_attention_reference`.

    Keys and values are borrowed and never changed.

    Raises:
        ValueError: shapes that do not fit together, or keys and values of two types.
    """
    _check_shapes(query, keys, values, offset)
    path = choose_path(query, keys, window=window, softcap=softcap, offset=offset)
    if path == "compiled":
        window = _binding(window, offset + query.shape[1])
        return cpu_attention(query, keys, values, scale=scale, offset=offset, window=window)
    if path == "blocks":
        window = _binding(window, offset + query.shape[1])
        return block_attention(query, keys, values, scale=scale, offset=offset, window=window)
    if path == "fused":
        return fused_attention(query, keys, values, scale=scale, offset=offset)
    tile_tokens = TILE_TOKENS if query.device.type == "cpu" else _device_tile(query.shape[0] * query.shape[1])
    return tiled_attention(
        query, keys, values, scale=scale, offset=offset, window=window, softcap=softcap, tile_tokens=tile_tokens
    )


def _device_tile(num_rows: int) -> int:
    """Keys of a tile where launches cost more than memory: as many as make a bounded matrix of scores."""
    return max(TILE_TOKENS, DEVICE_SCORES // num_rows // TILE_TOKENS * TILE_TOKENS)


def choose_path(query: Tensor, keys: Tensor, *, window: int | None, softcap: float | None, offset: int) -> str:
    """`"compiled"`, `"blocks"`, `"fused"` or `"tiled"` for a call with these tensors."""
    num_queries, num_keys = query.shape[1], keys.shape[1]
    if softcap is not None or query.dtype == torch.float64:
        return "tiled"
    rows = query.shape[0] // keys.shape[0] * num_queries
    if offset >= num_keys - 1 and rows <= COMPILED_MAX_ROWS and cpu_attention_serves(query, keys):
        return "compiled"
    ends = offset >= num_keys - 1 or offset + num_queries == num_keys
    if ends and num_queries > TRIANGLE_TOKENS and blocks_serve(query, keys):
        return "blocks"
    if _binding(window, offset + num_queries) is not None:
        return "tiled"
    if not fused_serves(query):
        return "tiled"
    if not ends:
        return "tiled"
    return "fused" if query.dtype == keys.dtype or rows >= FUSED_MIN_ROWS else "tiled"


def _binding(window: int | None, num_tokens: int) -> int | None:
    """The window, or None where it reaches back to the first of so many tokens for every query."""
    return None if window is not None and num_tokens <= window else window


def available_paths(device: torch.device) -> dict[str, str]:
    """What serves each path on `device`, for reports: path name -> implementation."""
    if device.type == "cuda":
        fused = "flash-attn" if has_flash_attn() else "torch scaled_dot_product flash attention"
    else:
        fused = "torch CPU flash attention"
    paths = {"fused": fused, "tiled": "torch, tiles of keys with an online softmax"}
    if device.type == "cpu" and has_compiler():
        paths["compiled"] = "LLVM code for this processor, sliding windows too, few float32 rows over keys in any type"
        if has_tiles():
            paths["compiled"] += ", and few bfloat16 rows by tiles (AMX)"
        elif has_dots():
            paths["compiled"] += ", and bfloat16 rows by products of pairs (AVX512_BF16)"
            paths["blocks"] = f"compiled, the last {TRIANGLE_TOKENS} tokens by {fused}"
    return paths


def _check_shapes(query: Tensor, keys: Tensor, values: Tensor, offset: int) -> None:
    if query.ndim != 3 or keys.ndim != 3 or keys.shape != values.shape or query.shape[2] != keys.shape[2]:
        shapes = f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
        raise ValueError(f"expected [heads, tokens, head_dim] with one head_dim, found {shapes}")
    if keys.dtype != values.dtype:
        raise ValueError(f"expected keys and values of one type, found {keys.dtype} and {values.dtype}")
    if keys.shape[0] == 0 or query.shape[0] % keys.shape[0]:
        raise ValueError(f"{query.shape[0]} query heads are no multiple of {keys.shape[0]} key/value heads")
    if offset < 0:
        raise ValueError(f"offset is {offset}; queries cannot stand before the segment")
