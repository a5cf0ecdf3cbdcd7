"""What the start of a model follows from, as one digest: its files, our sources, the libraries, processor, environment.

Knows files; nothing is imported that is looked at.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from cag.models.digests import file_sha256

SCHEMA = 1
_SOURCES = ("cag", "cag_kernels", "cag_store")
_LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "numba",
    "llvmlite",
    "accelerate",
    "jinja2",
)
_NOTES = (".dist-info", ".egg-info")
_VARIABLES = ("CAG_", "TRANSFORMERS_", "USE_", "TORCH_", "ATEN_", "CUDA_", "ONEDNN_", "DNNL_", "MKL_", "NUMBA_")
_ELSEWHERE = (
    "CAG_HOME",
    "CAG_API_KEY",
    "CAG_MAX_BYTES",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
)  # say nothing of how a model is read
_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU part", "Features")


def start_facts(directory: Path) -> str:
    """Hex sha256 of all that decides what a process makes of the model in `directory`.

    Of the model's files every byte counts (`cag.models.digests` says when a file is the one that was read before); of
    sources, and of libraries with their versions, size, time of change and inode.

    Raises: OSError: a file that cannot be read.
    """
    directory = directory.resolve()
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "files": [[str(path.relative_to(directory)), file_sha256(path)] for path in _files(directory)],
        "sources": [[name, *_identity(path)] for name in _SOURCES for path in _sources(name)],
        "libraries": [[str(path), *_identity(path)] for path in _libraries()],
        "python": [sys.version, platform.machine(), platform.system()],
        "processor": _processor(),
        "environment": sorted(
            (name, value)
            for name, value in os.environ.items()
            if name.startswith(_VARIABLES) and not name.startswith(_ELSEWHERE)
        ),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sources(package: str) -> list[Path]:
    return sorted(path for folder in _folders(package) for path in folder.rglob("*.py"))


def _folders(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []


def _libraries() -> list[Path]:
    """Where the import of each begins, and the folders that say which versions are installed, by their names."""
    specs = [importlib.util.find_spec(name) for name in _LIBRARIES]
    origins = [Path(spec.origin) for spec in specs if spec is not None and spec.origin]
    folders = {origin.parent.parent for origin in origins}
    notes = [path for folder in sorted(folders) for path in folder.iterdir() if path.suffix in _NOTES]
    return origins + sorted(path for path in notes if path.name.partition("-")[0] in _LIBRARIES)


def _identity(path: Path) -> tuple[int, int, int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev


def _processor() -> list[str]:
    """What tells one processor from another; of several alike ones the first."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return [platform.processor()]
    first = text.partition("\n\n")[0].splitlines()
    return [line for line in first if line.partition("\t")[0].strip(" :") in _PROCESSOR]
