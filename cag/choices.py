"""The greedy choice of few rows without all logits: a copy of the output matrix in 8 bits, made in the background.

What is chosen is what the largest logit says, to the bit (`cag_kernels.LargestOutput`); the copy shows in the times and
in half of the matrix's bytes of memory. Knows a product and the machine's memory; no network.
"""

from __future__ import annotations

import os
import threading

import psutil
from torch import Tensor

from cag.huge_pages import has_huge_pages, huge_tensor
from cag.weights import Product, plain_tile_weight
from cag_kernels import LargestOutput, largest_output, largest_output_serves, warm_up_largest

_MEMORY_SHARE = 8  # of the memory that is free, the part that a copy may take


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
        weight = plain_tile_weight(head)
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
        if self._weight is None or self._weight.nbytes // 2 > psutil.virtual_memory().available // _MEMORY_SHARE:
            return
        allocate = huge_tensor if has_huge_pages() else None
        self.quick = largest_output(self._weight, allocate, threading.main_thread().is_alive)

    def _prepare_behind_others(self) -> None:
        warm_up_largest()
        yield_to_others()
        self.prepare()


def yield_to_others() -> None:
    """Let the calling thread run only where no other one wants to. For good: going back takes a privilege."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
