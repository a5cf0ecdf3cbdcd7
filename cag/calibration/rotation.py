"""How positions turn a model's keys: found by trial, not read off a configuration.

A text of one repeated token has the same hidden state at every position, in every layer, since attention only ever
averages equal values. So
its keys differ by their rotation alone, and a rotation is right for a layer when it makes them equal again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cag.model import LanguageModel
from cag_store.codecs.transform import Rotation
from cag_store.codecs.transform.product import rotated

_NUM_TOKENS = 96
_TOLERANCE = 0.02  # of the keys' norm: rounding in 16-bit models stays below, a wrong rotation far above


def find_rotations(model: LanguageModel) -> tuple[tuple[Rotation, ...], tuple[int, ...]]:
    """The rotations of a model, and for each layer which of them is its own: -1 where none fits or is needed."""
    keys = _keys_of_repeated_token(model)
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
    """Whether `rotation` taken off `[num_kv_heads, num_tokens, head_dim]` leaves every token with the same key."""
    if rotation is not None:
        if 2 * len(rotation.inverse_frequencies) > keys.shape[2]:
            return False
        cosines, sines = rotation.angles(0, keys.shape[1])
        keys = rotated(keys, cosines, -sines, rotation.pairs)
    spread = np.linalg.norm(keys - keys.mean(axis=1, keepdims=True))
    return bool(spread <= _TOLERANCE * np.linalg.norm(keys))


def _keys_of_repeated_token(model: LanguageModel) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    state = model.new_state(capacity=_NUM_TOKENS)
    token = int(torch.tensor(model.tokenizer("the", add_special_tokens=False)["input_ids"])[-1])
    model.forward([token] * _NUM_TOKENS, state)
    return [_array(keys[:, :_NUM_TOKENS]) for keys in state.tail.keys]


def _array(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.float().cpu().numpy()
