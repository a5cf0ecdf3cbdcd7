"""What `cag bench kernels` measures on a CPU, in the shape of SmolLM2-135M: attention to one layer of a prefix on each
path that there is, linear layers over few rows, and decoding a layer's keys.

Random numbers; sizes in, cases out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cag_bench.kernel_case import KernelCase, relative_error
from cag_bench.kernel_clock import Work
from cag_kernels import (
    linear_without_packing,
    pack_weight,
    packed_linear,
    segment_attention,
    segment_attention_reference,
)
from cag_kernels.flash import fused_attention
from cag_kernels.tiled import tiled_attention
from cag_store import codec_from_config

CODECS = ("lossless", "int8", "int4")
MAX_ERROR = 1e-4
QUANTIZED_ERROR = {"lossless": 0.0, "int8": 0.02, "int4": 0.2}


@dataclass(frozen=True)
class CpuSizes:
    """One layer's sizes."""

    num_tokens: int
    num_q_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    hidden_size: int = 576
    intermediate_size: int = 1536
    question_tokens: int = 15


def cpu_cases(sizes: CpuSizes) -> Iterator[KernelCase]:
    """All cases, one after the other."""
    torch.manual_seed(0)
    shape = (2, sizes.num_kv_heads, sizes.num_tokens, sizes.head_dim)
    keys, values = torch.randn(shape).bfloat16()
    for num_queries in (1, sizes.question_tokens):
        yield _attention_case(sizes, keys, values, num_queries)
    for num_rows in (1, sizes.question_tokens):
        yield _linear_case(sizes, num_rows)
    for name in CODECS:
        case = _codec_case(name, keys)
        if case is not None:
            yield case


def _attention_case(sizes: CpuSizes, keys: Tensor, values: Tensor, num_queries: int) -> KernelCase:
    query = torch.randn(sizes.num_q_heads, num_queries, sizes.head_dim)
    kwargs = {"scale": sizes.head_dim**-0.5, "offset": sizes.num_tokens}
    attend = partial(segment_attention, query, keys, values, **kwargs)

    def error() -> float:
        expected, _ = segment_attention_reference(query.double(), keys.double(), values.double(), **kwargs)
        return relative_error(attend()[0], expected)

    arms: dict[str, Work] = {
        "segment_attention": attend,
        "fused": partial(fused_attention, query, keys, values, **kwargs),
        "fused bf16": partial(fused_attention, query.bfloat16(), keys, values, **kwargs),
        "tiled": partial(tiled_attention, query, keys, values, **kwargs),
    }
    shape = {"num_tokens": sizes.num_tokens, "num_queries": num_queries}
    moved = keys.nbytes + values.nbytes + 2 * query.nbytes
    return KernelCase("segment attention", shape, moved, arms, error, MAX_ERROR)


def _linear_case(sizes: CpuSizes, num_rows: int) -> KernelCase:
    """Gate and up of one layer."""
    weight = torch.randn(2 * sizes.intermediate_size, sizes.hidden_size).bfloat16()
    block, packed = torch.randn(num_rows, sizes.hidden_size), pack_weight(weight)
    wide, narrow = weight.float(), block.bfloat16()

    def error() -> float:
        return relative_error(packed_linear(block, packed), block.double() @ weight.double().t())

    arms: dict[str, Work] = {
        "packed_linear": partial(packed_linear, block, packed),
        "linear float32": partial(torch.nn.functional.linear, block, wide),
        "linear_without_packing float32": partial(linear_without_packing, block, wide),
        "linear bf16": partial(torch.nn.functional.linear, narrow, weight),
    }
    shape = {"num_rows": num_rows, "in_features": weight.shape[1], "out_features": weight.shape[0]}
    moved = weight.nbytes + block.nbytes + 4 * num_rows * weight.shape[0]
    return KernelCase("packed linear", shape, moved, arms, error, MAX_ERROR)


def _codec_case(name: str, keys: Tensor) -> KernelCase | None:
    """Decoding one layer's keys; None for a codec that this installation has not."""
    from cag_store.errors import UnknownCodec

    try:
        codec = codec_from_config(name)
    except UnknownCodec:
        return None
    array = keys.view(torch.uint16).numpy()
    encoded = codec.encode(array, "bfloat16", "keys")
    out = torch.empty_like(keys)
    target: Any = out.view(torch.uint16).numpy()

    def error() -> float:
        codec.decode_into(encoded, target)
        return relative_error(out, keys)

    arms: dict[str, Work] = {
        f"decode {name}": partial(codec.decode_into, encoded, target),
        "copy": partial(out.copy_, keys),
    }
    shape = {"num_tokens": keys.shape[1], "raw_bytes": keys.nbytes, "encoded_bytes": len(encoded)}
    return KernelCase(f"decode, {name}", shape, keys.nbytes + len(encoded), arms, error, QUANTIZED_ERROR[name])
