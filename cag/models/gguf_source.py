"""GGUF files that users have: which one a name means, and the model that it becomes in the home.

A model is called by its file's name and the beginning of the sha256 of its bytes: a file that changed is another model,
and one that lies in two places is converted once. Knows files and names; converts nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from cag.errors import ModelError, UnsupportedModel
from cag.models.catalogue import GgufFileSource, ModelEntry
from cag.models.digests import file_sha256
from cag.models.gguf_file import GgufFile, model_stem, part_names, part_paths

CONVERTED_NAME = re.compile(r"[\w.-]+-[0-9a-f]{12}")
_DIGITS = 12  # of a sha256, in such a name
_CONVERT_MEMORY_BYTES = 700_000_000  # measured, rounded up: it does not grow with the model
_BESIDE_WEIGHTS_BYTES = 50_000_000  # a tokenizer's files
_NO_NETWORKS = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # projectors of images, statistics for quantizing


def is_gguf(name: str) -> bool:
    """Whether a file of that name holds a model as GGUF, whole or the first part of it."""
    return name.endswith(".gguf") and not _NO_NETWORKS.search(Path(name).name) and part_names(name)[0] == name


def the_gguf(names: Sequence[str], wanted: str | None, place: str) -> str | None:
    """Of the files of `place` the one that holds the model: the only one, or the one that `wanted` names, as a
    quantization (`Q4_K_M`) or as a file; None where there is none at all and none is wanted.

    Raises: UnsupportedModel: none or several, which are listed.
    """
    models = sorted(name for name in names if is_gguf(name))
    found = models
    if wanted is not None:
        tag = re.compile(rf"(^|[-._/]){re.escape(wanted)}([-._/]|$)", re.IGNORECASE)
        found = [name for name in models if name == wanted] or [name for name in models if tag.search(name[:-5])]
    if len(found) == 1:
        return found[0]
    if not models and wanted is None:
        return None
    what = f"{len(found)} GGUF files" if found else f"no GGUF file {wanted!r}"
    raise UnsupportedModel(
        f"{place} has {what}; there are: {', '.join(models) or 'none'}.",
        hint="Choose one by its path, or on the hub as org/name:Q4_K_M or org/name:FILE.gguf.",
    )


def gguf_entry(path: Path) -> ModelEntry:
    """What a pull makes of the GGUF file at `path`, or of all parts of it.

    Raises: UnsupportedModel: parts are missing. ModelError: it cannot be read.
    """
    parts = part_paths(path)
    try:
        digests = [file_sha256(part) for part in parts]
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}", path=path) from error
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    stem = re.sub(r"[^\w.-]+|^[.]+", "-", model_stem(path))
    source = GgufFileSource(tuple(part.absolute() for part in parts), sha256)
    return ModelEntry(
        name=f"{stem}-{sha256[:_DIGITS]}",
        kind="chat",
        licence="that of the file",
        summary=f"converted from {path.name}",
        sources=(source,),
        stored_bytes=0,
        convert_memory_bytes=_CONVERT_MEMORY_BYTES,
    )


def converted_bytes(path: Path) -> int:
    """Bytes that the model of the GGUF file at `path` takes when it is converted. Raises: UnsupportedModel."""
    with GgufFile(path) as file:
        return _BESIDE_WEIGHTS_BYTES + sum(2 * tensor.num_rows * tensor.shape[-1] for tensor in file.tensors)
