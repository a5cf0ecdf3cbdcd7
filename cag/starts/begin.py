"""Beginning a start before torch is imported: weights are read on a thread meanwhile, if a record says which.

In: the name of a model and what is wanted of it. Out: a `Beginning`, or None where nothing holds that was kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cag.models import local_directory
from cag.models.read_files import ReadFiles
from cag.starts.facts import start_facts
from cag.starts.reading import WeightMemory, WeightReading
from cag.starts.record import Start, read_start, read_tokenizer_tables, record_path
from cag.starts.tokenizer import read_tables

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DEVICES, _DTYPES = ("auto", "cpu"), ("auto", "bfloat16", "float32")  # that a start can be kept for


class Beginning:
    """The start of a model on its way.

    Attributes:
        directory: the model's files.
        path: of the record.
        start: what it says.
        files: what is read.
    """

    def __init__(self, directory: Path, path: Path, start: Start, tables: bytes) -> None:
        self.directory, self.path, self.start = directory, path, start
        arguments = start.parameters, start.packed_sources, start.panel_rows, start.stored_dtype
        self.files = ReadFiles.before_reading(directory)
        self._weights = WeightReading(directory, *arguments)
        self._tables = tables

    def weights(self) -> WeightMemory | None:
        """See `WeightReading.result`."""
        return self._weights.result()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer's tables; None if they are none. Made here: it holds Python's lock, which imports want too."""
        try:
            return read_tables(self._tables)
        except ValueError:
            return None

    def holds(self) -> bool:
        """Whether everything is as it was when the record was written, the files that were read meanwhile too."""
        try:
            return start_facts(self.directory) == self.start.facts
        except OSError:
            return False


def begin_model(model: str, *, adapter: Path | None, device: str, dtype: str) -> Beginning | None:
    """As `begin`, for a name that `cag.models.fetch_model` takes; None where it would have to ask a hub."""
    return begin(local_directory(model), adapter=adapter, device=device, dtype=dtype)


def begin(directory: Path, *, adapter: Path | None, device: str, dtype: str) -> Beginning | None:
    """Begin to read the model in `directory`, if an earlier start of it was kept and all that it follows from is as
    it was."""
    if not can_be_kept(adapter, device, dtype):
        return None
    path = record_path(directory, device, dtype)
    start = read_start(path)
    tables = read_tokenizer_tables(path, start) if start is not None else None
    try:
        if start is None or tables is None or start_facts(directory) != start.facts:
            return None
    except OSError:
        return None
    return Beginning(directory, path, start, tables)


def can_be_kept(adapter: Path | None, device: str, dtype: str) -> bool:
    """Whether there are starts for what is wanted of a model: on a CPU, without an adapter."""
    return adapter is None and device in _DEVICES and dtype in _DTYPES
