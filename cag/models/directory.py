"""What a usable model directory holds: configuration, safetensors weights, a tokenizer. Reads names and JSON only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cag.errors import UnsupportedModel

_TOKENIZER_CHOICES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
UNPACKED = ("fp8", "mxfp4", "compressed-tensors", "bitsandbytes", "gptq", "awq", "auto-round")  # formats that are read
DESCRIPTIONS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of older checkpoints, beside config.json
TAKE_ANOTHER = f"Take the model unquantized, or in one of {', '.join(UNPACKED)}."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_directory(directory: Path) -> None:
    """Raises: UnsupportedModel naming the first thing that is missing or damaged."""
    _check_config(directory)
    _check_weights(directory)
    if not any(all((directory / name).is_file() for name in choice) for choice in _TOKENIZER_CHOICES):
        raise _unsupported(directory, "has no tokenizer", "It needs tokenizer.json, or the vocabulary files of one.")


def quantized_format(described: Any, place: object) -> str:
    """The format of quantized weights that is described. Raises: UnsupportedModel: one that is not read."""
    method = described.get("quant_method") if isinstance(described, dict) else described
    if method not in UNPACKED:
        message = f"the weights in {place} are quantized as {method!r}, which is not read."
        raise UnsupportedModel(message, hint=TAKE_ANOTHER, path=place)
    return str(method)


def _check_config(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        raise _unsupported(directory, "has no config.json", "Point at the folder that `save_pretrained` wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unsupported(directory, f"has an unreadable config.json ({error})", "Fetch the model again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise _unsupported(directory, "has a config.json without model_type", "It is not a transformers model.")
    if config.get("quantization_config") is not None:
        quantized_format(config["quantization_config"], directory)


def _check_weights(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(name for name in _shard_names(index) if not (directory / name).is_file())
        if missing:
            raise _unsupported(directory, f"lacks weight files: {', '.join(missing)}", "Fetch the model again.")
    elif not any(directory.glob("*.safetensors")):
        pickled = any(any(directory.glob(pattern)) for pattern in _PICKLES)
        found = "has pickled weights only, which are never read" if pickled else "has no *.safetensors file"
        raise _unsupported(directory, found, "Take or save the weights as safetensors.")


def _shard_names(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unsupported(
            index.parent, f"has an unreadable {index.name} ({error})", "Fetch the model again."
        ) from error


def _unsupported(directory: Path, found: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"{directory} {found}.", hint=hint, path=directory)
