"""A prefix on the device: keys and values of all layers, shared by all sessions and never changed.

A prefix may be used while it is still loading: whoever needs a layer waits for that layer only, so the question's
forward runs through the first layers while later ones are read and decoded.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.uploads import Uploads, pinned
from cag_kernels import DensePrefix, QuantizedPrefix, dequantize_prefix
from cag_kernels.device import serves_codes
from cag_kernels.prefixes import Codes
from cag_store.codecs import CodedShape, CodedSide

if TYPE_CHECKING:
    from cag.state import KvShape, PrefixSegment, Tail
    from cag_store import CacheReader


HUGE_PAGE_BYTES = 2 << 20
_ALIGNED = 64  # bytes: an array begins with a line of the processor's cache


def storage_view(tensor: Tensor) -> NDArray[Any]:
    """The memory of a CPU tensor as the store sees it: bfloat16 as uint16 bit patterns, other types as they are."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


class HostBuffers:
    """Where the store decodes to: the device's own buffers on a CPU; pinned copies, sent on layer by layer, for a GPU.

    The GPU branch is not yet run on a GPU.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self._device = list(zip(keys, values, strict=True))
        self._host = self._device
        self.uploads: Uploads | None = None
        if keys[0].device.type != "cpu":
            self._host = [(_pinned_like(k), _pinned_like(v)) for k, v in self._device]
            self.uploads = Uploads(keys[0].device)

    def views(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Writable arrays of all layers, as the store wants them."""
        return [(storage_view(keys), storage_view(values)) for keys, values in self._host]

    def layers(self) -> list[tuple[PrefixSegment, ...]]:
        """What to attend to when all has arrived."""
        return [(DensePrefix(*pair),) for pair in self._device]

    def arrived(self, layer: int) -> None:
        """A layer was decoded: send it to the device."""
        if self.uploads is not None:
            self.uploads.send(layer, zip(self._host[layer], self._device[layer], strict=True))


class CodedBuffers:
    """Where the store puts the codes of a prefix, and how they are attended to: in place on a CPU; for a GPU in pinned
    memory, from which the codes of each layer are sent on in one copy.

    The GPU branch is not yet run on a GPU.
    """

    def __init__(self, shapes: Sequence[tuple[CodedShape, CodedShape]], device: torch.device) -> None:
        self._shapes = shapes
        sides = [side for both in shapes for side in both]
        self._starts = list(accumulate((_side_layout(side)[0] for side in sides), initial=0))
        size = self._starts[-1]
        if device.type == "cpu":
            self._set_memory(_allocate([(1, 1, size)], torch.uint8, device)[0].view(-1), None)
        else:
            self._set_memory(pinned(size), torch.empty(size, dtype=torch.uint8, device=device))

    def _set_memory(self, host: Tensor, device: Tensor | None) -> None:
        """Where codes are written, and where they are sent to, if elsewhere."""
        self._host, self._target = host, device
        self.uploads = None if device is None else Uploads(device.device)
        whole = host if device is None else device
        self._whole = {dtype: whole.view(dtype) for dtype in (torch.uint8, torch.int8, torch.bfloat16)}

    def views(self) -> list[tuple[CodedSide, CodedSide]]:
        """Writable arrays of all layers, as the store wants them."""
        memory = self._host.numpy()
        found = [
            CodedSide(*[np.ndarray(p.size, _NUMPY[p.dtype], memory, start + p.first_byte) for p in places])
            for start, places in self._sides()
        ]
        return list(zip(found[::2], found[1::2], strict=True))

    def layers(self) -> list[tuple[PrefixSegment, ...]]:
        """See `HostBuffers`: codes, and behind them what is exact."""
        tensors = [[self._tensor(place, start) for place in places] for start, places in self._sides()]
        found: list[tuple[PrefixSegment, ...]] = []
        for (shape, along), keys, values in zip(self._shapes, tensors[::2], tensors[1::2], strict=True):
            parts = (*keys[:3], *values[:3], keys[3], values[3])
            coded = QuantizedPrefix(*parts, shape.group_tokens, along.group_channels)  # type: ignore[call-arg, arg-type]
            recent = DensePrefix(keys[4], values[4])
            found.append((coded, recent) if recent.num_tokens else (coded,))
        return found

    def arrived(self, layer: int) -> None:
        """Codes lie where they are attended to, or are sent there."""
        if self.uploads is not None and self._target is not None:
            part = slice(self._starts[2 * layer], self._starts[2 * layer + 2])
            self.uploads.send(layer, [(self._host[part], self._target[part])])

    def _tensor(self, place: _Place, start: int) -> Tensor:
        whole = self._whole[place.dtype]
        first = whole.storage_offset() + (start + place.first_byte) // place.dtype.itemsize
        return whole.as_strided(place.size, place.strides, first)

    def _sides(self) -> Iterator[tuple[int, tuple[_Place, ...]]]:
        """First byte and places of each side: keys, then values, layer by layer."""
        sides = (side for both in self._shapes for side in both)
        return ((start, _side_layout(side)[1]) for start, side in zip(self._starts, sides, strict=False))


class _Place(NamedTuple):
    """An array of a side: its type, shape, strides in elements, and first byte within the side."""

    dtype: torch.dtype
    size: tuple[int, ...]
    strides: tuple[int, ...]
    first_byte: int


_NUMPY = {torch.uint8: np.uint8, torch.int8: np.int8, torch.bfloat16: np.uint16}


@lru_cache(maxsize=64)
def _side_layout(shape: CodedShape) -> tuple[int, tuple[_Place, ...]]:
    """Bytes of a side, and where its arrays lie in it. The layers of a model have few shapes."""
    codes = torch.int8 if shape.bits == 8 else torch.uint8
    places, first = [], 0
    for dtype, size in zip((codes, *[torch.bfloat16] * 4), shape.shapes, strict=True):
        places.append(_Place(dtype, size, (size[1] * size[2], size[2], 1), first))
        first += -(-math.prod(size) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return first, tuple(places)


def _attended(keys: CodedShape, values: CodedShape, device: torch.device) -> bool:
    codes = Codes(keys.bits, values.bits, keys.group_tokens, values.group_channels)
    return serves_codes(device, keys.head_dim, codes)


class _Memory:
    """Mappings of huge pages for caches on a CPU; the last one that came free is kept for the next cache.

    The first touch of fresh memory costs a fault a page, and on a virtual machine more than decoding into it.
    """

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=1)  # no lock: memory may come free in the midst of `take`

    def take(self, num_bytes: int) -> Tensor:
        """At least `num_bytes` of any content, uint8; the memory comes back when no tensor uses it any more."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or not num_bytes <= len(memory) <= 2 * num_bytes:
            # private: shared memory gets huge pages only where the system's administrator allows them
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        holder = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(holder, self._free.append, memory)
        return torch.from_numpy(holder)


_memory = _Memory()


def _allocate(sizes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Uninitialized tensors; on a CPU in one mapping of huge pages where the system has them."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    counts = [math.prod(size) for size in sizes]
    whole = _memory.take(sum(counts) * dtype.itemsize + HUGE_PAGE_BYTES)
    aligned = whole[-whole.data_ptr() % HUGE_PAGE_BYTES :][: sum(counts) * dtype.itemsize].view(dtype)
    return [part.view(size) for part, size in zip(torch.split(aligned, counts), sizes, strict=True)]


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class ResidentPrefix:
    """Keys and values of `num_tokens` tokens, `[num_kv_heads, num_tokens, head_dim]` a layer and side.

    `layers` has the segments of each layer, one behind the other: numbers, or codes with what is exact behind them.

    Attributes:
        token_ids: `[num_tokens]` int64.
        load_s: seconds from the start of loading until the last layer was there; 0 for a prefix that was computed here.
        tier: the slowest place that the layers were loaded from: "memory", "disk" or "object-store".
        arrivals: `[num_layers]` int64, 1 for each layer that is there; for compiled code, which waits by looking.
    """

    def __init__(self, layers: Sequence[tuple[PrefixSegment, ...]], token_ids: NDArray[np.int64]) -> None:
        self._layers = layers
        self.token_ids = token_ids
        self.load_s = 0.0
        self.tier = "memory"
        self._overlap = True
        self._uploads: Uploads | None = None
        self._ready = [threading.Event() for _ in layers]
        self._begun = threading.Event()  # the first layer is there
        self.arrivals = np.zeros(len(layers), dtype=np.int64)
        self._error: BaseException | None = None

    @classmethod
    def from_tail(cls, tail: Tail, token_ids: NDArray[np.int64]) -> ResidentPrefix:
        """A prefix that was just computed; takes over the tail's buffers without a copy."""
        prefix = cls([(pair,) for pair in map(DensePrefix, tail.keys, tail.values)], token_ids)
        prefix.mark_loaded()
        return prefix

    @classmethod
    def load(
        cls,
        reader: CacheReader,
        shapes: list[KvShape],
        dtype: torch.dtype,
        device: torch.device,
        *,
        overlap: bool = True,
        in_codes: bool = False,
    ) -> ResidentPrefix:
        """Start to load what `reader` holds. Returns at once; errors surface where a layer is needed.

        With `in_codes` the prefix takes the bytes of its codec where that has codes that this device attends to.

        With `overlap` a layer can be used as soon as it is there, and the first ones come soon. Without it, `segments`
        gives all layers together: where loading needs the very cores that the forward runs on, one after the other is
        sooner.
        """
        token_ids = reader.token_ids().astype(np.int64)
        coded = reader.coded_shapes() if in_codes and dtype == torch.bfloat16 else None
        coded = coded if coded is not None and all(_attended(*both, device) for both in coded) else None
        host: HostBuffers | CodedBuffers
        if coded is not None:
            host = CodedBuffers(coded, device)
        else:
            sizes = [(s.num_kv_heads, len(token_ids), s.head_dim) for s in shapes]
            tensors = _allocate([size for size in sizes for _ in range(2)], dtype, device)
            host = HostBuffers(tensors[::2], tensors[1::2])
        prefix = cls(host.layers(), token_ids)
        prefix._overlap, prefix._uploads = overlap, host.uploads
        threading.Thread(target=prefix._load, args=(reader, host), name="cag-load", daemon=True).start()
        return prefix

    def _load(self, reader: CacheReader, host: HostBuffers | CodedBuffers) -> None:
        start = time.perf_counter()
        try:
            arrived = partial(self._arrived, host=host)
            reader.load(host.views(), arrived, first_layer_soon=self._overlap)
            if host.uploads is not None:
                host.uploads.finish()
            self.load_s, self.tier = time.perf_counter() - start, reader.tier
        except BaseException as error:  # handed to whoever waits for a layer
            self._error = error
        finally:
            self.mark_loaded()

    def _arrived(self, layer: int, host: HostBuffers | CodedBuffers) -> None:
        host.arrived(layer)
        self.arrivals[layer] = 1
        self._begun.set()
        if self._overlap and layer < len(self._ready) - 1:  # the last layer is set with `load_s`
            self._ready[layer].set()

    def mark_loaded(self) -> None:
        """All layers are there."""
        self.arrivals[:] = 1
        self._begun.set()
        for event in self._ready:
            event.set()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values on the device, as numbers or as codes with their scales."""
        segments = [segment for layer in self._layers for segment in layer]
        return sum(part.nbytes for segment in segments for part in segment if isinstance(part, Tensor))

    @property
    def is_loaded(self) -> bool:
        """Whether all layers are there, or will not come."""
        return self._ready[-1].is_set()

    def segments(self, index: int) -> tuple[PrefixSegment, ...]:
        """Keys and values of a layer, borrowed; waits for it.

        Raises:
            StoreError: what went wrong while loading.
        """
        self._ready[index].wait()
        if self._error is not None:
            raise self._error
        if self._uploads is not None:
            self._uploads.wait(index)
        return self._layers[index]

    def places(self, index: int) -> tuple[PrefixSegment, ...]:
        """As `segments`, without waiting: where the layer lies, or will lie when it has arrived."""
        return self._layers[index]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as numbers, `[num_kv_heads, num_tokens, head_dim]`: borrowed, or made from codes.

        Raises:
            StoreError: what went wrong while loading.
        """
        dense = [
            segment if isinstance(segment, DensePrefix) else DensePrefix(*dequantize_prefix(segment, torch.bfloat16))
            for segment in self.segments(index)
        ]
        if len(dense) == 1:
            return dense[0].keys, dense[0].values
        return torch.cat([segment.keys for segment in dense], 1), torch.cat([segment.values for segment in dense], 1)

    def wait_for_first(self) -> None:
        """Wait until the first layer is there, or will not come."""
        self._begun.wait()

    def wait(self) -> None:
        """Wait until all layers are there."""
        self.segments(len(self._ready) - 1)

    def wait_quietly(self) -> None:
        """Wait until loading has ended, whatever came of it."""
        self._ready[-1].wait()
