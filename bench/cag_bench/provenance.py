"""Where figures come from: machine, commit and versions, as they stand in each row."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from cag.machine.runtime import processor_name, usable_cores
from cag.machine.versions import ENGINE, installed_version, installed_versions
from cag.model import LanguageModel

DISTRIBUTIONS = (
    "cag-engine",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "zstandard",
    "bm25s",
    "triton",
    "flash-attn",
)


def machine_facts(model: LanguageModel) -> dict[str, Any]:
    """What `device_facts` says, and how forwards run (dtype and threads, with what led to them)."""
    return device_facts(model.device) | {
        "compute_dtype": str(model.compute_dtype).removeprefix("torch."),
        "kv_dtype": str(model.kv_dtype).removeprefix("torch."),
        "plan": asdict(model.plan),
    }


def device_facts(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory and device."""
    on_gpu = device.type == "cuda"
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


def load_average() -> list[float]:
    """The load averages of the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in psutil.getloadavg()]


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that are installed here."""
    return installed_versions(DISTRIBUTIONS)


def commit(directory: Path = Path(__file__).resolve().parent) -> str:
    """The commit that holds this code, `-dirty` behind it when tracked files differ; the version without a commit.

    A repository that merely surrounds the installed code does not count: it must track this file.
    """
    here = Path(__file__).name
    if _git(directory, "ls-files", "--error-unmatch", here) is None:
        return _version()
    head = _git(directory, "rev-parse", "HEAD")
    if head is None:
        return _version()
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def _version() -> str:
    return f"v{installed_version(ENGINE)}"


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints, None when there is no git or it refuses."""
    program = shutil.which("git")
    if program is None:
        return None
    done = subprocess.run(
        [program, "-C", str(directory), *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip() if done.returncode == 0 else None
