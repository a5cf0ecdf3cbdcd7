"""How positions turn queries and keys in a GGUF file -> `rope_parameters` as transformers has them.

Some of it stands in fields, some in small tensors of factors: those of Llama 3 are recognized by computing them anew,
as transformers keeps the numbers that they follow from. What is not recognized is refused. Knows numbers only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag.models.gguf_fields import Fields

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_WITH_LLAMA3 = ("llama", "smollm3", "granite")
_SAME = 1e-5  # relative difference of numbers that were computed in float32 in another order


def read_rope(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Raises: UnsupportedModel: scaling that is not known here, or factors that follow from none that is."""
    theta = fields.number("rope.freq_base", 10000.0)
    turned = fields.number("rope.dimension_count", head_dim)
    kind = fields.get("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", 1.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    factors = {name: _factors(fields, name, turned // 2) for name in ("freqs", "factors_long", "factors_short")}
    if kind == "yarn":
        original = fields.number("rope.scaling.original_context_length")
        rope |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": original}
    elif kind == "linear" or (kind == "none" and factor != 1.0 and factor):  # llama.cpp takes none for linear
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif kind not in ("none", "longrope"):
        raise fields.refused(f"has positions scaled as {kind!r}, which is not known here")
    if turned != head_dim:
        if fields.architecture != "phi3":
            raise fields.refused(f"turns {turned} of {head_dim} dimensions of a head, which is not known here")
        rope["partial_rotary_factor"] = turned / head_dim
    if factors["freqs"] is not None:
        return rope | _llama3(fields, rope, factors["freqs"])
    return rope | _longrope(fields, kind, factors["factors_long"], factors["factors_short"])


def _factors(fields: Fields, name: str, length: int) -> NDArray[np.float32] | None:
    """The small tensor `rope_<name>.weight`; None without one."""
    for tensor in fields.file.tensors:
        if tensor.name == f"rope_{name}.weight":
            if tensor.shape != (length,):
                raise fields.refused(f"has {tensor.name} of shape {tensor.shape}, where {length} numbers are expected")
            row: NDArray[np.float32] = next(fields.file.row_blocks(tensor))[0]
            return row
    return None


def _llama3(fields: Fields, rope: dict[str, Any], found: NDArray[np.float32]) -> dict[str, Any]:
    """Source: the RoPE of Llama 3.1, as transformers computes it (`llama3`)."""
    scaled = {"rope_type": "llama3", "factor": float(str(found.max())), **_LLAMA3}
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(len(found)) / len(found))
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    smooth = (turns - _LLAMA3["low_freq_factor"]) / (_LLAMA3["high_freq_factor"] - _LLAMA3["low_freq_factor"])
    smooth = np.clip(smooth, 0, 1)
    expected = 1 / ((1 - smooth) / scaled["factor"] + smooth)
    if rope["rope_type"] != "default" or fields.architecture not in _WITH_LLAMA3 or _differ(found, expected):
        raise fields.refused("has factors of positions (rope_freqs.weight) that are not those of Llama 3")
    return scaled


def _longrope(
    fields: Fields, kind: str, long: NDArray[np.float32] | None, short: NDArray[np.float32] | None
) -> dict[str, Any]:
    is_phi3, window = fields.architecture == "phi3", fields.number("context_length")
    original = fields.number("rope.scaling.original_context_length", window) if is_phi3 else window
    if long is None and short is None and kind != "longrope" and original == window:
        return {}
    if long is None or short is None or not is_phi3:
        raise fields.refused("has positions scaled as 'longrope', but not the factors of a Phi-3")
    scale = window / original
    expected = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    given = fields.number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(given, expected, rel_tol=_SAME):
        raise fields.refused(f"multiplies scores by {given} (rope.scaling.attn_factor), where {expected} is expected")
    return {
        "rope_type": "longrope",
        "short_factor": [float(str(value)) for value in short],
        "long_factor": [float(str(value)) for value in long],
        "original_max_position_embeddings": original,
    }


def _differ(found: NDArray[np.float32], expected: NDArray[Any]) -> bool:
    return not np.allclose(found, expected, rtol=_SAME, atol=0)
