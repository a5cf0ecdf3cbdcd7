"""How fast a `transform` cache gets from the host's memory to keys and values on the device, as an opened cache does:
compressed bytes over the bus, entropy decoding, products, means, rotations, exact tokens, every segment confirmed.

The first and the last chunk of a group are compared with the store's decoder before anything is timed.
"""

from __future__ import annotations

from typing import Any

import torch

from cag.residency.buffers import storage_view
from cag.residency.stream_buffers import StreamBuffers
from cag_bench.errors import KernelWrong
from cag_bench.figures import percentiles
from cag_bench.gpu.clock import Budget, median_of, wall_samples
from cag_bench.gpu.random_cache import SIDES, RandomCache
from cag_bench.gpu.shapes import GpuOptions
from cag_kernels import DensePrefix
from cag_store.codecs import EncodedSegment

MOST_SAMPLES = 5


def load_row(device: torch.device, options: GpuOptions, bandwidth: float, budget: Budget) -> dict[str, Any]:
    """Seconds from the host's memory until the last layer is there, and the first, with all that is decoded with it.

    Raises:
        KernelWrong: keys or values that are not the store's to the bit.
    """
    cache, shape = RandomCache(options), options.network
    buffers = filled(cache, device)
    copy = buffers.host_copy()
    arrive(buffers, shape.num_layers)
    check(cache, buffers)
    del buffers
    count = min(options.samples, MOST_SAMPLES)
    samples = wall_samples(lambda: arrive(copy.again(), shape.num_layers), device, count, budget, warm_up=1)
    first = wall_samples(lambda: arrive(copy.again(), 1), device, count, budget, warm_up=0)
    plain_bytes = 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * options.prefix_tokens
    return {
        "name": "load transform",
        "shape": {"num_tokens": options.prefix_tokens, "joint_layers": options.joint_layers},
        "seconds": percentiles(samples),
        "samples_s": samples,
        "first_layer_s": median_of(first),
        "first_layer_samples_s": first,
        "host_copy_bytes": copy.num_bytes,
        "plain_bytes": plain_bytes,
        "floor_s": (plain_bytes + copy.num_bytes) / bandwidth,
        "p50_over_floor": median_of(samples) * bandwidth / (plain_bytes + copy.num_bytes),
        "gb_per_s": plain_bytes / median_of(samples) / 1e9,
    }


def filled(cache: RandomCache, device: torch.device) -> StreamBuffers:
    """The cache in the host's memory, as the store puts it there."""
    groups = [(cache.shape(group, "keys"), cache.shape(group, "values")) for group in range(len(cache.spans))]
    buffers = StreamBuffers(groups, torch.bfloat16, device)
    views = buffers.views()
    for group, (first, _) in enumerate(cache.spans):
        for place, side in enumerate(SIDES):
            for number, (start, count) in enumerate(cache.chunks):
                data = memoryview(cache.segment(group, side, number))
                cache.codec.keep_streams([EncodedSegment(data, (views[first][place],), side, first, start)], count)
    return buffers


def arrive(buffers: StreamBuffers, num_layers: int) -> None:
    """As a load whose bytes are there: layers are decoded and confirmed; waits for the device."""
    for layer in range(num_layers):
        buffers.arrived(layer)
    for layer in range(num_layers):
        buffers.confirm(layer)
    buffers.uploads.finish()


def check(cache: RandomCache, buffers: StreamBuffers) -> None:
    """Raises: KernelWrong where chunks are not those of the store's decoder."""
    layers = [DensePrefix(*segments[0][:2]) for segments in buffers.layers()]
    for group, number in ((0, 0), (len(cache.spans) - 1, len(cache.chunks) - 1)):
        (first, last), (start, count) = cache.spans[group], cache.chunks[number]
        for side in SIDES:
            whole = [layer.keys if side == "keys" else layer.values for layer in layers[first:last]]
            found = [part[:, start : start + count].cpu() for part in whole]
            expected = [torch.empty_like(part) for part in found]
            views = [storage_view(part) for part in expected]
            cache.codec.decode_layers_into(cache.segment(group, side, number), views, side, first, start)
            if not all(map(torch.equal, found, expected)):
                raise KernelWrong(f"{side} of layers {first} to {last - 1}, chunk {number}, differ from the store's.")
