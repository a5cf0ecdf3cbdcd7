"""Memory that a cache is decoded to, and from which it goes on to a GPU: numbers or codes of all layers.

The store writes into arrays of the host; on a CPU they are what is attended to, for a GPU they are pinned and sent on
layer by layer, and can be kept to be sent again. Knows shapes of keys, values and codes; knows no reader.
"""

from __future__ import annotations

import math
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

from cag.errors import InsufficientResources
from cag.forward.state import sides_of
from cag.machine.huge_pages import has_huge_pages, huge_memory, whole_pages
from cag.machine.memory_limits import available_memory_bytes
from cag.residency.host_copies import HostCopy
from cag.residency.uploads import Uploads, pinned, pinned_bytes, pinned_like
from cag_kernels import DensePrefix, QuantizedPrefix
from cag_store.codecs import CodedShape, CodedSide

if TYPE_CHECKING:
    from cag.forward.state import PrefixSegment

Sides = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, which may be the same tensor."""

_ALIGNED = 64  # bytes: an array begins with a line of the processor's cache


def storage_view(tensor: Tensor) -> NDArray[Any]:
    """The memory of a CPU tensor as the store sees it: bfloat16 as uint16 bit patterns, other types as they are."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


class HostBuffers:
    """Where the store decodes numbers to: in place on a CPU; `through_host`, as for a GPU, in pinned copies that are
    sent on layer by layer, `host` where there are some already.
    """

    def __init__(self, layers: Sides, *, through_host: bool, host: Sides | None = None) -> None:
        """`layers`: keys and values of each layer on the device."""
        self._device, self._host, self.uploads = layers, layers, None
        if through_host:
            self._host = host or [_pinned_like(*sides) for sides in layers]
            self.uploads = Uploads(layers[0][0].device)

    @classmethod
    def of(
        cls,
        sizes: list[tuple[int, int, int]],
        dtype: torch.dtype,
        device: torch.device,
        host: Sides | None = None,
        *,
        sides: int = 2,
    ) -> HostBuffers:
        """Over new memory of the device; `sizes` of each layer's keys, of which it has so many `sides`."""
        tensors = _allocate([size for size in sizes for _ in range(sides)], dtype, device)
        layers = list(zip(tensors[::sides], tensors[sides - 1 :: sides], strict=True))
        return cls(layers, through_host=device.type != "cpu" or host is not None, host=host)

    def views(self) -> list[tuple[NDArray[Any], ...]]:
        """Writable arrays of all layers, one a side, as the store wants them."""
        return [tuple(map(storage_view, sides_of(*sides))) for sides in self._host]

    def layers(self) -> list[tuple[PrefixSegment, ...]]:
        """What to attend to when all has arrived."""
        return [(DensePrefix(*pair),) for pair in self._device]

    def host_copy(self) -> HostCopy:
        """What is in the host's memory, for another time."""
        first = self._device[0][0]
        sizes = [(keys.shape[0], keys.shape[1], keys.shape[2]) for keys, _ in self._device]
        num_bytes, sides = sum(pinned_bytes(part) for pair in self._host for part in sides_of(*pair)), self._num_sides
        again = partial(HostBuffers.of, sizes, first.dtype, first.device, host=self._host, sides=sides)
        return HostCopy(num_bytes, again)

    def finish(self) -> None:
        """Wait until all that was sent is there."""
        if self.uploads is not None:
            self.uploads.finish()

    def arrived(self, layer: int) -> None:
        """A layer was decoded: send it to the device."""
        if self.uploads is not None:
            sent = zip(sides_of(*self._host[layer]), sides_of(*self._device[layer]), strict=True)
            self.uploads.send(layer, sent)

    @property
    def _num_sides(self) -> int:
        return len(sides_of(*self._device[0]))


def _pinned_like(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    pinned_sides = tuple(map(pinned_like, sides_of(keys, values)))
    return pinned_sides[0], pinned_sides[-1]


class CodedBuffers:
    """Where the store puts the codes of a prefix, and how they are attended to: in place on a CPU; `through_host`, as
    for a GPU, in pinned memory, from which the codes of each layer are sent on in one copy.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[CodedShape, CodedShape]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        through_host: bool,
        host: Tensor | None = None,
    ) -> None:
        """`shapes` of each layer's keys and values, and the type of exact ones; `host`: a copy that is there
        already."""
        self._shapes, self._dtype = shapes, dtype
        self._again = partial(CodedBuffers, shapes, dtype, device, through_host=True)
        sides = [side for both in shapes for side in both]
        self._starts = list(accumulate((_side_layout(side, dtype)[0] for side in sides), initial=0))
        size = self._starts[-1]
        if device.type == "cpu":
            target = _allocate([(1, 1, size)], torch.uint8, device)[0].view(-1)
        else:
            target = torch.empty(size, dtype=torch.uint8, device=device)
        self._host, self._target, self.uploads = target, target, None
        if through_host:
            self._host, self.uploads = pinned(size) if host is None else host, Uploads(device)
        self._whole = {kind: target.view(kind) for kind in (torch.uint8, torch.int8, torch.bfloat16, dtype)}

    def host_copy(self) -> HostCopy:
        """See `HostBuffers`."""
        return HostCopy(pinned_bytes(self._host), partial(self._again, host=self._host))

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
            segments = coded, DensePrefix(keys[4], values[4])
            found.append(tuple(segment for segment in segments if segment.num_tokens))
        return found

    def arrived(self, layer: int) -> None:
        """Codes lie where they are attended to, or are sent there."""
        if self.uploads is not None:
            part = slice(self._starts[2 * layer], self._starts[2 * layer + 2])
            self.uploads.send(layer, [(self._host[part], self._target[part])])

    def _tensor(self, place: _Place, start: int) -> Tensor:
        whole = self._whole[place.dtype]
        first = whole.storage_offset() + (start + place.first_byte) // place.dtype.itemsize
        return whole.as_strided(place.size, place.strides, first)

    def _sides(self) -> Iterator[tuple[int, tuple[_Place, ...]]]:
        """First byte and places of each side: keys, then values, layer by layer."""
        sides = (side for both in self._shapes for side in both)
        return ((start, _side_layout(side, self._dtype)[1]) for start, side in zip(self._starts, sides, strict=False))


class _Place(NamedTuple):
    """An array of a side: its type, shape, strides in elements, and first byte within the side."""

    dtype: torch.dtype
    size: tuple[int, ...]
    strides: tuple[int, ...]
    first_byte: int


_NUMPY = {  # as `storage_view`
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.bfloat16: np.uint16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}


@lru_cache(maxsize=64)
def _side_layout(shape: CodedShape, exact: torch.dtype) -> tuple[int, tuple[_Place, ...]]:
    """Bytes of a side, and where its arrays lie in it, exact tokens in a type. The layers of a model have few
    shapes."""
    codes = torch.int8 if shape.bits == 8 else torch.uint8
    places, first = [], 0
    kinds = (codes, torch.bfloat16, torch.bfloat16, exact, exact)
    for dtype, size in zip(kinds, shape.shapes, strict=True):
        places.append(_Place(dtype, size, (size[1] * size[2], size[2], 1), first))
        first += -(-math.prod(size) * dtype.itemsize // _ALIGNED) * _ALIGNED
    return first, tuple(places)


def coded_bytes(shapes: Sequence[tuple[CodedShape, CodedShape]], exact: torch.dtype) -> int:
    """Bytes of codes of such shapes, with what belongs to them."""
    places = (place for both in shapes for side in both for place in _side_layout(side, exact)[1])
    return sum(math.prod(place.size) * place.dtype.itemsize for place in places)


class _Memory:
    """Mappings of huge pages for caches on a CPU; the last one that came free is kept for the next cache.

    The first touch of fresh memory costs a fault a page, and on a virtual machine more than decoding into it.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[int, Any]] = deque(maxlen=1)  # no lock: memory may come free in the midst of `take`

    def take(self, num_bytes: int) -> Tensor:
        """`num_bytes` of any content, uint8, or more; the memory comes back when no tensor uses it any more.

        Raises: InsufficientResources: there is less.
        """
        try:
            size, memory = self._free.pop()
        except IndexError:
            size, memory = 0, None
        if memory is None or not num_bytes <= size <= 2 * num_bytes:
            size, memory = num_bytes, None  # what was kept goes, if nothing else holds it
            if num_bytes > available_memory_bytes():
                raise InsufficientResources(
                    f"the cache takes {num_bytes / 1e9:.1f} GB of memory, more than is free.",
                    hint="Close another one, or build it with a smaller codec.",
                )
            memory = huge_memory(num_bytes)
        holder = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(holder, self._free.append, (size, memory))
        return whole_pages(torch.from_numpy(holder))


_memory = _Memory()


def _allocate(sizes: list[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Uninitialized tensors; on a CPU in one mapping of huge pages where the system has them."""
    if device.type != "cpu" or not has_huge_pages():
        return [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    counts = [math.prod(size) for size in sizes]
    num_bytes = sum(counts) * dtype.itemsize
    numbers = _memory.take(num_bytes)[:num_bytes].view(dtype)
    return [part.view(size) for part, size in zip(torch.split(numbers, counts), sizes, strict=True)]
