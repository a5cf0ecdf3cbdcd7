"""The result files of a run. Rows are written as they are measured, so that a run that breaks off leaves its samples.

`results.jsonl` holds one row a sample (`"kind": "sample"`) and, last, one row for the run (`"kind": "run"`); each row
carries machine, commit and versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from cag_bench.measure import Sample

RESULTS, SUMMARY, TABLE, PLOT, QUALITY_PLOT = "results.jsonl", "summary.json", "table.md", "ttft.png", "quality.png"
STORE_PLOT, KERNELS_PLOT = "store.png", "kernels.png"
WRITTEN_LAST = (SUMMARY, TABLE, PLOT, QUALITY_PLOT, STORE_PLOT, KERNELS_PLOT)


class ResultRows:
    """`results.jsonl` in a directory; an older one is replaced, and what was made of its rows is removed, as it would
    stand beside the rows of a run that breaks off as if it were theirs. A context manager.

    Each row gets `origin`: machine, commit and versions, as they are when the row is written.
    """

    def __init__(self, directory: Path, origin: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN_LAST:
            (directory / name).unlink(missing_ok=True)
        self._origin = origin
        self._file = (directory / RESULTS).open("w", encoding="utf-8")

    def __enter__(self) -> ResultRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write_sample(self, sample: Sample) -> None:
        """Append one sample."""
        self.write_row("sample", sample.to_json())

    def write_run(self, facts: dict[str, Any]) -> None:
        """Append the row of the run."""
        self.write_row("run", facts)

    def write_row(self, kind: str, content: dict[str, Any]) -> None:
        """Append a row of any kind."""
        self._file.write(json.dumps({"kind": kind, **self._origin, **content}, ensure_ascii=False) + "\n")
        self._file.flush()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One object, indented."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
