"""Huge pages for what is read from one end to the other: a prefix for each question, weights for each token.

A processor keeps the places of few pages at hand. Behind pages of 4 KiB it asks the page table for every 64 lines that
it reads, on a virtual machine twice, and its own looking ahead stops there.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from cag.machine.memory_limits import available_memory_bytes
from cag_store.scratch import HUGE_PAGE_BYTES, huge_mapping

_ALIGNED = 64  # bytes: a weight begins with a line of the processor's cache
_GRACE_S, _LEAST_RATE = 0.5, 2e9  # seconds, and bytes a second behind them, that moving weights may take


def has_huge_pages() -> bool:
    """Whether a process can ask for them here."""
    return hasattr(mmap, "MADV_HUGEPAGE")


def huge_memory(num_bytes: int) -> mmap.mmap:
    """Fresh memory of the process for `num_bytes` from its first whole huge page on; `whole_pages` says where that
    is."""
    return huge_mapping(num_bytes + HUGE_PAGE_BYTES)


def huge_tensor(num_bytes: int) -> Tensor:
    """Fresh memory (uint8) for `num_bytes`, from its first whole huge page on."""
    return whole_pages(torch.from_numpy(np.frombuffer(huge_memory(num_bytes), dtype=np.uint8)))


def whole_pages(memory: Tensor) -> Tensor:
    """Memory (uint8) from its first whole huge page on."""
    return memory[-memory.data_ptr() % HUGE_PAGE_BYTES :]


def move_weights(network: nn.Module, *, clock: Callable[[], float] = time.perf_counter) -> int:
    """Move the weights of a network's linear layers to huge pages, in place and in order, and return how many bytes.

    Weights that are views of one memory stay views of one. Stops where huge pages come slower than `_LEAST_RATE`,
    as on a virtual machine whose host has to find the memory first; what is left stays where it is. Moves nothing
    where there is no room for two copies, or where memory is not on the CPU.
    """
    stored = list(_storages(network))
    num_bytes = sum(_padded(storage.nbytes()) for storage, _ in stored)
    on_cpu = all(storage.device.type == "cpu" for storage, _ in stored)
    if not stored or not on_cpu or not has_huge_pages() or available_memory_bytes() < num_bytes:
        return 0
    memory = huge_tensor(num_bytes)
    begun, moved = clock(), 0
    for storage, views in stored:
        if clock() - begun > _GRACE_S + moved / _LEAST_RATE:
            break
        _move(storage, views, memory[moved:])
        moved += _padded(storage.nbytes())
    return moved


def _storages(network: nn.Module) -> Iterator[tuple[torch.UntypedStorage, list[Tensor]]]:
    """Each memory that weights of linear layers lie in, with all weights that are views of it. An embedding is one of
    them where the output matrix shares it."""
    found: dict[int, tuple[torch.UntypedStorage, list[Tensor]]] = {}
    for module in network.modules():
        if isinstance(module, nn.Linear):
            storage = module.weight.untyped_storage()
            found.setdefault(storage.data_ptr(), (storage, []))[1].append(module.weight)
    return iter(found.values())


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _move(storage: torch.UntypedStorage, views: list[Tensor], memory: Tensor) -> None:
    whole = memory[: storage.nbytes()]
    whole.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
    for weight in views:
        typed = whole.view(weight.dtype)
        first = typed.storage_offset() + weight.storage_offset()
        weight.data = typed.as_strided(weight.shape, weight.stride(), first)
