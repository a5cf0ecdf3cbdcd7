"""What a cache depends on, as four digests: weights, tokenizer, chat template, adapter. Knows files, not torch.

Fields of configuration files that change nothing in the keys and values (versions, names, the storage type) are left
out, so that saving a model again does not make its caches foreign.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cag.errors import UnsupportedModel
from cag.models.digests import file_sha256
from cag.models.directory import DESCRIPTIONS

COSMETIC_CONFIG_FIELDS = frozenset(
    {"transformers_version", "_name_or_path", "_model_name_or_path", "name_or_path", "torch_dtype", "dtype"}
)
COSMETIC_TOKENIZER_FIELDS = frozenset(
    {"transformers_version", "name_or_path", "chat_template", "is_local", "local_files_only", "processor_class"}
)
COSMETIC_ADAPTER_FIELDS = frozenset({"base_model_name_or_path", "inference_mode", "revision", "peft_version"})
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.model",
)
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # the only file that peft reads, where it is there
_MERGED = "each layer by itself"  # how adapters are: embedding and output matrix were one where they are tied
INDEX_FILES = "*.safetensors.index.json"


@dataclass(frozen=True)
class ModelFingerprints:
    """Hex sha256 digests of the parts of a model directory; `adapter` is None without one."""

    weights: str
    tokenizer: str
    template: str
    adapter: str | None = None


def model_fingerprint(directory: Path, adapter: Path | None = None) -> ModelFingerprints:
    """Digests of every byte that decides the keys and values of a prompt.

    Raises: UnsupportedModel when configuration, weights or tokenizer are missing or unreadable, or lie elsewhere.
    """
    return ModelFingerprints(
        weights=_digest(_network_parts(directory)),
        tokenizer=_digest(_tokenizer_parts(directory)),
        template=_digest(_template_parts(directory)),
        adapter=_digest(_adapter_parts(adapter)) if adapter else None,
    )


def _digest(parts: Iterable[tuple[str, str]]) -> str:
    """Digest of (label, content digest) pairs; both are framed, so no two lists collide."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def _network_parts(directory: Path) -> Iterable[tuple[str, str]]:
    """Configuration, weights, and which file has which of them: of two files with a weight, the index takes one."""
    config = _read_json(directory / "config.json")
    _refuse_other_files(directory / "config.json", config, "configuration_files")
    _check_names(directory / "config.json", [config.get("transformers_weights") or "model.safetensors"])
    if (directory / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{directory} holds an adapter beside its weights, which only some installations would load.",
            hint="Move the adapter to a folder of its own, and give that as the adapter.",
            path=directory,
        )
    yield from _weight_parts(directory, "config.json", config, COSMETIC_CONFIG_FIELDS)
    for name in DESCRIPTIONS:
        if (directory / name).exists():
            yield name, _text_digest(_canonical(_read_json(directory / name), frozenset()))
    for path in sorted(directory.glob(INDEX_FILES)):
        places = _read_json(path).get("weight_map")
        if not isinstance(places, dict):
            raise UnsupportedModel(f"{path} does not say where weights are.", path=path)
        _check_names(path, list(places.values()))
        yield path.name, _text_digest(_canonical(places, frozenset()))


def _adapter_parts(directory: Path) -> Iterable[tuple[str, str]]:
    config = _read_json(directory / "adapter_config.json")
    if not (directory / ADAPTER_WEIGHTS).is_file() and any(directory.glob("*.safetensors")):
        raise UnsupportedModel(
            f"{directory} holds no {ADAPTER_WEIGHTS}.",
            hint="Save the adapter as safetensors; pickled weights are never read.",
            path=directory,
        )
    yield "merged", _MERGED
    yield from _weight_parts(directory, "adapter_config.json", config, COSMETIC_ADAPTER_FIELDS)


def _check_names(path: Path, names: list[Any]) -> None:
    """Raises: UnsupportedModel unless all are names of safetensors files beside `path`."""
    for name in names:
        if not isinstance(name, str) or not name.endswith((".safetensors", INDEX_FILES[1:])) or Path(name).name != name:
            raise UnsupportedModel(
                f"{path} takes weights from {name!r}, which is no safetensors file beside it.",
                hint="Put all weight files into the model's folder.",
                path=path,
            )


def _refuse_other_files(path: Path, content: dict[str, Any], field: str) -> None:
    """Raises: UnsupportedModel for a file that lets transformers choose another one by its own version."""
    if content.get(field):
        raise UnsupportedModel(
            f"{path} names other files for other versions of transformers ({field}).",
            hint=f"Keep the file that is wanted as {path.name.replace('_config', '')}, and remove that field.",
            path=path,
        )


def _weight_parts(
    directory: Path, config_name: str, config: dict[str, Any], cosmetic: frozenset[str]
) -> Iterable[tuple[str, str]]:
    yield config_name, _text_digest(_canonical(config, cosmetic))
    weight_files = sorted(directory.glob("*.safetensors"))
    if not weight_files:
        raise UnsupportedModel(
            f"{directory} holds no *.safetensors file.",
            hint="Save the weights as safetensors; pickled weights are never read.",
            path=directory,
        )
    for path in weight_files:
        yield path.name, file_sha256(path)


def _tokenizer_parts(directory: Path) -> Iterable[tuple[str, str]]:
    present = sorted({path for name in TOKENIZER_FILES for path in directory.glob(name) if path.is_file()})
    if not present:
        raise UnsupportedModel(f"{directory} holds no tokenizer files.", path=directory)
    for path in present:
        if path.name == "tokenizer_config.json":
            content = _read_json(path)
            _refuse_other_files(path, content, "fast_tokenizer_files")
            yield path.name, _text_digest(_canonical(content, COSMETIC_TOKENIZER_FIELDS))
        else:
            yield path.name, file_sha256(path)


def _template_parts(directory: Path) -> Iterable[tuple[str, str]]:
    yield "chat_template", _text_digest(chat_template_text(directory) or "")
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        yield path.name, _text_digest(path.read_text(encoding="utf-8"))


def chat_template_text(directory: Path) -> str | None:
    """The chat template in `directory` (as JSON if it has several), None without one: that of the tokenizer, or that of
    the processor of a network that also sees, where only this has one."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in TEMPLATE_FILES:
        path = directory / name
        template = _read_json(path).get("chat_template") if path.is_file() else None
        if template is not None:
            return template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} cannot be read as JSON: {error}.", path=path) from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} does not hold a JSON object.", path=path)
    return content


def _canonical(content: dict[str, Any], cosmetic: frozenset[str]) -> str:
    kept = {key: value for key, value in content.items() if key not in cosmetic}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
