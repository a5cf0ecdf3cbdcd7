"""What a build is told and what it tells: options, progress, report. Knows no model and no store."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from cag.building.fidelity import Fidelity
from cag.building.ladder import DEFAULT_MAX_KL
from cag.errors import UsageError
from cag.prompt import CLOSING_TEXT, SYSTEM_TEXT, PromptTemplate
from cag_store import codec_from_config, codec_ids

AUTO = "auto"


def check_codec(codec: str | dict[str, Any]) -> None:
    """Before a model is there. Raises: UnknownCodec: neither "auto" nor the id or the configuration of a codec."""
    if isinstance(codec, dict) or (codec != AUTO and codec not in codec_ids()):
        codec_from_config(codec)


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is. `stage` is "reuse", "prefill", "calibrate", "basis", "encode", "measure" or "commit"; the
    tokens are of the prefix, or in "basis" of the texts that the model reads to make its basis for `transform`."""

    stage: str
    done_tokens: int
    total_tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class BuildOptions:
    """What decides a cache besides model and documents.

    Attributes:
        codec: id or configuration, or "auto": the smallest within `max_kl`.
        max_kl: bound of the mean KL divergence from the uncompressed cache, in nats; a cache that misses it is refused.
            None: no bound, and `DEFAULT_MAX_KL` for "auto".
        force: keep a cache that misses its bound.
        keep: the configuration of the cache before, taken as what `codec` means while it stays within the bound.
        template: in place of the model's, as a template may render otherwise every day.
    """

    codec: str | dict[str, Any] = "lossless"
    system_text: str = SYSTEM_TEXT
    closing_text: str = CLOSING_TEXT
    max_kl: float | None = None
    force: bool = False
    keep: dict[str, Any] | None = None
    template: PromptTemplate | None = None

    def __post_init__(self) -> None:
        for name in ("system_text", "closing_text"):
            if not isinstance(text := getattr(self, name), str):
                raise UsageError(f"{name} is {text!r}; it must be text.")
        if self.max_kl is not None:
            object.__setattr__(self, "max_kl", _nats(self.max_kl))

    @property
    def chooses(self) -> bool:
        """Whether the codec is searched."""
        return self.codec == AUTO

    @property
    def bound(self) -> float | None:
        """`max_kl`, or its default where the codec is searched."""
        return DEFAULT_MAX_KL if self.max_kl is None and self.chooses else self.max_kl


def _nats(max_kl: object) -> float:
    """A bound as manifests can have it. Raises: UsageError."""
    with contextlib.suppress(OverflowError):
        if isinstance(max_kl, Real) and math.isfinite(nats := float(max_kl)) and nats >= 0:
            return nats
    raise UsageError(f"max_kl is {max_kl!r}; it is a number of nats from 0 on.")


@dataclass(frozen=True)
class BuildSeconds:
    """Where the time of a build went.

    Attributes:
        prefill_s: forwards over the corpus.
        encode_s: writing the exact chunks, and those of the codec that was kept.
        measure_s: the probes behind the exact values and behind the codec that was kept.
        search_s: everything else that was tried to choose the codec, calibration included.
    """

    prefill_s: float = 0.0
    encode_s: float = 0.0
    measure_s: float = 0.0
    search_s: float = 0.0


@dataclass(frozen=True)
class BuildReport:
    """What a build did. `reused_tokens` were taken from the store, `computed_tokens` were prefilled; of these,
    `recomputed_tokens` had only lossy chunks left, which nothing is computed behind.

    `codec_choice` is how "auto" chose `codec`, None when it was named. `added`, `changed` and `removed` are ids of the
    documents in which an update differs from the cache before.
    """

    name: str
    digest: str
    num_documents: int
    num_tokens: int
    reused_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    raw_bytes: int
    stored_bytes: int
    codec: dict[str, Any]
    codec_choice: dict[str, Any] | None
    max_kl: float | None
    fidelity: Fidelity
    prefill_s: float
    encode_s: float
    measure_s: float
    search_s: float
    total_s: float
    duplicates: tuple[tuple[str, str], ...] = ()
    empty: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `cag build --json` prints."""
        rate = self.computed_tokens / self.prefill_s if self.computed_tokens and self.prefill_s else None
        worked_out = {
            "raw_over_stored": self.raw_bytes / self.stored_bytes,
            "prefill_tokens_per_s": rate,
            "warnings": list(self.fidelity.warnings),
        }
        return asdict(self) | worked_out
