"""Segments of the codec `transform`, as the bytes in which they are stored, taken apart on a device for the kernels.

In: bytes on the device, and where the parts of each segment begin. Out: what `cag_kernels.decode_segments` reads, and
means. Nothing is copied to the host, and nothing outside of the bytes is read, whatever they say.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.residency.basis_tensors import BasisTensors
from cag.residency.uploads import sent
from cag_kernels.rans import LANES, RansSegments
from cag_store.codecs.streams import CENTER, COMPONENT_SHIFTS, ESCAPES, EXACT, STATES, TOKEN_SHIFTS, WORDS

_LEAST_SHIFT = -8
_CENTER_UNIT = 64.0  # docs/format.md 5.4, "Values"


class SegmentTensors(NamedTuple):
    """streams: each segment, and behind it one without tokens, to which all belongs up to the next segment: so words
    and escapes stay where they are. means: float32 `[num_segments, num_channels]`, of the basis and of each segment."""

    streams: RansSegments
    means: Tensor


def segment_tensors(
    data: Tensor, bounds: NDArray[np.int64], num_coded: NDArray[np.int64], basis: BasisTensors
) -> SegmentTensors:
    """The segments of one side of a group of layers.

    Args:
        data: uint8 `[num_bytes]`, an even number.
        bounds: `[num_segments, NUM_PARTS + 1]`, as `cag_store.codecs.streams.StreamSide` has them.
        num_coded: tokens of each segment that have codes.
        basis: of this side.
    """
    firsts = sent(bounds, data.device)
    num_components, numbers = len(basis.tables), data.view(torch.int16)
    states = _bytes_at(data, firsts[:, STATES], 4 * LANES).view(torch.int32)
    shifts = _nibbles(_bytes_at(data, firsts[:, COMPONENT_SHIFTS], -(-num_components // 2)))[:, :num_components]
    streams = RansSegments(
        _with_gaps(states),
        numbers,
        _starts(bounds[:, WORDS : WORDS + 2] // 2, data.device),
        numbers,
        _starts(bounds[:, ESCAPES : ESCAPES + 2] // 2, data.device),
        _token_starts(num_coded, data.device),
        _token_shifts(data, firsts[:, TOKEN_SHIFTS], num_coded),
        _with_gaps(shifts),
    )
    return SegmentTensors(streams, _means(data, firsts, basis))


def _bytes_at(data: Tensor, firsts: Tensor, width: int) -> Tensor:
    """`[num_segments, width]`: as many bytes from each place on; what lies behind the end is the last byte."""
    places = firsts[:, None] + torch.arange(width, device=data.device)
    return data[places.clamp_(max=len(data) - 1)]


def _nibbles(packed: Tensor) -> Tensor:
    """Shifts int8, two a byte, the first in the lower half."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return halves.to(torch.int8) + _LEAST_SHIFT


def _with_gaps(rows: Tensor) -> Tensor:
    """A row of zeros behind each row."""
    return torch.stack([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)


def _starts(spans: NDArray[np.int64], device: torch.device) -> Tensor:
    """Where each segment begins, where the gap behind it does, and where the last gap ends."""
    starts = np.append(spans.ravel(), spans[-1, 1])
    return sent(starts.astype(np.int32), device)


def _token_starts(num_coded: NDArray[np.int64], device: torch.device) -> Tensor:
    ends = np.cumsum(num_coded)
    return _starts(np.stack([ends - num_coded, ends], axis=1), device)


def _token_shifts(data: Tensor, firsts: Tensor, num_coded: NDArray[np.int64]) -> Tensor:
    """int8, one a coded token of all segments."""
    total = int(num_coded.sum())
    before = np.cumsum(num_coded) - num_coded
    counts, skipped = (sent(numbers, data.device) for numbers in (num_coded, before))
    places = torch.repeat_interleave(2 * firsts - skipped, counts, output_size=total)
    places += torch.arange(total, device=data.device)
    halves = data[places >> 1] >> ((places & 1) * 4).to(torch.uint8) & 15
    return halves.to(torch.int8) + _LEAST_SHIFT


def _means(data: Tensor, firsts: Tensor, basis: BasisTensors) -> Tensor:
    """`mean + center * 64 * scale`, each operation rounded; the mean itself where there is no center."""
    has_center = (firsts[:, EXACT] > firsts[:, CENTER])[:, None]
    centers = _bytes_at(data, firsts[:, CENTER], len(basis.mean)).view(torch.int8)
    centered = basis.mean + centers.float() * _CENTER_UNIT * basis.scale
    return torch.where(has_center, centered, basis.mean)
