"""The largest of a linear layer's outputs as a tape of steps (`cpu.tape`), for one number of rows:

    split -> bounds -> select -> multiply -> pick

`split` makes integers of rows and `bounds` bounds of all outputs; `select` gathers the weights of the few that may be
the largest, which are multiplied exactly and compared. Bounds and exact products are by tiles
(`cpu.products.tile_bounds`, `cpu.products.tile_linear`), or in vectors (`cpu.products.bounds`,
`cpu.products.dot_linear` and, of a packed weight, `cpu.products.linear`): `cpu.products.exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cag_kernels.cpu.products import codes as cpu_codes
from cag_kernels.cpu.products.codes import DEPTH, LANES, QUAD, ROWS
from cag_kernels.cpu.products.exact import DotWeight, ExactWeight, PanelWeight, TileWeight
from cag_kernels.cpu.rows import compiled, numba
from cag_kernels.cpu.steps import compiled_step, memory
from cag_kernels.cpu.tape import CompiledStep, Tape, new_call
from cag_kernels.cpu.team import MAX_UNITS
from cag_kernels.cpu.tiles import has_tiles
from cag_kernels.packed import PANEL, PackedWeight, pack_weight

_PIECE_NUMBERS = 1 << 20  # of a weight that are encoded before somebody is asked: 2 ms

MOST_FOUND, MOST_FOUND_A_ROW = 64, 32  # of all rows, and beyond them for each: outputs that are computed exactly

carray = numba.carray


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight and what `cpu.products.codes.encode` made of it: codes `[num_groups, size / QUAD, LANES]` int32, and
    `[num_groups * LANES]` float32 each."""

    weight: ExactWeight
    codes: Tensor
    scales: Tensor
    errors: Tensor
    norms: Tensor

    @staticmethod
    def encoded(weight: ExactWeight, memory: Tensor, goes_on: Callable[[], bool]) -> CodedWeight | None:
        """The codes go to `memory`, uint8 of `num_code_bytes`. One thread, which leaves the interpreter to others and
        asks now and then whether to go on; None if not."""
        num_groups, size = -(-weight.num_features // LANES), weight.size
        codes = memory.view(torch.int32).view(num_groups, size // QUAD, LANES)
        found = CodedWeight(weight, codes, *(float32(num_groups * LANES) for _ in range(3)))
        arrays = [tensor.numpy() for tensor in (codes, found.scales, found.errors, found.norms)]
        step = max(1, _PIECE_NUMBERS // (LANES * size))
        for first in range(0, num_groups, step):
            if not goes_on():
                return None
            of_piece = slice(first * LANES, (first + step) * LANES)
            parts = [array[of_piece] for array in arrays[1:]]
            cpu_codes.encode(
                weight.patterns(of_piece), cpu_codes.bound_of_sums(size), arrays[0][first : first + step], *parts
            )
        return found


def float32(*shape: int) -> Tensor:
    """Memory of any content, whatever another thread has made torch's default type meanwhile."""
    return torch.empty(shape, dtype=torch.float32)


def exact_weight(weight: Tensor | PackedWeight) -> ExactWeight:
    """A weight as it lies, in 16 bits."""
    if isinstance(weight, PackedWeight):
        return PanelWeight(weight)
    return TileWeight(weight) if has_tiles() else DotWeight(weight)


def num_code_bytes(weight: ExactWeight) -> int:
    """Of the codes of a weight."""
    return -(-weight.num_features // LANES) * LANES * weight.size


class Workspace:
    """Memory that choices of up to `most_rows` rows over one weight share; what is never used takes no memory."""

    def __init__(self, coded: CodedWeight, most_rows: int) -> None:
        num_groups, num_features = len(coded.codes), coded.weight.num_features
        self.most_found = min(MOST_FOUND + MOST_FOUND_A_ROW * (most_rows - 1), num_features)
        self.uppers = float32(num_groups * most_rows * LANES)
        self.lowers = float32(MAX_UNITS * most_rows * LANES)
        self.found = torch.empty(self.most_found, dtype=torch.int64)
        self.gathered = coded.weight.gathered(self.most_found)
        self.exact = float32(most_rows * self.most_found)


class Choice:
    """Memory and steps for `num_rows` rows. `run` leaves in `chosen` (int64) the largest output of each row in `rows`
    (`[num_rows, size]` float32), -1 where bounds do not tell; of how many features exact products were compared is
    `num_found`."""

    def __init__(self, coded: CodedWeight, num_rows: int, space: Workspace) -> None:
        weight, num_groups = coded.weight, len(coded.codes)
        num_features, size = weight.num_features, weight.size
        most = min(MOST_FOUND + MOST_FOUND_A_ROW * (num_rows - 1), space.most_found)
        self.rows, self.chosen = float32(num_rows, size), torch.zeros(num_rows, dtype=torch.int64)
        self._state = torch.zeros(2, dtype=torch.int64)  # whether rows are bounded, and `num_found`
        integers, step = weight.integers(num_rows), _STEPS[type(weight)]
        facts, features = float32(num_rows, 3), (coded.codes, coded.scales, coded.errors, coded.norms)
        exact = space.exact[: num_rows * most].view(num_rows, most)
        self._tape = Tape()
        with self._tape.recording():
            _alone(step.split, [self.rows, integers, facts, space.lowers, self._state], [num_rows, size])
            memory = (integers, facts, *features, space.uppers, space.lowers)
            weight.record_bounds(memory, num_rows, num_groups)
            tensors = [space.uppers, space.lowers, weight.memory, space.found, space.gathered, self._state]
            _alone(step.select, tensors, [num_groups, num_rows, num_features, size, most])
            weight.record_product(self.rows, space.gathered, exact)
            _alone(_pick, [exact, space.found, self._state, self.chosen], [num_rows, most])

    @property
    def num_found(self) -> int:
        """Of the last run; 0 where bounds do not tell."""
        return int(self._state[1])

    def run(self) -> None:
        """See above."""
        self._tape.run()


def warm_up(*, packed: bool) -> None:
    """Compile all steps for packed weights, or for plain ones, and the loop that makes codes."""
    rows = torch.zeros(2 * LANES, DEPTH, dtype=torch.bfloat16)
    weight = exact_weight(pack_weight(rows) if packed else rows)
    weight.compile()
    for function in (*_STEPS[type(weight)], _pick):
        _step(function)
    CodedWeight.encoded(weight, torch.empty(num_code_bytes(weight), dtype=torch.uint8), lambda: True)


def _alone(function: Any, tensors: list[Tensor], sizes: list[int]) -> None:
    call = new_call([0, *(tensor.data_ptr() for tensor in tensors), *sizes], tensors)
    _step(function).alone(call)


@cache
def _step(function: Any) -> CompiledStep:
    return compiled_step(function, error_model="numpy")


@compiled
def _begin(lowers: int, num_rows: int) -> None:
    carray(memory(lowers), MAX_UNITS * num_rows * LANES, np.float32)[:] = -np.inf


def _split(call: Any) -> None:
    fields = carray(call, 8, np.int64)
    num_rows, size = fields[6], fields[7]
    tiles = (num_rows + ROWS - 1) // ROWS
    _begin(fields[4], num_rows)
    carray(memory(fields[5]), 2, np.int64)[0] = cpu_codes.split(
        carray(memory(fields[1]), (num_rows, size), np.float32),
        carray(memory(fields[2]), (tiles, size // DEPTH, LANES, DEPTH), np.int8),
        carray(memory(fields[3]), (num_rows, 3), np.float32),
    )


def _split_rounded(call: Any) -> None:
    fields = carray(call, 8, np.int64)
    cpu_codes.round_rows(carray(memory(fields[1]), (fields[6], fields[7]), np.float32))
    _paired(fields)


def _split_pairs(call: Any) -> None:
    _paired(carray(call, 8, np.int64))


@compiled
def _paired(fields: Any) -> None:
    num_rows, size = fields[6], fields[7]
    _begin(fields[4], num_rows)
    carray(memory(fields[5]), 2, np.int64)[0] = cpu_codes.split_pairs(
        carray(memory(fields[1]), (num_rows, size), np.float32),
        carray(memory(fields[2]), (num_rows, size // QUAD, 2, 2), np.int16),
        carray(memory(fields[3]), (num_rows, 3), np.float32),
    )


@compiled
def _find(fields: Any) -> int:
    """How many features may be the largest; which, goes to memory."""
    num_groups, num_rows, num_features, most = fields[7], fields[8], fields[9], fields[11]
    state = carray(memory(fields[6]), 2, np.int64)
    uppers = carray(memory(fields[1]), (num_groups, num_rows, LANES), np.float32)
    lowers = carray(memory(fields[2]), (MAX_UNITS, num_rows, LANES), np.float32)
    found = carray(memory(fields[4]), most, np.int64)
    state[1] = cpu_codes.reaching(uppers, lowers, num_features, found) if state[0] else 0
    count: int = state[1]
    return count


def _select(call: Any) -> None:
    fields = carray(call, 12, np.int64)
    num_features, size, most = fields[9], fields[10], fields[11]
    count, found = _find(fields), carray(memory(fields[4]), most, np.int64)
    weight = carray(memory(fields[3]), (num_features, size), np.uint16)
    cpu_codes.gather(weight, found, count, carray(memory(fields[5]), (most, size), np.uint16))


def _select_panels(call: Any) -> None:
    fields = carray(call, 12, np.int64)
    num_features, size, most = fields[9], fields[10], fields[11]
    count, found = _find(fields), carray(memory(fields[4]), most, np.int64)
    panels = carray(memory(fields[3]), ((num_features + PANEL - 1) // PANEL, size, PANEL), np.uint16)
    out = carray(memory(fields[5]), ((most + PANEL - 1) // PANEL, size, PANEL), np.uint16)
    cpu_codes.gather_panels(panels, found, count, out)


def _pick(call: Any) -> None:
    fields = carray(call, 7, np.int64)
    num_rows, most = fields[5], fields[6]
    cpu_codes.pick(
        carray(memory(fields[1]), (num_rows, most), np.float32),
        carray(memory(fields[2]), most, np.int64),
        carray(memory(fields[3]), 2, np.int64)[1],
        carray(memory(fields[4]), num_rows, np.int64),
    )


class _Steps(NamedTuple):
    """What depends on how a weight lies."""

    split: Any
    select: Any


_STEPS = {
    TileWeight: _Steps(_split, _select),
    DotWeight: _Steps(_split_rounded, _select),
    PanelWeight: _Steps(_split_pairs, _select_panels),
}
