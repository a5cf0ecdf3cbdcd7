"""`int4`: 4-bit codes, two to a byte; keys per channel over groups of tokens, values per token over groups of channels.
Layout and arithmetic: docs/format.md 5.3. What it shares with `int8` is in `grouped`; the group sizes, the order of the
codes in a byte and the wide layers are explained in docs/design/002-store.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from cag_store.codecs.base import Config, Packer, Side, checked_int, refuse_unknown_keys
from cag_store.codecs.grouped import GroupedIntegers
from cag_store.codecs.widths import BYTES, NIBBLES
from cag_store.errors import UnknownCodec

MAX_LAYER = 998

_KEYS = (
    "group_tokens",
    "group_channels",
    "exact_tokens",
    "recent_tokens",
    "chunk_tokens",
    "wide_key_layers",
    "packer",
)


class Int4(GroupedIntegers):
    """Error at most half a step: (max - min) / 30 of the group, plus the rounding of its offset and of the storage
    dtype. In a chunk of fewer than `chunk_tokens` tokens, the end of a prefix, the last `recent_tokens` are exact. The
    keys of `wide_key_layers` have 8-bit codes."""

    codec_id = "int4"
    widths = {4: NIBBLES, 8: BYTES}

    def __init__(
        self,
        group_tokens: int = 64,
        exact_tokens: int = 4,
        packer: Packer | None = None,
        *,
        group_channels: int = 64,
        recent_tokens: int = 32,
        chunk_tokens: int = 512,
        wide_key_layers: Sequence[int] = (),
    ) -> None:
        super().__init__(group_tokens, exact_tokens, packer)
        self.group_channels = group_channels
        self.recent_tokens = recent_tokens
        self.chunk_tokens = chunk_tokens
        self.wide_key_layers = tuple(wide_key_layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: those of `int8`, `group_channels` 1 to 65536, `recent_tokens` 0 to 65536, `chunk_tokens` 1 to 2^20,
        `wide_key_layers` (ascending layers, 0 to 998)."""
        refuse_unknown_keys(cls.codec_id, config, _KEYS)
        return cls(
            *cls._common(config),
            group_channels=checked_int(cls.codec_id, config, "group_channels", 64, 1, 1 << 16),
            recent_tokens=checked_int(cls.codec_id, config, "recent_tokens", 32, 0, 1 << 16),
            chunk_tokens=checked_int(cls.codec_id, config, "chunk_tokens", 512, 1, 1 << 20),
            wide_key_layers=_checked_layers(config.get("wide_key_layers", [])),
        )

    def config(self) -> Config:
        """The full configuration."""
        return {
            "id": self.codec_id,
            "group_tokens": self.group_tokens,
            "group_channels": self.group_channels,
            "exact_tokens": self.exact_tokens,
            "recent_tokens": self.recent_tokens,
            "chunk_tokens": self.chunk_tokens,
            "wide_key_layers": list(self.wide_key_layers),
            "packer": self._packer_config(),
        }

    def _mark(self, side: Side, layer: int | None) -> int:
        return 8 if side == "keys" and layer in self.wide_key_layers else 4

    def _num_recent(self, num_tokens: int, num_first: int) -> int:
        """A chunk is not told what follows it; but only the last one of a prefix is shorter than the others."""
        return min(self.recent_tokens, num_tokens - num_first) if num_tokens < self.chunk_tokens else 0

    def _channels(self, head_dim: int) -> int:
        return min(self.group_channels, head_dim)


def _checked_layers(found: object) -> list[int]:
    """Raises: UnknownCodec."""
    layers = found if isinstance(found, (list, tuple)) else [None]
    numbers = [layer for layer in layers if type(layer) is int and 0 <= layer <= MAX_LAYER]
    if numbers != list(layers) or numbers != sorted(set(numbers)):
        raise UnknownCodec(
            f"codec 'int4': wide_key_layers must be a list of ascending layers from 0 to {MAX_LAYER}, found {found!r}"
        )
    return numbers
