"""What `cag bench kernels` measures on a CUDA device: the operations on prefixes in the shape of Llama 3.1 8B.

Random keys and values; sizes in, cases out. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cag_bench.kernel_case import KernelCase, relative_error
from cag_bench.kernel_clock import Work
from cag_kernels import (
    DensePrefix,
    PagedTails,
    QuantizedPrefix,
    RansSegments,
    RansSide,
    cascade_attention,
    count_blocks,
    decode_segments,
    dequantize_prefix,
    inverse_transform,
    merge_segments,
    move_keys,
    prefix_attention,
    quantize_prefix,
    segment_attention,
)
from cag_kernels.flash import fused_attention
from cag_kernels.inverse import inverse_transform_reference
from cag_kernels.prefix_reference import cascade_attention_reference, prefix_attention_reference
from cag_kernels.rans import LANES, decode_segments_reference

PAGE_TOKENS = 16
COMPONENTS_PER_CHANNEL = 0.6  # of a layer's channels, what the codec `transform` keeps at a mild step
KINDS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int8": {"key_bits": 8, "value_bits": 8, "group_channels": 256},
    "int4": {"key_bits": 4, "value_bits": 4, "group_channels": 64},
}
MAX_ERROR = 0.03  # of the largest number: bfloat16 rounds by 0.004 at each of a few places


@dataclass(frozen=True)
class GpuSizes:
    """One layer's sizes; `tail_tokens` is what each session has behind the prefix."""

    device: torch.device
    num_tokens: int
    sessions: Sequence[int]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    question_tokens: int = 32
    tail_tokens: int = 256
    chunk_tokens: int = 512
    num_sides: int = 12  # keys and values of 6 groups of layers, decoded at once


def gpu_cases(sizes: GpuSizes) -> Iterator[KernelCase]:
    """All cases, made one after the other: each kind of prefix lives only while its cases run."""
    torch.manual_seed(0)
    shape = (2, sizes.num_kv_heads, sizes.num_tokens, sizes.head_dim)
    plain = DensePrefix(*torch.randn(shape, dtype=torch.bfloat16, device=sizes.device))
    for kind, codes in KINDS.items():
        prefix = plain if codes is None else quantize_prefix(*plain, **codes)
        for num_queries in (*sizes.sessions, sizes.question_tokens):
            yield _prefix_case(kind, sizes, plain, prefix, num_queries)
        for num_sessions in sizes.sessions:
            yield _cascade_case(kind, sizes, plain, prefix, num_sessions)
        if isinstance(prefix, QuantizedPrefix):
            yield _quantize_case(kind, sizes, plain, codes or {}, prefix)
            yield _dequantize_case(kind, sizes, prefix)
    yield _move_case(sizes, plain.keys)
    yield _inverse_case(sizes)
    yield _entropy_case(sizes)


def _query(sizes: GpuSizes, num_queries: int) -> Tensor:
    shape = (sizes.num_q_heads, num_queries, sizes.head_dim)
    return torch.randn(shape, dtype=torch.bfloat16, device=sizes.device)


def _bytes(*operands: Any) -> int:
    """Bytes of all tensors in tuples of them."""
    return sum(part.nbytes if isinstance(part, Tensor) else _bytes(*part) for part in operands if not _is_size(part))


def _is_size(part: Any) -> bool:
    return isinstance(part, int)


def _prefix_case(
    kind: str, sizes: GpuSizes, plain: DensePrefix, prefix: DensePrefix | QuantizedPrefix, num_queries: int
) -> KernelCase:
    """One query token of each of `num_queries` sessions, or a question of as many tokens: it is the same work."""
    query, scale = _query(sizes, num_queries), sizes.head_dim**-0.5
    attend = partial(prefix_attention, query, prefix, scale=scale)

    def error() -> float:
        expected, _ = prefix_attention_reference(query[:, :1].float(), prefix, scale=scale)
        return relative_error(attend()[0][:, :1], expected)

    arms = {
        f"prefix_attention {kind}": attend,
        "fused bf16": partial(fused_attention, query, *plain, scale=scale, offset=sizes.num_tokens),
    }
    shape = {"num_tokens": sizes.num_tokens, "num_queries": num_queries}
    moved = _bytes(query, prefix) + query.numel() * 4  # the result is float32
    return KernelCase(f"prefix attention, {kind}", shape, moved, arms, error, MAX_ERROR)


def _make_tails(sizes: GpuSizes, num_sessions: int) -> PagedTails:
    num_pages = -(-sizes.tail_tokens // PAGE_TOKENS)
    pool = (2, num_sessions * num_pages, sizes.num_kv_heads, PAGE_TOKENS, sizes.head_dim)
    pages = torch.randperm(num_sessions * num_pages, device=sizes.device).int().view(num_sessions, num_pages)
    lengths = torch.full((num_sessions,), sizes.tail_tokens, dtype=torch.int32, device=sizes.device)
    starts = torch.arange(num_sessions + 1, dtype=torch.int32, device=sizes.device)
    keys, values = torch.randn(pool, dtype=torch.bfloat16, device=sizes.device)
    return PagedTails(keys, values, pages, lengths, starts, 1)


def _cascade_case(
    kind: str, sizes: GpuSizes, plain: DensePrefix, prefix: DensePrefix | QuantizedPrefix, num_sessions: int
) -> KernelCase:
    """A decoding step of all sessions; the reference attends for each session apart, over bfloat16."""
    query, tails, scale = _query(sizes, num_sessions), _make_tails(sizes, num_sessions), sizes.head_dim**-0.5
    attend = partial(cascade_attention, query, prefix, tails, scale=scale)

    def error() -> float:
        first = tails._replace(pages=tails.pages[:1], lengths=tails.lengths[:1], query_starts=tails.query_starts[:2])
        expected = cascade_attention_reference(query[:, :1].float(), prefix, first, scale=scale)
        return relative_error(attend()[:, :1], expected)

    tail_shape = (sizes.num_kv_heads, sizes.tail_tokens, sizes.head_dim)
    tail = torch.randn(2, *tail_shape, dtype=torch.bfloat16, device=sizes.device)

    def apart() -> None:
        for session in range(num_sessions):
            own = query[:, session : session + 1]
            parts = [(plain.keys, plain.values), (tail[0], tail[1])]
            merge_segments([segment_attention(own, *sides, scale=scale, offset=sides[0].shape[1]) for sides in parts])

    shape = {"num_tokens": sizes.num_tokens, "num_sessions": num_sessions, "tail_tokens": sizes.tail_tokens}
    arms: dict[str, Work] = {f"cascade_attention {kind}": attend, "bf16, session by session": apart}
    moved = _bytes(query, prefix, tails) + query.nbytes
    return KernelCase(f"cascade attention, {kind}", shape, moved, arms, error, MAX_ERROR)


def _quantize_case(
    kind: str, sizes: GpuSizes, plain: DensePrefix, codes: dict[str, Any], prefix: QuantizedPrefix
) -> KernelCase:
    def error() -> float:
        tokens = slice(0, 512)
        few = quantize_prefix(*(side[:, tokens].cpu() for side in plain), **codes)
        same = [
            torch.equal(few.key_codes, prefix.key_codes[:, tokens].cpu()),
            torch.equal(few.value_codes, prefix.value_codes[:, tokens].cpu()),
            torch.equal(few.value_scales, prefix.value_scales[:, tokens].cpu()),
        ]
        return 0.0 if all(same) else 1.0

    arms = {f"quantize_prefix {kind}": partial(quantize_prefix, *plain, **codes)}
    shape = {"num_tokens": sizes.num_tokens}
    return KernelCase(f"quantize, {kind}", shape, _bytes(plain, prefix), arms, error, 0.0)


def _dequantize_case(kind: str, sizes: GpuSizes, prefix: QuantizedPrefix) -> KernelCase:
    def error() -> float:
        expected = dequantize_prefix(prefix._replace(**_first_tokens(prefix, 512)), torch.float64)
        found = dequantize_prefix(prefix, torch.bfloat16)
        return max(relative_error(side[:, :512], want) for side, want in zip(found, expected, strict=True))

    arms = {f"dequantize_prefix {kind}": partial(dequantize_prefix, prefix, torch.bfloat16)}
    moved = _bytes(prefix) + 4 * sizes.num_kv_heads * sizes.num_tokens * sizes.head_dim
    return KernelCase(f"dequantize, {kind}", {"num_tokens": sizes.num_tokens}, moved, arms, error, MAX_ERROR)


def _first_tokens(prefix: QuantizedPrefix, num_tokens: int) -> dict[str, Any]:
    names = ("key_codes", "value_codes", "value_scales", "value_offsets")
    parts = {name: getattr(prefix, name)[:, :num_tokens].contiguous() for name in names}
    num_groups = -(-num_tokens // prefix.group_tokens)
    return parts | {name: getattr(prefix, name)[:, :num_groups].contiguous() for name in ("key_scales", "key_offsets")}


def _move_case(sizes: GpuSizes, keys: Tensor) -> KernelCase:
    distances = torch.full((sizes.num_tokens,), 4096, device=sizes.device)
    frequencies = 500_000.0 ** (-torch.arange(sizes.head_dim // 2, device=sizes.device) * 2 / sizes.head_dim)

    def error() -> float:
        expected = move_keys(keys[:, :512].double(), distances[:512], frequencies)
        return relative_error(move_keys(keys, distances, frequencies)[:, :512], expected)

    arms = {"move_keys": partial(move_keys, keys, distances, frequencies)}
    return KernelCase("move keys", {"num_tokens": sizes.num_tokens}, 2 * keys.nbytes, arms, error, MAX_ERROR)


def _inverse_case(sizes: GpuSizes) -> KernelCase:
    """One layer's keys from their codes: what the codec `transform` does behind its entropy decoder."""
    num_channels, dtype = sizes.num_kv_heads * sizes.head_dim, torch.bfloat16
    shape = (sizes.num_tokens, round(num_channels * COMPONENTS_PER_CHANNEL))
    codes = torch.randint(-64, 64, shape, dtype=torch.int16, device=sizes.device)
    rows = torch.randint(-(1 << 14), 1 << 14, (shape[1], num_channels), dtype=torch.int16, device=sizes.device)
    scale, mean = torch.rand(2, num_channels, device=sizes.device) * 1e-6
    invert = partial(inverse_transform, codes, rows, scale, mean, head_dim=sizes.head_dim, dtype=dtype)

    def error() -> float:
        few = (part.cpu() for part in (codes[:64], rows, scale, mean))
        expected = inverse_transform_reference(*few, head_dim=sizes.head_dim, dtype=dtype)
        return 0.0 if torch.equal(invert()[:, :64].cpu(), expected) else 1.0

    moved = _bytes(codes, rows, scale, mean) + 2 * sizes.num_tokens * num_channels
    sizes_of = {"num_tokens": sizes.num_tokens, "num_components": shape[1]}
    return KernelCase("inverse transform", sizes_of, moved, {"inverse_transform": invert}, error, 0.0)


def _entropy_case(sizes: GpuSizes) -> KernelCase:
    """Segments of one chunk each, every code of 7 bits out of random words: as much to read as such codes have.

    Such a stream does not end where a writer's would, which the decoder says and which costs it nothing.
    """
    num_segments = -(-sizes.num_tokens // sizes.chunk_tokens) * sizes.num_sides
    num_components, num_tokens = sizes.num_kv_heads * sizes.head_dim, num_segments * sizes.chunk_tokens
    segments = _random_segments(sizes, num_segments, num_components)
    slot = torch.arange(4096, dtype=torch.int32, device=sizes.device)
    slots = (slot // 32 << 24 | 32 << 12 | slot % 32)[None].contiguous()
    zeros = torch.zeros(2, num_components, dtype=torch.int8, device=sizes.device)
    num_blocks = count_blocks(num_segments * [sizes.chunk_tokens])
    decode = partial(decode_segments, [RansSide(segments, slots, zeros[0], zeros[1], num_blocks)])

    def error() -> float:
        ends = {name: getattr(segments, name)[:2] for name in ("word_starts", "escape_starts", "token_starts")}
        rows = {name: getattr(segments, name)[:1] for name in ("states", "component_shifts")}
        first = segments._replace(**ends, **rows, token_shifts=segments.token_shifts[: sizes.chunk_tokens])
        on_host = (part.cpu() for part in (*first, slots, zeros[0], zeros[1]))
        *parts, table, numbers, low_bits = on_host
        expected, _ = decode_segments_reference(RansSide(RansSegments(*parts), table, numbers, low_bits, num_blocks))
        ((found, _),) = decode()
        return 0.0 if torch.equal(found.by_token()[: sizes.chunk_tokens].T.cpu(), expected) else 1.0

    moved = _bytes(segments.words) + 2 * num_tokens * num_components
    shape = {"num_segments": num_segments, "num_components": num_components, "num_tokens": num_tokens}
    return KernelCase("entropy decoding", shape, moved, {"decode_segments": decode}, error, 0.0)


def _random_segments(sizes: GpuSizes, num_segments: int, num_components: int) -> RansSegments:
    num_words = sizes.chunk_tokens * num_components * 7 // 16
    device, shorts = sizes.device, 1 << 15
    return RansSegments(
        states=torch.randint(1 << 16, 1 << 31, (num_segments, LANES), dtype=torch.int32, device=device),
        words=torch.randint(-shorts, shorts, (num_segments * num_words,), dtype=torch.int16, device=device),
        word_starts=torch.arange(num_segments + 1, dtype=torch.int32, device=device) * num_words,
        escapes=torch.zeros(0, dtype=torch.int16, device=device),
        escape_starts=torch.zeros(num_segments + 1, dtype=torch.int32, device=device),
        token_starts=torch.arange(num_segments + 1, dtype=torch.int32, device=device) * sizes.chunk_tokens,
        token_shifts=torch.zeros(num_segments * sizes.chunk_tokens, dtype=torch.int8, device=device),
        component_shifts=torch.zeros(num_segments, num_components, dtype=torch.int8, device=device),
    )
