"""The loops of `cag_store.codecs.loops.Loops` in numba, compiled for this machine when the module is imported and
kept (`kept_code`).

`out` may be strided across heads and tokens; its rows are addressed by pointer, because numba vectorizes stores only
where the type says that they are contiguous: 34 instead of 0.9 GB/s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import compiled_groups, compiled_ranks, compiled_segments
from cag_store.codecs.emitting import compiled, numba, row_pointer, types
from cag_store.dtypes import Array


def _run(out: Any) -> Any:
    """How many elements of `out` lie behind one another."""
    row = out.shape[2]
    return out.shape[1] * row if out.strides[1] == row * out.itemsize else row


contiguous_run = numba.njit(inline="always")(_run)


def _join_two(high: Any, low: Any, out: Any) -> None:
    head_dim, run = out.shape[2], contiguous_run(out)
    first = 0
    for head in range(out.shape[0]):
        for token in range(0, out.shape[1], run // head_dim):
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (run,))
            upper, lower = high[first : first + run], low[first : first + run]
            for i in range(run):
                target[i] = (upper[i] << 7) | (lower[i] >> 1) | ((lower[i] & 1) << 15)
            first += run


def _join_four(plane_3: Any, plane_2: Any, plane_1: Any, plane_0: Any, out: Any) -> None:
    head_dim, run = out.shape[2], contiguous_run(out)
    first = 0
    for head in range(out.shape[0]):
        for token in range(0, out.shape[1], run // head_dim):
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (run,))
            third, second = plane_3[first : first + run], plane_2[first : first + run]
            upper, lower = plane_1[first : first + run], plane_0[first : first + run]
            for i in range(run):
                bits = (
                    (np.uint32(third[i]) << 24) | (np.uint32(second[i]) << 16) | (np.uint32(upper[i]) << 8) | lower[i]
                )
                target[i] = (bits >> 1) | ((bits & 1) << 31)
            first += run


_PLANE = types.Array(types.uint8, 1, "C", readonly=True)
_OUT = {2: types.Array(types.uint16, 3, "A"), 4: types.Array(types.uint32, 3, "A")}

_join = {
    2: compiled(_join_two, types.void(_PLANE, _PLANE, _OUT[2])),
    4: compiled(_join_four, types.void(_PLANE, _PLANE, _PLANE, _PLANE, _OUT[4])),
}
around_medians, pack_ranks = compiled_ranks.around_medians, compiled_ranks.pack_ranks
unpack_ranks = compiled_ranks.unpack_ranks
dequantize_keys, dequantize_values = compiled_groups.dequantize_keys, compiled_groups.dequantize_values
dequantize_nibble_keys = compiled_groups.dequantize_nibble_keys
dequantize_nibble_values = compiled_groups.dequantize_nibble_values
decode_ranked, decode_grouped, keep_grouped = (
    compiled_segments.decode_ranked,
    compiled_segments.decode_grouped,
    compiled_segments.keep_grouped,
)


def join_planes(planes: list[NDArray[np.uint8]], out: Array) -> None:
    """See `Loops`."""
    _join[out.itemsize](*planes, out)
