"""Reads the GGUF container: metadata, and tensors as float32 blocks of rows. Knows the file format, not models.

No size in the file is believed before it is compared with what is left of the file.
Source: the GGUF specification, github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag.errors import UnsupportedModel

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_ROW_BLOCK_VALUES = 1 << 20  # values dequantized at once; 16 times more is half as fast, out of the processor cache


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` with rows first (the file has it reversed), `start` counted from the begin of the file."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    start: int


class GgufFile:
    """An open GGUF file; a context manager.

    Raises: UnsupportedModel on opening when the file is no GGUF, of another version, cut off or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size < 24:
            raise UnsupportedModel(f"{path} is too short for a GGUF file.", path=path)
        with path.open("rb") as stream:
            self._content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 0
        try:
            self.metadata, self.tensors = self._read_header()
        except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
            self._content.close()
            raise UnsupportedModel(f"{path} is not a readable GGUF file: {error}.", path=path) from error

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._content.close()

    def row_blocks(self, tensor: GgufTensor) -> Iterator[NDArray[np.float32]]:
        """The values of `tensor` as float32 `[num_rows, *rest]`, a bounded number of rows at a time, in order."""
        from gguf.quants import dequantize

        kind, row_bytes = _row_layout(tensor)
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        rows_at_once = max(1, _ROW_BLOCK_VALUES // max(1, int(np.prod(tensor.shape)) // num_rows))
        for first in range(0, num_rows, rows_at_once):
            count = min(rows_at_once, num_rows - first)
            start = tensor.start + first * row_bytes
            # A writable copy of the bytes: no array keeps the mapping open, and torch may borrow the result.
            packed = np.frombuffer(bytearray(self._content[start : start + count * row_bytes]), dtype=np.uint8)
            values = dequantize(packed.reshape(count, row_bytes), kind)
            yield np.ascontiguousarray(values, dtype=np.float32).reshape(_block_shape(tensor, count))

    def _read_header(self) -> tuple[dict[str, Any], tuple[GgufTensor, ...]]:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._position = 4
        version, num_tensors, num_entries = self._unpack("<I"), self._unpack("<Q"), self._unpack("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        metadata = {self._string(): self._value(self._unpack("<I")) for _ in range(num_entries)}
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        data_start = -(-self._position // alignment) * alignment
        tensors = tuple(GgufTensor(name, shape, kind, data_start + offset) for name, shape, kind, offset in entries)
        for tensor in tensors:
            self._check_extent(tensor)
        return metadata, tensors

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._unpack("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._unpack("<Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._unpack("<I"), self._unpack("<Q")

    def _check_extent(self, tensor: GgufTensor) -> None:
        _, row_bytes = _row_layout(tensor)
        num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        if 0 in tensor.shape or tensor.start + num_rows * row_bytes > len(self._content):
            raise ValueError(f"tensor {tensor.name} reaches beyond the end of the file")

    def _unpack(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._content, self._position)
        self._position += struct.calcsize(layout)
        return value

    def _string(self) -> str:
        length = self._unpack("<Q")
        end = self._position + length
        if end > len(self._content):
            raise ValueError("a text reaches beyond the end of the file")
        text = self._content[self._position : end].decode("utf-8")
        self._position = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])
        item_kind, length = self._unpack("<I"), self._unpack("<Q")
        if length > len(self._content) - self._position:
            raise ValueError("a list reaches beyond the end of the file")
        return [self._value(item_kind) for _ in range(length)]


def _row_layout(tensor: GgufTensor) -> tuple[Any, int]:
    """The quantization type of `tensor` and the bytes of one of its rows."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType(tensor.quantization)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    row_values = int(np.prod(tensor.shape[1:], dtype=object)) if len(tensor.shape) > 1 else tensor.shape[0]
    if row_values % block_values:
        raise ValueError(f"tensor {tensor.name} has rows of {row_values} values in blocks of {block_values}")
    return kind, row_values // block_values * block_bytes


def _block_shape(tensor: GgufTensor, num_rows: int) -> tuple[int, ...]:
    return (num_rows, *tensor.shape[1:]) if len(tensor.shape) > 1 else tensor.shape
