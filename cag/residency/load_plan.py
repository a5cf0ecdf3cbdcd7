"""How a cache will lie on a device, and how much of it that takes, known before any memory is taken.

Knows readers, codecs' shapes and buffers; starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from cag.residency.buffers import CodedBuffers, HostBuffers, coded_bytes
from cag.residency.stream_buffers import StreamBuffers, can_decode, stream_bytes
from cag_kernels.device import serves_codes
from cag_kernels.prefixes import Codes
from cag_store.codecs import CodedShape

if TYPE_CHECKING:
    from cag.forward.state import AttentionRule, KvShape
    from cag_store import CacheReader

Buffers = HostBuffers | CodedBuffers | StreamBuffers


@dataclass(frozen=True)
class LoadPlan:
    """A cache that is to be loaded.

    Attributes:
        first_tokens: where each layer begins.
        num_bytes: of keys and values on the device, as numbers or as codes with their scales.
        take: takes the memory. Raises: InsufficientResources, torch.OutOfMemoryError.
    """

    reader: CacheReader
    shapes: Sequence[KvShape]
    dtype: torch.dtype
    device: torch.device
    first_tokens: Sequence[int]
    num_bytes: int
    take: Callable[[], Buffers]


def plan_load(
    reader: CacheReader,
    shapes: Sequence[KvShape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rules: Sequence[AttentionRule] | None = None,
    in_codes: bool = False,
    in_streams: bool = False,
) -> LoadPlan:
    """What loading all that `reader` holds takes.

    `rules` say how each layer attends: whole chunks that its window hides from all that stands behind the prefix are
    not loaded, unless layers that share segments with it need them.

    With `in_codes` the prefix takes the bytes of its codec where that has codes that this device attends to. With
    `in_streams` the device decodes what the store verified, where the codec's kernels can do that.
    """
    seen = [0] * len(shapes) if rules is None else [rule.first_seen(reader.num_tokens) for rule in rules]
    # at least a chunk: no layer is without segments
    firsts = reader.first_tokens([min(first, reader.num_tokens - 1) for first in seen])
    planned = partial(LoadPlan, reader, shapes, dtype, device, firsts)
    as_stored = str(dtype) == f"torch.{reader.header.context.dtype}"
    streams = reader.stream_shapes(firsts) if in_streams and as_stored else None
    if streams is not None and can_decode(streams):
        return planned(stream_bytes(streams, dtype), partial(StreamBuffers, streams, dtype, device))
    codes = reader.coded_shapes(firsts) if in_codes and as_stored else None
    if codes is not None and all(_attended(*both, device) for both in codes):
        through_host = device.type != "cpu"
        take = partial(CodedBuffers, codes, dtype, device, through_host=through_host)
        return planned(coded_bytes(codes, dtype), take)
    return planned(*_numbers(reader, shapes, dtype, device, firsts))


def plan_of_numbers(plan: LoadPlan, first_tokens: Sequence[int], device: torch.device) -> LoadPlan:
    """The same cache as numbers on another device, layers from other tokens on."""
    found = plan.reader, plan.shapes, plan.dtype, device, first_tokens
    return LoadPlan(*found, *_numbers(*found))


def _numbers(
    reader: CacheReader,
    shapes: Sequence[KvShape],
    dtype: torch.dtype,
    device: torch.device,
    first_tokens: Sequence[int],
) -> tuple[int, Callable[[], HostBuffers]]:
    pairs = zip(shapes, first_tokens, strict=True)
    sizes = [(shape.num_kv_heads, reader.num_tokens - first, shape.head_dim) for shape, first in pairs]
    sides = shapes[0].sides
    num_bytes = sides * sum(map(math.prod, sizes)) * dtype.itemsize
    return num_bytes, partial(HostBuffers.of, sizes, dtype, device, sides=sides)


def _attended(keys: CodedShape, values: CodedShape, device: torch.device) -> bool:
    codes = Codes(keys.bits, values.bits, keys.group_tokens, values.group_channels)
    return serves_codes(device, keys.head_dim, codes)
