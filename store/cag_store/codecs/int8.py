"""`int8`: 8-bit codes, keys per channel over groups of tokens, values per token. Layout and arithmetic:
docs/format.md 5.2. What it shares with `int4` is in `grouped`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from cag_store.codecs.base import Config, Packer, Side, refuse_unknown_keys
from cag_store.codecs.grouped import GroupedIntegers
from cag_store.codecs.widths import BYTES


class Int8(GroupedIntegers):
    """Error at most half a step: (max - min) / 254 of the group, plus the rounding of the storage dtype."""

    codec_id = "int8"
    widths = {0: BYTES}

    def __init__(self, group_tokens: int = 64, exact_tokens: int = 4, packer: Packer | None = None) -> None:
        super().__init__(group_tokens, exact_tokens, packer)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: `group_tokens` 1 to 65536, `exact_tokens` 0 to 65536, `packer` (configuration or null)."""
        refuse_unknown_keys(cls.codec_id, config, ("group_tokens", "exact_tokens", "packer"))
        return cls(*cls._common(config))

    def config(self) -> Config:
        """The full configuration."""
        shape = {"group_tokens": self.group_tokens, "exact_tokens": self.exact_tokens}
        return {"id": self.codec_id, **shape, "packer": self._packer_config()}

    def _mark(self, side: Side, layer: int | None) -> int:  # noqa: ARG002
        return 0

    def _channels(self, head_dim: int) -> int:
        return head_dim
