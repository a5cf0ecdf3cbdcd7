"""The fields of an architecture in the metadata of a GGUF file: asked for by name, and none left unread.

A field that nobody knows may mean another network. Knows the file; nothing of what the fields mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cag.errors import UnsupportedModel
from cag.models.gguf_file import GgufFile

SAFETENSORS_INSTEAD = "Take the model in safetensors form."
_SAYS_NOTHING = ("vocab_size", "rope.scaling.finetuned")  # the tokens are counted; about training


class Fields:
    """The fields of an architecture in the metadata of `file`; remembers which were asked for."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        self._asked = {f"{self.architecture}.{name}" for name in _SAYS_NOTHING}

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or what it is where it is not said."""
        key = f"{self.architecture}.{name}"
        self._asked.add(key)
        return self.file.metadata.get(key, default)

    def number(self, name: str, default: float | None = None) -> Any:
        """A number; a float as the decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06.

        Raises: UnsupportedModel: not there, or not one number.
        """
        value = self.get(name, default)
        if value is None:
            raise self.refused(f"lacks the field {self.architecture}.{name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(f"has {value!r:.60} as {self.architecture}.{name}, which is not one number")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def must_be(self, name: str, expected: Any) -> None:
        """Raises: UnsupportedModel: a field that is there and is something else."""
        found = self.get(name, expected)
        if found != expected:
            raise self.refused(f"has {found!r:.60} as {self.architecture}.{name}, and only {expected!r} is known here")

    def refuse_unasked(self) -> None:
        """Raises: UnsupportedModel: a field of the architecture that nothing has read."""
        others = [key for key in self.file.metadata if key.startswith(f"{self.architecture}.")]
        if unknown := sorted(set(others) - self._asked):
            raise self.refused(f"has the field {unknown[0]} = {self.file.metadata[unknown[0]]!r:.60}, unknown here")

    def refused(self, what: str) -> UnsupportedModel:
        """An error that names the file."""
        return UnsupportedModel(f"{self.file.path} {what}.", hint=SAFETENSORS_INSTEAD, path=self.file.path)
