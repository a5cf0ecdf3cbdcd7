"""Reads the GGUF container: metadata, and tensors as float32 blocks of rows. Knows the file format, not models.

A model may be cut into several files, which are read as one. No size in a file is believed before it is compared with
what is left of the file.
Source: the GGUF specification, github.com/ggml-org/ggml, docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
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
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` with rows first (the file has it reversed), `start` counted from the begin of the file
    number `part`."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    start: int
    part: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the last dimension, which is the one that is quantized in blocks."""
        return prod(self.shape[:-1])


def part_names(name: str) -> list[str]:
    """Names of all files of the model that the file called `name` holds or holds a part of, in order."""
    match = _PART_NAME.fullmatch(name)
    if match is None:
        return [name]
    stem, _, count = match.groups()
    return [f"{stem}-{number:05}-of-{count}.gguf" for number in range(1, max(1, int(count)) + 1)]


def part_paths(path: Path) -> tuple[Path, ...]:
    """As `part_names`, of the file at `path`. Raises: UnsupportedModel: a part is not there."""
    parts = tuple(path.with_name(name) for name in part_names(path.name))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UnsupportedModel(
            f"{path} is one of {len(parts)} parts of a model, and these are not beside it: {', '.join(missing[:3])}.",
            hint="Put all parts into one folder.",
            path=path,
        )
    return parts


def model_stem(path: Path) -> str:
    """What the file at `path` is called, without the number of a part."""
    match = _PART_NAME.fullmatch(path.name)
    return match[1] if match else path.stem


class GgufFile:
    """An open GGUF file, or all parts of one that was cut; a context manager.

    Raises: UnsupportedModel on opening when a file is no GGUF, of another version, cut off or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents: list[mmap.mmap] = []
        parts = part_paths(path)
        try:
            read = [self._read_part(number, part) for number, part in enumerate(parts)]
            self.metadata, self.tensors = read[0][0], tuple(tensor for _, tensors in read for tensor in tensors)
            self._check_parts([metadata for metadata, _ in read])
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def row_blocks(
        self, tensor: GgufTensor, first_row: int = 0, num_rows: int | None = None, *, multiple: int = 1
    ) -> Iterator[NDArray[np.float32]]:
        """Rows of `tensor` as float32 `[count, shape[-1]]`, a bounded number at a time, in order; whole multiples of
        `multiple` rows but for the last ones. A tensor of one dimension is one row.

        Raises: UnsupportedModel: numbers in a type that cannot be read.
        """
        kind, row_bytes = _row_layout(tensor)
        end = tensor.num_rows if num_rows is None else first_row + num_rows
        rows_at_once = max(1, _ROW_BLOCK_VALUES // tensor.shape[-1] // multiple) * multiple
        for first in range(first_row, end, rows_at_once):
            count = min(rows_at_once, end - first)
            start = tensor.start + first * row_bytes
            # A writable copy of the bytes: no array keeps the mapping open, and torch may borrow the result.
            content = bytearray(self._contents[tensor.part][start : start + count * row_bytes])
            yield self._numbers(np.frombuffer(content, dtype=np.uint8).reshape(count, row_bytes), kind, tensor)

    def _numbers(self, packed: NDArray[np.uint8], kind: Any, tensor: GgufTensor) -> NDArray[np.float32]:
        from gguf.quants import dequantize

        try:
            values = dequantize(packed, kind)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"tensor {tensor.name} of {self.path} is quantized as {kind.name}, which is not read.",
                hint="Take the model in another quantization.",
                path=self.path,
            ) from error
        return np.ascontiguousarray(values, dtype=np.float32).reshape(len(packed), tensor.shape[-1])

    def _read_part(self, number: int, path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
        if path.stat().st_size < 24:
            raise UnsupportedModel(f"{path} is too short for a GGUF file.", path=path)
        with path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._contents.append(content)
        try:
            return _Header(content, number).read()
        except (struct.error, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UnsupportedModel(f"{path} is not a readable GGUF file: {error}.", path=path) from error

    def _check_parts(self, read: list[dict[str, Any]]) -> None:
        """Whether the files are the parts of one model, all of them, in this order."""
        counts = [metadata.get("split.count", 1) or 1 for metadata in read]
        numbers = [metadata.get("split.no", 0) for metadata in read]
        num_tensors = self.metadata.get("split.tensors.count", len(self.tensors))
        names = {tensor.name for tensor in self.tensors}
        right = counts == [len(read)] * len(read) and numbers == list(range(len(read)))
        if not right or num_tensors != len(self.tensors) or len(names) != len(self.tensors):
            raise UnsupportedModel(
                f"{self.path} and the {len(read) - 1} other files are not the parts of one model: they say that they "
                f"are numbers {numbers} of {counts} with {num_tensors} tensors, and hold {len(names)}.",
                hint="Take all parts of one model, under their own names, or join them with llama-gguf-split --merge.",
                path=self.path,
            )

    def _close(self) -> None:
        for content in self._contents:
            content.close()


class _Header:
    """Reads what stands before the tensors of one file."""

    def __init__(self, content: mmap.mmap, part: int) -> None:
        self._content = content
        self._part = part
        self._position = 0

    def read(self) -> tuple[dict[str, Any], list[GgufTensor]]:
        """Metadata and tensors. Raises: ValueError, KeyError, struct.error: damaged."""
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
        tensors = [
            GgufTensor(name, shape, kind, data_start + offset, self._part) for name, shape, kind, offset in entries
        ]
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
        if 0 in tensor.shape or tensor.start + tensor.num_rows * row_bytes > len(self._content):
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
    row_values = tensor.shape[-1]
    if row_values % block_values:
        raise ValueError(f"tensor {tensor.name} has rows of {row_values} values in blocks of {block_values}")
    return kind, row_values // block_values * block_bytes
