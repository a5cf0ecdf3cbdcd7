"""What `--codec` accepts: an id, `ID@STEP`, or a configuration as a JSON object. Knows no model and no store."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from cag.errors import UsageError

LADDER = ("lossless", "int8", "int4", "transform@-620", "transform@-580", "transform@-515", "transform@-445")

_STEP = re.compile(r"-?[0-9]+")


def parse_codecs(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Configurations, as far as they are written out; each once.

    Raises: `UsageError` for what is neither an id, `ID@STEP` nor a JSON object with an `id`, and for none at all.
    """
    found: list[dict[str, Any]] = []
    for text in texts:
        codec = _parse(text.strip())
        if codec not in found:
            found.append(codec)
    if not found:
        raise UsageError("no codec is named.")
    return found


def _parse(text: str) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            codec = json.loads(text)
        except ValueError as error:
            raise UsageError(f"codec {text!r} is no JSON: {error}.") from error
        if isinstance(codec, dict) and isinstance(codec.get("id"), str):
            return codec
        raise UsageError(f"codec {text!r} has no id.")
    codec_id, separator, step = text.partition("@")
    if not codec_id or (separator and not _STEP.fullmatch(step)):
        raise UsageError(f"codec {text!r} is neither an id nor ID@STEP.", hint=f"For example {', '.join(LADDER)}.")
    return {"id": codec_id, "step": int(step)} if separator else {"id": codec_id}


def codec_label(codec: dict[str, Any]) -> str:
    """A configuration in a few words, for tables."""
    label = f"{codec['id']}@{codec['step']}" if "step" in codec else str(codec["id"])
    wide = codec.get("wide_key_layers")
    return f"{label}, keys of {len(wide)} layers wide" if wide else label
