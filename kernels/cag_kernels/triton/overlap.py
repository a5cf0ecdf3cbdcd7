"""What a kernel does beside another one: it is set up while the launch before it ends, and calls memory for the next.

*Dependent launches* (compute capability 9): a launch may begin before the one in front of it is done, waits for it
before it touches any memory, and then lets the next one be set up. Each program of each such launch waits, so who is
done has all launches before it done. Recordings keep it.
*Calls ahead*: bytes that the next product reads go to the second-level cache while a small step runs. A hint, which
reads and writes nothing; it may come before the wait.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cag_kernels.triton.launch_ways import launch_ways

MIN_PIECE_BYTES = 512  # of a row of weights
PROGRAM_ROWS = 256  # that a program calls ahead


@triton.jit
def wait_for_launch(overlaps: tl.constexpr):
    """The first thing that a program of a dependent launch does."""
    if overlaps:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def call_ahead(weight, program, num_rows, row_bytes, piece_bytes):
    """Calls the first `piece_bytes` of each of 256 rows, the program's, into the second-level cache."""
    row = program * 256 + tl.arange(0, 256)  # PROGRAM_ROWS
    place = weight.to(tl.int64) + row.to(tl.int64) * row_bytes
    size = tl.where(row < num_rows, piece_bytes, 0)
    tl.inline_asm_elementwise(
        "{ .reg .pred any; setp.ne.s32 any, $2, 0; @any cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [place, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@cache
def overlaps_on(device: torch.device) -> bool:
    """Whether a device has dependent launches and bulk hints."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch on a device: the kernel's `overlaps`, and Triton's."""
    if launch_ways().overlaps and overlaps_on(device):
        return {"overlaps": True, "launch_pdl": True}
    return {"overlaps": False}


def ahead_sizes(weight: Tensor | None) -> tuple[int, int, int]:
    """Rows of a weight `[out_features, in_features]` to call ahead, bytes of a row, and how many of them; no rows for
    nothing."""
    most = launch_ways().ahead_bytes
    if weight is None or not most or not overlaps_on(weight.device):
        return 0, 0, 0
    row_bytes = weight.shape[1] * weight.element_size()
    if not weight.is_contiguous() or weight.data_ptr() % 16 or row_bytes % 16:
        return 0, 0, 0
    piece = min(row_bytes, max(MIN_PIECE_BYTES, most // weight.shape[0] // 128 * 128))
    return min(weight.shape[0], most // piece), row_bytes, piece
