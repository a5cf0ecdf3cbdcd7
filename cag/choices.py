"""The greedy choice of few rows without all logits: a copy of the output matrix in 8 bits, made in the background.

What is chosen is what the largest logit says, to the bit (`cag_kernels.LargestOutput`); the copy shows in the times and
in half of the matrix's bytes of memory. Knows a product and the machine's memory; no network.
"""

from __future__ import annotations

import os
import threading

import psutil

from cag.huge_pages import has_huge_pages, huge_tensor
from cag.weights import Product, plain_tile_weight
from cag_kernels import LargestOutput, largest_output, largest_output_serves, warm_up_largest

_MEMORY_SHARE = 8  # of the memory that is free, the part that a copy may take


def quick_choice(head: Product) -> LargestOutput | None:
    """The choice by an output matrix; None where its copy is not served, or memory is short.

    For a thread of its own that is no daemon: what it computes is for cores that have nothing else to do, and it stops
    when the process ends.
    """
    weight = plain_tile_weight(head)
    if weight is None or not largest_output_serves(weight):
        return None
    if weight.nbytes // 2 > psutil.virtual_memory().available // _MEMORY_SHARE:
        return None
    warm_up_largest()
    yield_to_others()
    return largest_output(weight, huge_tensor if has_huge_pages() else None, threading.main_thread().is_alive)


def yield_to_others() -> None:
    """Let the calling thread run only where no other one wants to. For good: going back takes a privilege."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
