"""What stands on the ladder for a model, from the smallest to the largest, and what a codec's name means for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from cag.building.ladder import Rung
from cag.calibration import CalibrationOptions, model_codec
from cag.errors import InsufficientResources
from cag.model import LanguageModel
from cag.models.progress import Progress, silent
from cag_store import Store, codec_from_config, codec_ids
from cag_store.codecs import Int4, JointTransform, Lossless
from cag_store.errors import StoreError, UnknownCodec

LADDER: tuple[dict[str, Any], ...] = ({"id": "int4"}, {"id": "int8"})
"""Codecs without a search, the smallest first. `transform` stands before them, those of other distributions behind."""

REFINED = (Int4.codec_id,)
"""Codecs with finer configurations for a cache that they alone do not keep within the bound (`CodecTrials.finer`)."""

_SERVED_STEPS = 4 * 64  # from the finest of a basis on, whose tables were made from as many
_BASIS_BYTES = 0.7  # of one number of a basis, packed
_WORTH = 4  # caches smaller than so many bases are not worth one


def ladder_of(model: LanguageModel, store: Store, raw_bytes: int, progress: Progress = silent) -> list[Rung]:
    """The rungs to try on a cache of `raw_bytes` of uncompressed keys and values, besides `lossless`.

    Makes the model's basis for `transform` when it is not there yet, which takes minutes (`progress`, as of
    `model_codec`), unless it would be a large part of so small a cache. Call it inside a build lease of the store.

    Raises:
        InsufficientResources: the basis cannot be kept.
        StoreFull: the store cannot take it.
    """
    options = CalibrationOptions()
    rungs = [Rung(codec, refines=codec["id"] in REFINED) for codec in (*LADDER, *_others())]
    if raw_bytes < _WORTH * basis_bytes(model, options.joint_layers):
        return rungs
    steps = options.least_step, options.least_step + _SERVED_STEPS
    return [Rung(codec_of(JointTransform.codec_id, model, store, progress), steps), *rungs]


def codec_of(
    codec: str | dict[str, Any], model: LanguageModel, store: Store, progress: Progress = silent
) -> dict[str, Any]:
    """The full configuration of a codec that was named; `transform` alone means the model's own basis, of whose making
    `progress` tells.

    Raises: UnknownCodec; as `ladder_of`.
    """
    if codec != JointTransform.codec_id:
        return codec_from_config(codec).config()
    try:
        return model_codec(model, store, progress=progress)
    except StoreError:
        raise
    except OSError as error:
        raise InsufficientResources(
            f"the model's basis for codec transform cannot be kept: {error.strerror or error}.",
            hint="Free space in $CAG_HOME/bases.",
        ) from error


def _others() -> Iterator[dict[str, Any]]:
    """Codecs of other distributions, with their defaults; those that need more than their id are left out."""
    known = {JointTransform.codec_id, Lossless.codec_id, *(codec["id"] for codec in LADDER)}
    for codec_id in codec_ids():
        if codec_id not in known:
            with contextlib.suppress(UnknownCodec):
                yield codec_from_config(codec_id).config()


def basis_bytes(model: LanguageModel, joint_layers: int) -> int:
    """About what a basis of the model takes in a store: a square matrix for each side of each group of layers."""
    widths = [shape.num_kv_heads * shape.head_dim for shape in model.kv_shapes]
    groups = [sum(widths[first : first + joint_layers]) for first in range(0, len(widths), joint_layers)]
    return int(model.kv_shapes[0].sides * sum(width**2 for width in groups) * _BASIS_BYTES)
