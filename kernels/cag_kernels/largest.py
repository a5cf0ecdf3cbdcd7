"""Which output of a linear layer is the largest, from half of the bytes of its weight, and to the bit.

A copy of the weight in 8 bits bounds every output from both sides. The few whose upper bound reaches the largest lower
bound are computed exactly, with the bits of the whole product (`tile_linear`, `dot_linear`, `packed_linear`); nothing
else can be the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cag_kernels.cpu.processor import has_byte_tiles, has_compiler, has_numba, prefers_dots
from cag_kernels.device import HALF_TYPES
from cag_kernels.linear import (
    dot_linear,
    dot_linear_serves,
    multiplies_packed,
    packed_linear,
    tile_linear,
    tile_linear_serves,
)
from cag_kernels.packed import PackedWeight

if TYPE_CHECKING:
    from cag_kernels.cpu.products.choice import Choice, CodedWeight

MAX_ROWS = 32  # up to which it is quicker than the whole product by enough to keep bounds for each
_SIZE_MULTIPLE = 64  # as tiles of bytes want it
_LEAST_FEATURES = 4096  # a smaller weight is read in no time

Allocate = Callable[[int], Tensor]


def largest_output_serves(weight: Tensor | PackedWeight) -> bool:
    """Whether `LargestOutput` takes a weight `[num_features, size]`, plain or packed, on this machine."""
    if isinstance(weight, PackedWeight):
        fits = weight.out_features >= _LEAST_FEATURES and weight.panels.dtype in HALF_TYPES
        return fits and has_numba() and _has_pairs() and multiplies_packed(weight.panels.dtype)
    fits = weight.shape[0] >= _LEAST_FEATURES and weight.shape[1] % _SIZE_MULTIPLE == 0
    if not fits or not has_numba():
        return False
    return (tile_linear_serves(weight) and has_byte_tiles()) or (dot_linear_serves(weight) and _has_pairs())


def choice_arithmetic() -> str:
    """Which output matrices `LargestOutput` takes on this machine, for reports; small ones apart."""
    by_tiles, by_pairs = has_numba() and has_byte_tiles(), has_numba() and _has_pairs()
    by_dots = by_pairs and prefers_dots()
    ways = ("tiles multiply", by_tiles), ("vectors multiply bfloat16", by_dots), ("it is packed", by_pairs)
    where = [text for text, serves in ways if serves]
    if not where:
        return "from all logits"
    return f"from 8 bits of the output matrix where {' or '.join(where)}, half of its memory more"


class LargestOutput:
    """The largest output for each of a few rows, and the lowest of equal ones. Not for several threads at once;
    `largest_output` makes one."""

    def __init__(self, weight: Tensor | PackedWeight, coded: CodedWeight) -> None:
        from cag_kernels.cpu.products.choice import Workspace

        self._weight, self._coded = weight, coded
        with torch.inference_mode(False):  # it serves calls inside and outside of inference mode
            self._space = Workspace(coded, MAX_ROWS)
        self._choices: dict[int, Choice] = {}

    @property
    def num_bytes(self) -> int:
        """Memory of the copy in 8 bits."""
        return self._coded.codes.nbytes

    def __call__(self, rows: Tensor) -> list[int]:
        """`rows [num_rows, size]`, float32 on the CPU and not empty, to the index of the largest of `tile_linear(rows,
        weight)`, `dot_linear` or `packed_linear`, for each; at most `MAX_ROWS` rows the quick way."""
        num_rows = len(rows)
        if num_rows <= MAX_ROWS:
            choice = self._choices.get(num_rows) or self._prepared(num_rows)
            choice.rows.copy_(rows)
            choice.run()
            chosen: list[int] = choice.chosen.tolist()
            if chosen[0] >= 0:
                return chosen
        return largest_output_reference(rows, self._weight)

    def _prepared(self, num_rows: int) -> Choice:
        from cag_kernels.cpu.products.choice import Choice

        with torch.inference_mode(False):
            self._choices[num_rows] = Choice(self._coded, num_rows, self._space)
        return self._choices[num_rows]


def largest_output(
    weight: Tensor | PackedWeight, allocate: Allocate | None = None, goes_on: Callable[[], bool] = lambda: True
) -> LargestOutput | None:
    """For a weight `[num_features, size]` in bfloat16, or packed also in float16, which is kept; the copy is made on
    the calling thread alone and without the interpreter.

    Args:
        weight: one that `largest_output_serves`.
        allocate: gives the copy's memory, uint8 of at least that many bytes.
        goes_on: asked every few milliseconds; the result is None if it says no.

    Raises:
        ValueError: a weight that is not served.
    """
    if not largest_output_serves(weight):
        lies = weight.panels if isinstance(weight, PackedWeight) else weight
        raise ValueError(f"a weight {tuple(lies.shape)} of {lies.dtype} is not served")
    from cag_kernels.cpu.products.choice import CodedWeight, exact_weight, num_code_bytes

    exact = exact_weight(weight)
    num_bytes = num_code_bytes(exact)
    with torch.inference_mode(False):
        memory = (allocate or _plain_memory)(num_bytes)[:num_bytes]
        coded = CodedWeight.encoded(exact, memory, goes_on)
    return None if coded is None else LargestOutput(weight, coded)


def warm_up_largest() -> None:
    """Compile what choices need, once a process: by tiles of bytes where there are any, else by products of pairs."""
    if has_numba() and (has_byte_tiles() or _has_pairs()):
        from cag_kernels.cpu.products.choice import warm_up

        if has_byte_tiles() or prefers_dots():
            warm_up(packed=False)
        if not has_byte_tiles():
            warm_up(packed=True)


def largest_output_reference(rows: Tensor, weight: Tensor | PackedWeight) -> list[int]:
    """What `LargestOutput` means: the whole product, and the lowest of equal outputs."""
    if isinstance(weight, PackedWeight):
        product = packed_linear(rows, weight)
    else:
        product = tile_linear(rows, weight) if tile_linear_serves(weight) else dot_linear(rows, weight)
    found: list[int] = product.argmax(-1).tolist()
    return found


def _has_pairs() -> bool:
    if not has_compiler():
        return False
    from cag_kernels.cpu.pairs import has_pairs

    return has_pairs()


def _plain_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)
