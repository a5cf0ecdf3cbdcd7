"""A prefix on the device: keys and values of all layers, shared by all sessions and never changed.

A prefix may be used while it is still loading: whoever needs a layer waits for that layer only, so the question's
forward runs through the first layers while later ones are read and decoded. A layer that attends through a window holds
the end of the prefix only, the chunks in which queries behind it see anything.
"""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.errors import InsufficientResources, UsageError
from cag.forward.state import numbers_of, sides_of
from cag.forward.waiting import wait_until
from cag.ngrams import NgramIndex
from cag.residency.host_copies import HostCopy
from cag.residency.load_plan import Buffers, LoadPlan, plan_of_numbers
from cag.residency.stream_buffers import StreamBuffers
from cag.residency.uploads import Uploads
from cag_kernels import DensePrefix

if TYPE_CHECKING:
    from cag.forward.recurrent import States
    from cag.forward.state import PrefixSegment, Tail


class ResidentPrefix:
    """Keys and values of `num_tokens` tokens, `[num_kv_heads, num_tokens, head_dim]` a layer and side.

    `layers` has the segments of each layer, one behind the other: numbers, or codes with what is exact behind them. All
    end with the prefix; those of a layer with a window may begin behind its first token.

    Attributes:
        token_ids: `[num_tokens]` int64.
        load_s: seconds from the start of loading until the last layer was there; 0 for a prefix that was computed here.
        tier: the slowest place that the layers were loaded from: "memory", "disk" or "object-store".
        shares_cores: whether loading needs the cores that a forward would run on.
        recurrent: what recurrent layers know behind the prefix; whoever makes a prefix of such a model sets it.
    """

    def __init__(self, layers: Sequence[tuple[PrefixSegment, ...]], token_ids: NDArray[np.int64]) -> None:
        self._layers = layers
        self.token_ids = token_ids
        self.recurrent: States = {}
        self.load_s = 0.0
        self.tier = "memory"
        self.shares_cores = False
        self._uploads: Uploads | None = None
        self._reread: Callable[[int], DensePrefix] | None = None  # a whole layer, where not all of it may be here
        self._confirm: Callable[[int], None] | None = None  # while layers arrive that may prove damaged
        self._ready = [threading.Event() for _ in layers]
        self._error: BaseException | None = None
        self._given_up = False

    @classmethod
    def from_tail(cls, tail: Tail, token_ids: NDArray[np.int64]) -> ResidentPrefix:
        """A prefix that was just computed; takes over the tail's buffers without a copy."""
        prefix = cls([(pair,) for pair in map(DensePrefix, tail.keys, tail.values)], token_ids)
        prefix.mark_loaded()
        return prefix

    @classmethod
    def load(
        cls, plan: LoadPlan, *, overlap: bool = True, on_host_copy: Callable[[HostCopy], None] | None = None
    ) -> ResidentPrefix:
        """Take the memory of a plan and start to load. Returns at once; errors surface where a layer is needed. The
        plan's reader stays open as long as `layer` may be called.

        `on_host_copy` is given what lies in pinned memory when all layers are on a GPU.

        With `overlap` a layer can be used as soon as it is there, and the first ones come soon. Without it, `segments`
        gives all layers together: where loading needs the very cores that the forward runs on, one after the other is
        sooner.
        """
        host = plan.take()
        prefix = cls(host.layers(), plan.reader.token_ids().astype(np.int64))
        prefix.shares_cores = not overlap
        prefix._reread = partial(_whole_layer, plan)
        prefix._start(host, partial(prefix._read, plan, host), on_host_copy)
        return prefix

    @classmethod
    def promote(cls, copy: HostCopy, plan: LoadPlan) -> ResidentPrefix:
        """Start to send to the device what an earlier load by this plan left in the host's memory. Returns at once, as
        `load`."""
        host = copy.again()
        prefix = cls(host.layers(), plan.reader.token_ids().astype(np.int64))
        prefix._reread = partial(_whole_layer, plan)
        prefix._start(host, partial(prefix._send, host), None)
        return prefix

    def _start(self, host: Buffers, work: Callable[[], None], on_host_copy: Callable[[HostCopy], None] | None) -> None:
        self._uploads = host.uploads
        self._confirm = host.confirm if isinstance(host, StreamBuffers) else None
        arguments = (host, work, on_host_copy)
        # no daemon: such a thread must not be caught in compiled code when the process ends
        threading.Thread(target=self._load, args=arguments, name="cag-load").start()

    def _load(
        self,
        host: Buffers,
        work: Callable[[], None],
        on_host_copy: Callable[[HostCopy], None] | None,
    ) -> None:
        start = time.perf_counter()
        try:
            try:
                work()
            finally:
                if host.uploads is not None:  # after an error too: the memory must not go while it is written to
                    host.uploads.finish()
            if self._confirm is not None:
                for layer in range(len(self._ready)):
                    self._confirm(layer)
            if host.uploads is not None and on_host_copy is not None:
                on_host_copy(host.host_copy())
            self.load_s = time.perf_counter() - start
        except BaseException as error:  # whoever waits for a layer gets one like it
            self._error = _kept(error)
        finally:
            self._confirm = None  # behind the error: `wait_for` looks at both in the other order
            self.mark_loaded()

    def _read(self, plan: LoadPlan, host: Buffers) -> None:
        arrived, soon = partial(self._arrived, host=host), not self.shares_cores
        plan.reader.load(host.views(), arrived, first_layer_soon=soon, first_tokens=plan.first_tokens)
        self.tier = plan.reader.tier

    def _send(self, host: Buffers) -> None:
        for layer in range(len(self._ready)):
            self._arrived(layer, host)

    def _arrived(self, layer: int, host: Buffers) -> None:
        if self._given_up:
            raise UsageError("the cache was closed while it was loading.", hint="Keep it open until answers are there.")
        host.arrived(layer)
        if layer < len(self._ready) - 1:  # the last layer is set with `load_s`
            self._ready[layer].set()

    def give_up(self) -> None:
        """Load no further layers: nobody wants them any more. Who waits for one all the same gets a UsageError."""
        self._given_up = True

    def mark_loaded(self) -> None:
        """All layers are there."""
        for event in self._ready:
            event.set()

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.token_ids)

    @cached_property
    def ngrams(self) -> NgramIndex:
        """Where runs of its tokens stand, for drafts; made when it is first asked for."""
        return NgramIndex(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values that are held on the device, as numbers or as codes with their scales, and of what
        recurrent layers know."""
        segments = [segment for layer in self._layers for segment in layer]
        held = {id(part): part for segment in segments for part in segment if isinstance(part, Tensor)}  # once each
        return sum(part.nbytes for part in (*held.values(), *self.recurrent.values()))

    @property
    def is_loaded(self) -> bool:
        """Whether all layers are there, or will not come."""
        return self._ready[-1].is_set()

    @property
    def has_failed(self) -> bool:
        """Whether loading has ended with an error: it must be loaded anew, by another prefix."""
        return self._error is not None

    def segments(self, index: int) -> tuple[PrefixSegment, ...]:
        """Keys and values of a layer, borrowed; waits for it.

        Raises:
            StoreError, InsufficientResources: what went wrong while loading.
            WaitGivenUp: see `cag.forward.waiting`.
        """
        self.wait_for(len(self._layers) - 1 if self.shares_cores else index)
        if self._uploads is not None:
            self._uploads.wait(index)
        return self._layers[index]

    def places(self, index: int) -> tuple[PrefixSegment, ...]:
        """As `segments`, without waiting: where the layer lies, or will lie when it has arrived."""
        return self._layers[index]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as numbers, `[num_kv_heads, num_tokens, head_dim]`: borrowed, or made from codes,
        or read from the store again where the device holds only what is seen through a window.

        Raises:
            StoreError, InsufficientResources: what went wrong while loading, or in reading again.
        """
        segments = self.segments(index)
        if sum(segment.num_tokens for segment in segments) < self.num_tokens:
            assert self._reread is not None, "only a load leaves tokens out"
            keys, values = self._reread(index)
            return keys, values
        dense = list(map(numbers_of, segments))
        if len(dense) == 1:
            return dense[0].keys, dense[0].values
        return torch.cat([segment.keys for segment in dense], 1), torch.cat([segment.values for segment in dense], 1)

    def wait_for(self, index: int) -> None:
        """Wait until a layer is there. Raises: as `segments`, an error of each caller's own."""
        wait_until(self._ready[index])
        confirm = self._confirm
        if self._error is not None:  # what is raised gets the frames of whoever waits, and keeps what they hold
            raise copy.copy(self._error)
        if confirm is not None:
            confirm(index)

    def wait(self) -> None:
        """Wait until all layers are there."""
        self.segments(len(self._ready) - 1)

    def wait_quietly(self) -> None:
        """Wait until loading has ended, whatever came of it."""
        self._ready[-1].wait()


def _kept(error: BaseException) -> BaseException:
    """The error of a load as it is kept: too little memory by that name, and the trace as text, since frames would keep
    the memory of the prefix."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        kept: BaseException = InsufficientResources(
            f"loading the cache takes more memory than is free ({error}).",
            hint="Close another one, or build it with a smaller codec.",
        )
    else:
        try:
            kept = copy.copy(error)
        except Exception:  # of a class that is not made from what it says of itself
            kept = RuntimeError(f"{type(error).__name__}: {error}")
    kept.add_note("".join(traceback.format_exception(error)))
    return kept


def _whole_layer(plan: LoadPlan, index: int) -> DensePrefix:
    """All tokens of a layer, decoded anew. Raises: StoreError."""
    reader = plan.reader
    firsts = reader.first_tokens([0 if layer == index else reader.num_tokens for layer in range(len(plan.shapes))])
    host = plan_of_numbers(plan, firsts, torch.device("cpu")).take()
    reader.load(host.views(), first_tokens=firsts)
    (numbers,) = host.layers()[index]
    sides = [side.to(plan.device) for side in sides_of(*numbers_of(numbers))]
    return DensePrefix(sides[0], sides[-1])
