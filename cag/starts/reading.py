"""Weights from safetensors files to memory, on a thread, before torch is imported.

Each tensor is copied once, in the order in which a forward reads them: what is multiplied together lies side by side.
Weights lie in huge pages, or are packed on the way, in panels of a few rows, input feature by input feature
(`cag_kernels.packed`). Where fresh memory comes slowly, as on a virtual machine whose host has to find it first, the
rest stays in the pages of the file, unless it is packed. Knows the container and names of parameters; no torch, and no
network.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag.machine.memory_limits import available_memory_bytes
from cag_store.scratch import HUGE_PAGE_BYTES, huge_mapping, mapped_array

_ALIGNED = 64  # bytes: a weight begins with a line of the processor's cache
_ITEM_BYTES = 2
_TYPES = {"bfloat16": "BF16", "float16": "F16"}  # what a record calls them -> what files call them
_GRACE_S, _LEAST_RATE = (
    1.0,
    2e9,
)  # seconds, as torch's import takes, and bytes a second behind them, that reading may take
_MOST_THREADS = 2  # that pack: one beside torch's import, and another one behind it
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


@dataclass(frozen=True)
class _Part:
    """What of a source is wanted under which name: as it lies, or packed in panels of so many rows."""

    name: str
    source: _Source
    panel_rows: int = 0

    @property
    def num_bytes(self) -> int:
        rows = self.panel_rows
        if not rows:
            return self.source.num_bytes
        out_features, in_features = self.source.shape
        return -(-out_features // rows) * rows * in_features * _ITEM_BYTES


@dataclass(frozen=True, eq=False)
class WeightMemory:
    """Weights that were read: memories (uint8), the first one filled, the others pages of files; and of each name in
    which of them it lies, at which byte it begins there, and its shape `[out_features, in_features]`, which is also
    that of a weight whose panels lie there, its last rows filled up with zeros."""

    memories: list[NDArray[np.uint8]]
    places: dict[str, tuple[int, int, tuple[int, ...]]]


class WeightReading:
    """Reads the tensors `names` of the safetensors files of `directory`, all of one type of 16 bits, and packs others
    in panels of `panel_rows` rows, of which `packed` gives the names in the files; begins at once, and stops when the
    process ends."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        packed: Mapping[str, str] | None = None,
        panel_rows: int = 1,
        dtype: str = "bfloat16",
    ) -> None:
        self._found: WeightMemory | None = None
        arguments = directory, names, packed or {}, panel_rows, dtype
        self._thread = threading.Thread(target=self._read, args=arguments, name="cag-weights", daemon=True)
        self._thread.start()

    def result(self) -> WeightMemory | None:
        """All of them. None where files are not as they should be, or memory is short: who reads them in the usual way
        says what is wrong."""
        self._thread.join()
        return self._found

    def _read(
        self, directory: Path, names: Sequence[str], packed: Mapping[str, str], panel_rows: int, dtype: str
    ) -> None:
        try:
            sources = _sources(directory, _TYPES[dtype])
            parts = [_Part(name, sources[name]) for name in names]
            parts += [_Part(name, sources[source], panel_rows) for name, source in packed.items()]
            self._found = _read_all(sorted(parts, key=_place))
        except (OSError, ValueError, KeyError, TypeError):
            self._found = None


def _read_all(parts: Sequence[_Part], clock: Callable[[], float] = time.perf_counter) -> WeightMemory:
    num_bytes, is_packed = sum(_padded(part.num_bytes) for part in parts), any(part.panel_rows for part in parts)
    found = WeightMemory([_memory(num_bytes, huge=not is_packed)], {})
    begun, begin, mapped = clock(), 0, dict[Path, int]()
    packed: list[tuple[_Part, NDArray[np.uint8]]] = []
    for part in parts:
        source, is_slow = part.source, clock() - begun > _GRACE_S + begin / _LEAST_RATE
        if (mapped or is_slow) and not part.panel_rows:
            found.places[part.name] = _map(found, mapped, source), source.offset, source.shape
            continue
        memory = found.memories[0][begin : begin + part.num_bytes]
        if part.panel_rows:
            packed.append((part, memory))
        else:
            _fill(memory, source)
        found.places[part.name] = 0, begin, source.shape
        begin += _padded(part.num_bytes)
    _share_out(_pack, packed)
    return found


def _share_out(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """`work(item)` for all, on this thread and on others that end with the process. Raises what one of them raised."""
    left, errors = iter(items), list[Exception]()
    lock = threading.Lock()

    def take() -> None:
        while not errors:
            with lock:
                item = next(left, None)
            if item is None:
                return
            try:
                work(item)
            except Exception as error:  # raised again below
                errors.append(error)

    threads = [threading.Thread(target=take, name="cag-pack", daemon=True) for _ in range(_MOST_THREADS - 1)]
    for thread in threads if len(items) > 1 else []:
        thread.start()
    take()
    for thread in threads if len(items) > 1 else []:
        thread.join()
    if errors:
        raise errors[0]


def _map(found: WeightMemory, mapped: dict[Path, int], source: _Source) -> int:
    """Which memory holds the pages of a tensor's file; what is written there never gets to the file."""
    if source.offset % _ITEM_BYTES:
        raise ValueError(f"{source.path} has numbers at odd bytes")
    if source.path not in mapped:
        mapped[source.path] = len(found.memories)
        found.memories.append(np.memmap(source.path, dtype=np.uint8, mode="c"))
    return mapped[source.path]


def _place(part: _Part) -> tuple[int, int, str]:
    """The embedding, the layers one by one, what stands behind them; in a layer first what multiplies."""
    name = part.name
    layer = _LAYER.search(name)
    ranks = [rank for rank, ending in enumerate(_ORDER) if name.endswith(f"{ending}.weight")]
    first = -1 if "embed_tokens" in name else int(layer[1]) if layer else 1 << 30
    return first, ranks[0] if ranks else len(_ORDER), name


def _memory(num_bytes: int, *, huge: bool) -> NDArray[np.uint8]:
    """Packed weights are multiplied as quickly behind small pages, which a virtual machine has much sooner."""
    if available_memory_bytes() < num_bytes:
        raise OSError("too little memory")
    if not huge:
        return mapped_array((num_bytes,), np.uint8, huge=False)
    memory = np.frombuffer(huge_mapping(num_bytes + HUGE_PAGE_BYTES), dtype=np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE_BYTES
    return memory[first : first + num_bytes]


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED


def _sources(directory: Path, kind: str) -> dict[str, _Source]:
    """Every tensor of a type in the files by name. Raises: ValueError: a damaged file, or two with one name."""
    found: dict[str, _Source] = {}
    for path in sorted(directory.glob("*.safetensors")):
        entries = _header(path, kind)
        if not found.keys().isdisjoint(entries):
            raise ValueError("one name in two files")
        found |= entries
    return found


def _header(path: Path, kind: str) -> dict[str, _Source]:
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 0 < header_bytes <= min(_MOST_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"{path} has a header of {header_bytes} bytes")
        header: dict[str, Any] = dict(json.loads(stream.read(header_bytes)))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != kind:
            continue
        (begin, end), shape = entry["data_offsets"], tuple(int(size) for size in entry["shape"])
        source = _Source(path, 8 + header_bytes + begin, shape)
        fits = 0 <= begin <= end <= file_bytes - 8 - header_bytes and end - begin == source.num_bytes
        if not fits or any(size < 0 for size in shape):
            raise ValueError(f"{path} has {name} at bytes {begin} to {end}")
        found[name] = source
    return found


def _fill(memory: NDArray[np.uint8], source: _Source) -> None:
    target, done = memory.data, 0
    with source.path.open("rb", buffering=0) as stream:
        stream.seek(source.offset)
        while done < len(target):
            count = stream.readinto(target[done:])
            if not count:
                raise ValueError(f"{source.path} ends early")
            done += count


def _pack(part_and_memory: tuple[_Part, NDArray[np.uint8]]) -> None:
    """A weight from the pages of its file to panels `[num_panels, in_features, panel_rows]`, rows of zeros behind its
    last one."""
    part, memory = part_and_memory
    source, rows = part.source, part.panel_rows
    out_features, in_features = source.shape
    weight = np.memmap(source.path, dtype=np.uint16, mode="r", offset=source.offset, shape=source.shape)
    panels, whole = memory.view(np.uint16).reshape(-1, in_features, rows), out_features // rows
    panels[:whole] = weight[: whole * rows].reshape(whole, rows, in_features).transpose(0, 2, 1)
    if whole < len(panels):
        panels[whole, :, : out_features - whole * rows] = weight[whole * rows :].T
        panels[whole, :, out_features - whole * rows :] = 0
