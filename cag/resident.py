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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from cag.state import KvShape, Tail
    from cag_store import CacheReader


HUGE_PAGE_BYTES = 2 << 20


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
        if keys[0].device.type != "cpu":
            self._host = [(_pinned_like(k), _pinned_like(v)) for k, v in self._device]

    def views(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Writable arrays of all layers, as the store wants them."""
        return [(storage_view(keys), storage_view(values)) for keys, values in self._host]

    def arrived(self, layer: int) -> None:
        """A layer was decoded: send it to the device."""
        for source, target in zip(self._host[layer], self._device[layer], strict=True):
            if source is not target:
                target.copy_(source, non_blocking=True)


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

    Attributes:
        token_ids: `[num_tokens]` int64.
        load_s: seconds from the start of loading until the last layer was there; 0 for a prefix that was computed here.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], token_ids: NDArray[np.int64]) -> None:
        self._keys = keys
        self._values = values
        self.token_ids = token_ids
        self.load_s = 0.0
        self._overlap = True
        self._ready = [threading.Event() for _ in keys]
        self._error: BaseException | None = None

    @classmethod
    def from_tail(cls, tail: Tail, token_ids: NDArray[np.int64]) -> ResidentPrefix:
        """A prefix that was just computed; takes over the tail's buffers without a copy."""
        prefix = cls(tail.keys, tail.values, token_ids)
        for event in prefix._ready:
            event.set()
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
    ) -> ResidentPrefix:
        """Start to load what `reader` holds. Returns at once; errors surface where a layer is needed.

        With `overlap` a layer can be used as soon as it is there. Without it, all layers become usable together: where
        loading needs the very cores that the forward runs on, one after the other is sooner.
        """
        token_ids = reader.token_ids().astype(np.int64)
        num_tokens = len(token_ids)
        sizes = [(s.num_kv_heads, num_tokens, s.head_dim) for s in shapes]
        tensors = _allocate([size for size in sizes for _ in range(2)], dtype, device)
        prefix = cls(tensors[::2], tensors[1::2], token_ids)
        prefix._overlap = overlap
        threading.Thread(target=prefix._load, args=(reader,), name="cag-load", daemon=True).start()
        return prefix

    def _load(self, reader: CacheReader) -> None:
        start = time.perf_counter()
        try:
            host = HostBuffers(self._keys, self._values)
            reader.load(host.views(), lambda layer: self._arrived(layer, host))
            self.load_s = time.perf_counter() - start
        except BaseException as error:  # handed to whoever waits for a layer
            self._error = error
        finally:
            for event in self._ready:
                event.set()

    def _arrived(self, layer: int, host: HostBuffers) -> None:
        host.arrived(layer)
        if self._overlap and layer < len(self._ready) - 1:  # the last layer is set with `load_s`
            self._ready[layer].set()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values on the device."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    @property
    def is_loaded(self) -> bool:
        """Whether all layers are there, or will not come."""
        return self._ready[-1].is_set()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, borrowed; waits for it.

        Raises:
            StoreError: what went wrong while loading.
        """
        self._ready[index].wait()
        if self._error is not None:
            raise self._error
        return self._keys[index], self._values[index]

    def wait(self) -> None:
        """Wait until all layers are there."""
        self.layer(len(self._ready) - 1)
