"""A call to emitted code: int64 in memory, one a field, and a function under construction that reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Generic, TypeVar

from cag_kernels.cpu.emit import INT64, POINTER, Emitter, Value

Emits = TypeVar("Emits", bound=Emitter)


class Fields(Generic[Emits]):
    """The fields of the call that a function's only argument points to, as its first instructions read them."""

    def __init__(self, emit: Emits, fields: Sequence[IntEnum], addresses: Collection[int]) -> None:
        """`fields`: those that are read; `addresses`: which of them are pointers."""
        self.emit, self._addresses = emit, addresses
        self._fields = {field: self._read(field) for field in fields}

    def _read(self, field: IntEnum) -> Value:
        value = self.emit.builder.load(self.place(field), typ=INT64, align=8)
        return self.emit.builder.inttoptr(value, POINTER) if field in self._addresses else value

    def place(self, field: IntEnum) -> Value:
        """Address of a field."""
        return self.emit.at(self.emit.function.args[0], int(field), INT64)

    def __getitem__(self, field: IntEnum) -> Value:
        return self._fields[field]
