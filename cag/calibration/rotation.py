"""How positions turn a model's keys: found by trial, not read off a configuration.

A text that is one token long has the same hidden state in every layer, wherever it stands: whatever a layer mixes or
remembers, there is nothing else. So its keys at several positions differ by their rotation alone, and a rotation is
right for a layer when it makes them equal again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cag.calibration.observe import keys_at
from cag.model import LanguageModel
from cag_store.codecs.transform import Rotation
from cag_store.codecs.transform.product import rotated

_POSITIONS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 77, 95)
_TOLERANCE = 0.02  # of the keys' norm: rounding in 16-bit models stays below, a wrong rotation far above


def find_rotations(model: LanguageModel) -> tuple[tuple[Rotation, ...], tuple[int, ...]]:
    """The rotations of a model, and for each layer which of them is its own: -1 where none fits or is needed."""
    keys = _keys_of_one_token(model)
    candidates = [None, *_candidates(model)]
    chosen = [next((c for c in candidates if _steady(layer, c)), None) for layer in keys]
    used = tuple(dict.fromkeys(rotation for rotation in chosen if rotation is not None))
    return used, tuple(-1 if rotation is None else used.index(rotation) for rotation in chosen)


def _candidates(model: LanguageModel) -> Iterator[Rotation]:
    """Inverse frequencies that the model's modules hold, in either pairing."""
    seen = set[tuple[float, ...]]()
    for name, buffer in model.network.named_buffers():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith("inv_freq") and "original" not in leaf and buffer.ndim == 1:
            frequencies = tuple(float(number) for number in buffer.double().cpu())
            if frequencies not in seen:
                seen.add(frequencies)
                yield from (Rotation(pairing, frequencies) for pairing in ("halves", "adjacent"))


def _steady(keys: np.ndarray[Any, np.dtype[np.float32]], rotation: Rotation | None) -> bool:
    """Whether `rotation` taken off `[num_kv_heads, num_positions, head_dim]` leaves the same key at every position."""
    if rotation is not None:
        if 2 * len(rotation.inverse_frequencies) > keys.shape[2]:
            return False
        cosines, sines = (angles[list(_POSITIONS)] for angles in rotation.angles(0, _POSITIONS[-1] + 1))
        keys = rotated(keys, cosines, -sines, rotation.pairs)
    spread = np.linalg.norm(keys - keys.mean(axis=1, keepdims=True))
    return bool(spread <= _TOLERANCE * np.linalg.norm(keys))


def _keys_of_one_token(model: LanguageModel) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Of each layer, `[num_kv_heads, num_positions, head_dim]`."""
    token = int(torch.tensor(model.tokenizer("the", add_special_tokens=False)["input_ids"])[-1])
    found = zip(*(keys_at(model, token, position) for position in _POSITIONS), strict=True)
    return [torch.cat(keys, dim=1).float().cpu().numpy() for keys in found]
