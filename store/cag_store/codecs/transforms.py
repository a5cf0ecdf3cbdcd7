"""Array -> array steps on bit patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from cag_store.codecs.base import Config, Transform, checked_int, refuse_unknown_keys
from cag_store.dtypes import Array


class Rotate(Transform):
    """Rotate bit patterns left by `bits`: with 1, the exponent of bfloat16 and float32 fills the top byte."""

    codec_id = "rotate"

    def __init__(self, bits: int = 1) -> None:
        self.bits = bits

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: `bits`, 0 to 15."""
        refuse_unknown_keys(cls.codec_id, config, ("bits",))
        return cls(checked_int(cls.codec_id, config, "bits", 1, 0, 15))

    def config(self) -> Config:
        """The full configuration."""
        return {"id": self.codec_id, "bits": self.bits}

    def forward(self, bits: Array) -> Array:
        """A new, contiguous array."""
        left, right = self._shifts(bits)
        return np.ascontiguousarray((bits << left) | (bits >> right))

    def inverse_into(self, bits: Array, out: Array) -> None:
        """Undo `forward`."""
        left, right = self._shifts(bits)
        np.right_shift(bits, left, out=out)
        bits <<= right
        out |= bits

    def _shifts(self, bits: Array) -> tuple[Any, Any]:
        width = bits.dtype.itemsize * 8
        return bits.dtype.type(self.bits), bits.dtype.type((width - self.bits) % width)
