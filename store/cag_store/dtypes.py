"""Storage dtypes of keys and values, and how numpy carries them.

numpy has no bfloat16: it travels as its bit patterns in uint16. Knows nothing of codecs or files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.errors import UnencodableArray

Array = NDArray[Any]

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
_BITS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def storage_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype that carries storage dtype `name`. Raises: UnencodableArray."""
    try:
        return STORAGE_DTYPES[name]
    except KeyError:
        known = ", ".join(STORAGE_DTYPES)
        raise UnencodableArray(f"storage dtype {name!r} is not one of {known}", found=name, expected=known) from None


def bit_patterns(array: Array) -> Array:
    """`array` as unsigned integers of the same size: a view, whatever its strides."""
    return array.view(_BITS[array.dtype.itemsize])


def widen(array: Array, dtype: str) -> NDArray[np.float32]:
    """A float32 copy of a storage array (exact)."""
    if dtype == "bfloat16":
        bits = array.astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return array.astype(np.float32)


def narrow_into(values: NDArray[np.float32], out: Array) -> None:
    """Round float32 `values` (destroyed) into the storage array `out`, as docs/format.md 5.2 defines it."""
    if out.dtype == STORAGE_DTYPES["bfloat16"]:
        bits = values.view(np.uint32)
        bits += np.uint32(0x8000)
        np.copyto(out, bits.view(np.uint16)[..., 1::2])
    elif out.dtype == STORAGE_DTYPES["float16"]:
        limit = np.float32(65504.0)
        np.clip(values, -limit, limit, out=values)
        np.copyto(out, values, casting="same_kind")
    else:
        np.copyto(out, values)
