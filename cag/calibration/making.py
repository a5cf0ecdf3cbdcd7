"""Making the codec `transform` for a model: observe its keys and values on a text, fit a basis, store it.

In: a model, a store, texts. Out: a codec configuration that names the basis in the store.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from cag.calibration.fit import fit_basis
from cag.calibration.observe import SKIPPED_TOKENS, observe
from cag.calibration.rotation import find_rotations
from cag.calibration.texts import own_texts, token_windows
from cag.errors import UsageError
from cag.model import LanguageModel
from cag.models.progress import Progress, silent
from cag_store import Store
from cag_store.codecs.transform import Basis

MIN_WINDOW_TOKENS = 16 * SKIPPED_TOKENS


@dataclass(frozen=True)
class CalibrationOptions:
    """How a basis is made: of `num_windows` windows of our own texts, and `corpus_windows` of the corpus where there is
    one; `gradient_windows` of all say what predictions depend on. `least_step` is the finest step it will serve, in
    64ths of an octave."""

    joint_layers: int = 10
    num_windows: int = 96
    corpus_windows: int = 8
    own_texts: bool = True
    window_tokens: int = 1024
    gradient_windows: int = 24
    least_step: int = -620
    step: int = -540
    exact_tokens: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Calibration:
    """A codec configuration at `options.step`, and what it took. Other steps share the basis: change `step` in
    `codec`."""

    codec: dict[str, Any]
    num_tokens: int
    seconds: float


def calibrate(
    model: LanguageModel, store: Store, texts: Sequence[str] = (), options: CalibrationOptions | None = None
) -> Calibration:
    """Make a basis of `model` and store it as a blob; call it inside a build lease of the store.

    Args:
        model: any model that the engine serves.
        store: takes the basis.
        texts: a corpus to calibrate on, besides the texts that are on every machine (`options.own_texts`); none: the
            model's own basis.
        options: sizes and steps.

    Raises:
        UsageError: the texts are too short to calibrate on.
        UnsupportedModel: what the model computes on them is not numbers.
        StoreFull: the store cannot take the basis.
    """
    options = options or CalibrationOptions()
    started = time.perf_counter()
    basis, num_tokens = make_basis(model, texts, options)
    digest = store.put_blob(basis.to_bytes())
    return Calibration(codec_config(digest, options), num_tokens, time.perf_counter() - started)


def make_basis(
    model: LanguageModel, texts: Sequence[str], options: CalibrationOptions, progress: Progress = silent
) -> tuple[Basis, int]:
    """The basis of `calibrate`, and how many tokens it was made from; `progress`, in tokens, tells how much the model
    has read.

    Raises: UsageError, UnsupportedModel.
    """
    corpus = token_windows(model, list(texts), options.corpus_windows, options.window_tokens) if texts else []
    general = own_texts() if options.own_texts or not texts else []
    windows = corpus + token_windows(model, general, options.num_windows, options.window_tokens)
    windows = [window for window in windows if len(window) >= MIN_WINDOW_TOKENS]
    if not windows:
        raise UsageError(
            f"calibration needs a text of at least {MIN_WINDOW_TOKENS} tokens.", hint="Leave it out for a general one."
        )
    ends = list(accumulate(map(len, windows), initial=0))
    progress("basis", 0, ends[-1])
    rotations, layer_rotation = find_rotations(model)
    samples = observe(
        model,
        windows,
        rotations,
        layer_rotation,
        options.joint_layers,
        options.gradient_windows,
        options.seed,
        lambda done: progress("basis", ends[done], ends[-1]),
    )
    return fit_basis(samples, rotations, layer_rotation, options.joint_layers, options.least_step), ends[-1]


def codec_config(digest: str, options: CalibrationOptions) -> dict[str, Any]:
    """The configuration of the codec with the basis at `digest`."""
    return {
        "id": "transform",
        "basis": digest,
        "joint_layers": options.joint_layers,
        "step": options.step,
        "exact_tokens": options.exact_tokens,
    }
