"""The greedy choice of few rows without all logits: a copy of the output matrix in 8 bits, made in the background.

What is chosen is what the largest logit says, to the bit (`cag_kernels.LargestOutput`); the copy shows in the times and
in half of the matrix's bytes of memory. Knows a product and the machine's memory; no network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch import Tensor

from cag.forward.weights import Product, plain_weight
from cag.machine.huge_pages import has_huge_pages, huge_tensor
from cag.machine.memory_limits import available_memory_bytes
from cag_kernels import LargestOutput, largest_output, largest_output_serves, warm_up_largest

_MEMORY_SHARE = 8  # of the memory that is free, the part that a copy may take
_RESTS = 7  # times as long as a piece of the copy took, so that one core is an eighth slower meanwhile


class GreedyChoice:
    """For each row the feature of an output matrix with the largest logit, the lowest of equal ones. One caller at a
    time.

    The first choice is made from all logits and begins the copy, so nobody's first token waits for it, and who only
    builds caches has none.

    Attributes:
        quick: the choice by the copy, once that is there.
    """

    def __init__(self, head: Product) -> None:
        self._head = head
        weight = plain_weight(head)
        self._weight = weight if weight is not None and largest_output_serves(weight) else None
        self._has_begun = self._weight is None
        self.quick: LargestOutput | None = None

    def __call__(self, rows: Tensor) -> list[int]:
        """`[num_rows, size]` float32, contiguous."""
        if (quick := self.quick) is not None:
            return quick(rows)
        chosen: list[int] = self._head(rows).argmax(-1).tolist()
        if not self._has_begun:
            self._has_begun = True
            # no daemon: such a thread must not be caught in compiled code when the process ends
            threading.Thread(target=self._prepare_behind_others, name="cag-choices").start()
        return chosen

    def prepare(self) -> None:
        """Make the copy, if it is served and memory allows; given up when the process ends."""
        weight = self._weight
        if weight is None or weight.nbytes // 2 > available_memory_bytes() // _MEMORY_SHARE:
            return
        allocate = huge_tensor if has_huge_pages() else None
        self.quick = largest_output(weight, allocate, resting(threading.main_thread().is_alive))

    def _prepare_behind_others(self) -> None:
        warm_up_largest()
        self.prepare()


def resting(
    goes_on: Callable[[], bool],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[], bool]:
    """`goes_on`, which rests before it answers, from the second call on: `_RESTS` times as long as the caller took.

    A thread of low priority would not do: on a busy machine it may keep the interpreter's lock for as long as others
    keep it from a core.
    """
    worked_from: float | None = None

    def rested() -> bool:
        nonlocal worked_from
        if worked_from is not None and goes_on():
            sleep(_RESTS * (clock() - worked_from))
        worked_from = clock()
        return goes_on()

    return rested
