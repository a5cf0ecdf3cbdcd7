"""The files that a model is read from: whether they are, once it is read and later, those that they were before.

A model is read from them in several passes, and hashed in another one; on a CPU some weights stay pages of them. Knows
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cag.errors import ModelError
from cag.models.digests import file_identity
from cag.models.fingerprint import TOKENIZER_FILES, model_fingerprint

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "additional_chat_templates/*.jinja", *TOKENIZER_FILES)


@dataclass(frozen=True)
class ReadFiles:
    """The files of a model and of its adapter, with size, times and inode of each."""

    directory: Path
    adapter: Path | None
    identities: dict[Path, dict[str, int]]

    @classmethod
    def before_reading(cls, directory: Path, adapter: Path | None = None) -> ReadFiles:
        """Notes which files are there. Raises: OSError."""
        return cls(directory, adapter, _identities(directory, adapter))

    def are_untouched(self) -> bool:
        """Whether they are what they were, with none beside them."""
        try:
            return _identities(self.directory, self.adapter) == self.identities
        except OSError:
            return False

    def check_read(self) -> None:
        """For when all is read. Raises: ModelError: some of it may be of other files than the rest."""
        if not self.are_untouched():
            raise ModelError(f"the model in {self.directory} changed while it was read.", hint="Load it again.")

    def check_weights(self, fingerprint: str) -> None:
        """For a model of which weights are pages of the files; another file in the place of one changes none of them.

        Raises: ModelError: a file was written to, and is not of the fingerprint of the weights any more.
        """
        if any(map(self._was_written, self.identities)) and model_fingerprint(self.directory).weights != fingerprint:
            raise ModelError(
                f"the weights of the model in {self.directory} were written over since it was loaded.",
                hint="Load it again; who replaces files by renaming leaves loaded models alone.",
            )

    def _was_written(self, path: Path) -> bool:
        if path.suffix != ".safetensors":
            return False
        before = self.identities[path]
        try:
            now = file_identity(path)
        except OSError:
            return False
        return now != before and all(now[key] == before[key] for key in ("inode", "device"))


def _identities(*directories: Path | None) -> dict[Path, dict[str, int]]:
    paths = {path for folder in directories if folder for pattern in _PATTERNS for path in folder.glob(pattern)}
    return {path: file_identity(path) for path in sorted(paths) if path.is_file()}
