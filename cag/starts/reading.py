"""Weights from safetensors files to memory, on a thread, before torch is imported.

Each tensor is copied once, to huge pages, in the order in which a forward reads them: what is multiplied together lies
side by side. Where fresh memory comes slowly, as on a virtual machine whose host has to find it first, the rest stays
in the pages of the file. Knows the container and names of parameters; no torch, and no network.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from cag_store.scratch import HUGE_PAGE_BYTES, huge_mapping

_ALIGNED = 64  # bytes: a weight begins with a line of the processor's cache
_ITEM_BYTES = 2  # of bfloat16
_GRACE_S, _LEAST_RATE = (
    1.0,
    2e9,
)  # seconds, as torch's import takes, and bytes a second behind them, that reading may take
_MOST_HEADER_BYTES = 100_000_000  # what the container's own reader allows
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as a forward multiplies


@dataclass(frozen=True)
class _Source:
    """A tensor in a file: where its bytes begin there, and its shape."""

    path: Path
    offset: int
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES


@dataclass(frozen=True, eq=False)
class WeightMemory:
    """Weights that were read: memories (uint8), the first one filled, the others pages of files; and of each name in
    which of them it lies, at which byte it begins there, and its shape."""

    memories: list[NDArray[np.uint8]]
    places: dict[str, tuple[int, int, tuple[int, ...]]]


class WeightReading:
    """Reads the bfloat16 tensors `names` of the safetensors files of `directory`; begins at once, and stops when the
    process ends."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._found: WeightMemory | None = None
        self._thread = threading.Thread(target=self._read, args=(directory, names), name="cag-weights", daemon=True)
        self._thread.start()

    def result(self) -> WeightMemory | None:
        """All of them. None where files are not as they should be, or memory is short: who reads them in the usual way
        says what is wrong."""
        self._thread.join()
        return self._found

    def _read(self, directory: Path, names: Sequence[str]) -> None:
        try:
            self._found = _read_all(directory, names)
        except (OSError, ValueError, KeyError, TypeError):
            self._found = None


def _read_all(directory: Path, names: Sequence[str], clock: Callable[[], float] = time.perf_counter) -> WeightMemory:
    sources = _sources(directory)
    order = sorted(names, key=_place)
    found = WeightMemory([_memory(sum(_padded(sources[name].num_bytes) for name in order))], {})
    begun, begin, mapped = clock(), 0, dict[Path, int]()
    for name in order:
        source = sources[name]
        if mapped or clock() - begun > _GRACE_S + begin / _LEAST_RATE:
            found.places[name] = _map(found, mapped, source), source.offset, source.shape
            continue
        _fill(found.memories[0][begin : begin + source.num_bytes], source)
        found.places[name] = 0, begin, source.shape
        begin += _padded(source.num_bytes)
    return found


def _map(found: WeightMemory, mapped: dict[Path, int], source: _Source) -> int:
    """Which memory holds the pages of a tensor's file; what is written there never gets to the file."""
    if source.offset % _ITEM_BYTES:
        raise ValueError(f"{source.path} has numbers at odd bytes")
    if source.path not in mapped:
        mapped[source.path] = len(found.memories)
        found.memories.append(np.memmap(source.path, dtype=np.uint8, mode="c"))
    return mapped[source.path]


def _place(name: str) -> tuple[int, int, str]:
    """The embedding, the layers one by one, what stands behind them; in a layer first what multiplies."""
    layer = _LAYER.search(name)
    ranks = [rank for rank, ending in enumerate(_ORDER) if name.endswith(f"{ending}.weight")]
    first = -1 if "embed_tokens" in name else int(layer[1]) if layer else 1 << 30
    return first, ranks[0] if ranks else len(_ORDER), name


def _memory(num_bytes: int) -> NDArray[np.uint8]:
    if psutil.virtual_memory().available < num_bytes:
        raise OSError("too little memory")
    memory = np.frombuffer(huge_mapping(num_bytes + HUGE_PAGE_BYTES), dtype=np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[first : first + num_bytes]


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _sources(directory: Path) -> dict[str, _Source]:
    """Every bfloat16 tensor of the files by name. Raises: ValueError: a damaged file, or two with one name."""
    found: dict[str, _Source] = {}
    for path in sorted(directory.glob("*.safetensors")):
        entries = _header(path)
        if not found.keys().isdisjoint(entries):
            raise ValueError("one name in two files")
        found |= entries
    return found


def _header(path: Path) -> dict[str, _Source]:
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 0 < header_bytes <= min(_MOST_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"{path} has a header of {header_bytes} bytes")
        header: dict[str, Any] = dict(json.loads(stream.read(header_bytes)))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "BF16":
            continue
        (begin, end), shape = entry["data_offsets"], tuple(int(size) for size in entry["shape"])
        source = _Source(path, 8 + header_bytes + begin, shape)
        fits = 0 <= begin <= end <= file_bytes - 8 - header_bytes and end - begin == source.num_bytes
        if not fits or any(size < 0 for size in shape):
            raise ValueError(f"{path} has {name} at bytes {begin} to {end}")
        found[name] = source
    return found


def _fill(bits: NDArray[np.uint8], source: _Source) -> None:
    target, done = bits.data, 0
    with source.path.open("rb", buffering=0) as stream:
        stream.seek(source.offset)
        while done < len(target):
            count = stream.readinto(target[done:])
            if not count:
                raise ValueError(f"{source.path} ends early")
            done += count
