"""The model's own basis: made once for each model and user, kept in a file, so that a build does not calibrate again.

In: a model. Out: a codec configuration whose basis is in the store. Knows the folder `bases` below `cag_home()`.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cag.calibration.making import CalibrationOptions, codec_config, make_basis
from cag.home import cag_home, write_atomically
from cag.model import LanguageModel
from cag.models.progress import Progress, silent
from cag_store import Store
from cag_store.blob import pack_blob, unpack_blob
from cag_store.codecs.transform import Basis
from cag_store.errors import CorruptEntry
from cag_store.jsontext import canonical_bytes

CALIBRATION_VERSION = 2  # rises when the same options give another basis
STEP = CalibrationOptions.step


def model_codec(
    model: LanguageModel,
    store: Store,
    step: int = STEP,
    options: CalibrationOptions | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """The codec `transform` at `step` with the model's own basis, which the first call makes, in minutes.

    Later calls, of other processes too, read it from `cag_home()/bases`. All steps from `options.least_step` on share
    one basis. Call it inside a build lease of the store, which takes the basis as a blob.

    Args:
        model: any model that the engine serves.
        store: takes the basis.
        step: 64ths of an octave; 64 more double the error and save about a bit a coded component.
        options: how the basis is made; `step` in it is not used.
        progress: told `("basis", done_tokens, total_tokens)` while it is made.

    Raises:
        UnsupportedModel: what the model computes is not numbers, so there is no basis.
        StoreFull: the store cannot take the basis.
        OSError: the folder of bases cannot be written.
    """
    options = replace(options or CalibrationOptions(), step=step)
    path = basis_path(model, options)
    data = _read(path, model, options)
    if data is None:
        data = make_basis(model, (), options, progress)[0].to_bytes()
        write_atomically(path, pack_blob(data))
    return codec_config(store.put_blob(data), options)


def basis_path(model: LanguageModel, options: CalibrationOptions) -> Path:
    """Where the basis of these weights, of this adapter and RoPE, is kept; the same for all steps."""
    prints = model.fingerprints
    made_from = {key: value for key, value in asdict(options).items() if key not in ("step", "exact_tokens")}
    made_from |= {"version": CALIBRATION_VERSION, "tokenizer": prints.tokenizer, "adapter": prints.adapter}
    if factors := model.rope.get("factors"):  # of RoPE, which is taken off before the basis
        made_from |= {"factors": factors}
    digest = hashlib.sha256(canonical_bytes(made_from)).hexdigest()
    return cag_home() / "bases" / f"{prints.weights[:32]}-{digest[:32]}.basis"


def _read(path: Path, model: LanguageModel, options: CalibrationOptions) -> bytes | None:
    """The content of a file that is whole and fits the model; None for any other, which is then made again."""
    try:
        data = unpack_blob(path.read_bytes(), str(path))
        basis = Basis.from_bytes(data, str(path))
    except (OSError, CorruptEntry):
        return None
    shapes = tuple(zip(basis.num_kv_heads, basis.head_dim, strict=True))
    fits = shapes == tuple((shape.num_kv_heads, shape.head_dim) for shape in model.kv_shapes)
    fits = fits and len(basis.groups[0]) == model.kv_shapes[0].sides
    return data if fits and basis.joint_layers == options.joint_layers else None
