"""Steps of sessions behind one prefix that are recorded once and replayed: CUDA graphs, in buckets of sizes.

A step is padded to the next sizes of a short list, over memory that stays, so that a few recordings serve every number
of sessions and every length of question. Rows and sequences that are added touch the pool's scratch page only and
change no real row. The first step of a bucket runs as it is, which compiles what it needs; the second one is recorded.
Without recording (on a CPU, or where a network cannot be recorded) the same padded steps run one by one.

Knows batches, pages and one function that runs a network; knows no network.
"""

from __future__ import annotations

import warnings
import weakref
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cag.forward.batch import Batch, attend_on_device, segments_of
from cag.forward.pages import PagedTail, PagePool
from cag.forward.state import AttentionRule, PrefixSegment, sink_parts
from cag.forward.step_tensors import NUM_ARRIVALS, StepSizes, StepState, StepTensors
from cag_kernels import cascade_attention, merge_segments, paged_attention
from cag_kernels.triton.launch_ways import launch_ways, launching

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MIN_QUESTION_ROWS = 16  # shorter questions are padded to it
MIN_PAGES = 4  # of a sequence; doubled until they are enough
MAX_STEPS = 48  # of one prefix; the least recently used is forgotten

RunNetwork = Callable[[StepTensors, StepState], Tensor]
"""Logits `[num_wanted, vocab_size]` float32 of a step's tensors, attending through its state."""


def padded_sizes(sizes: StepSizes) -> StepSizes:
    """The sizes of the bucket that a step belongs to: one row of each sequence, or anything else.

    Raises:
        ValueError: more rows than the largest bucket has.
    """
    pages = max(MIN_PAGES, 1 << (sizes.num_pages - 1).bit_length())
    if sizes.max_rows == 1:
        rows = _next(sizes.num_rows)
        return StepSizes(rows, rows, pages, 1, rows)
    rows = _next(max(MIN_QUESTION_ROWS, sizes.num_rows))
    sequences = _next(sizes.num_sequences + 1)  # one more has the rows that are added
    return StepSizes(rows, sequences, pages, rows, _next(sizes.num_wanted))


def _next(count: int) -> int:
    place = bisect_left(ROWS, count)
    if place == len(ROWS):
        raise ValueError(f"{count} rows, but steps have {ROWS[-1]} at most")
    return ROWS[place]


class PaddedState(StepState):
    """What the rows of a padded step attend to; see `cag.forward.batch.BatchState`, of which it is the part for one
    prefix."""

    def __init__(
        self, tensors: StepTensors, pool: PagePool, layers: Sequence[tuple[PrefixSegment, ...]], num_prefix: int
    ) -> None:
        self.tensors, self._pool, self._layers, self._num_prefix = tensors, pool, layers, num_prefix

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """The pages of a layer, keys and values."""
        return self._pool.keys[layer], self._pool.values[layer]

    def segments(self, layer: int) -> tuple[PrefixSegment, ...]:
        """What stands before all rows."""
        return self._layers[layer]

    def attend_stored(self, layer: int, query: Tensor, rule: AttentionRule, sinks: Tensor | None = None) -> Tensor:
        """Attend; the keys and values of all rows are in their pages."""
        tails, segments = self.tensors.tails(*self.sides(layer)), self._layers[layer]
        if sinks is not None:
            before = attend_on_device(self._num_prefix, segments, query, self.tensors.positions, asdict(rule))
            found = [paged_attention(query, tails, **asdict(rule)), *before, *sink_parts(query, sinks)]
            return merge_segments(found).to(query.dtype)
        arrivals = self.tensors.arrivals if tails.keys.shape[1] <= NUM_ARRIVALS else None
        return cascade_attention(query, segments, tails, **asdict(rule), arrivals=arrivals)


class StepReplays:
    """Runs the steps of sessions behind one prefix, or behind none, in buckets. One step at a time.

    Attributes:
        num_replayed: steps that were replayed from a recording.
        refusal: why nothing is recorded any more, None while recording works or was not asked for.
    """

    def __init__(self, run: RunNetwork, pool: PagePool, device: torch.device, *, capture: bool) -> None:
        """`capture`: record the second step of each bucket in a CUDA graph."""
        self._run, self._pool, self._device, self._captures = run, pool, device, capture
        self._recordings: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._memory: Any = None  # of all recordings; not to be used again once the last of them is gone
        self._stream: torch.cuda.Stream | None = None  # that they are made in, and nothing else runs in
        self._behind: weakref.WeakKeyDictionary[Any, _Steps] = weakref.WeakKeyDictionary()
        self._behind_nothing = _Steps()
        self.num_replayed = 0
        self.refusal: str | None = None

    @property
    def records(self) -> bool:
        """Whether the second step of a bucket is recorded."""
        return self._captures

    def serves(self, batch: Batch) -> bool:
        """Whether `forward` takes a batch: sessions of the pool, one prefix that is there, not too many rows."""
        prefix = batch.states[0].prefix
        return (
            batch.num_rows <= ROWS[-1]
            and batch.num_sequences < ROWS[-1]
            and batch.stands_behind_one
            and (prefix is None or prefix.is_loaded)
            and all(isinstance(state.tail, PagedTail) and state.tail.pool is self._pool for state in batch.states)
        )

    def forward(self, ids: Tensor, batch: Batch, wanted: Sequence[int]) -> Tensor:
        """Logits of the `wanted` rows of a batch, `[num_wanted, vocab_size]` float32; `ids [num_rows]` on the CPU."""
        step = self._step(batch, len(wanted))
        assert self._pool.scratch_page is not None, "padded rows need a scratch page"
        step.tensors.fill(ids, batch, wanted, self._pool.scratch_page)
        if step.graph is None and step.has_run and self._captures:
            self._record(step)
        if step.graph is None:
            step.has_run = True
            return self._run(step.tensors, step.state)[: len(wanted)]
        step.graph.replay()
        self.num_replayed += 1
        return step.logits[: len(wanted)].clone()  # another recording may use the memory

    def forget(self) -> None:
        """Drop all recordings."""
        self._behind.clear()
        self._behind_nothing = _Steps()

    def _step(self, batch: Batch, num_wanted: int) -> _Step:
        prefix = batch.states[0].prefix
        steps = self._behind_nothing if prefix is None else self._behind.setdefault(prefix, _Steps())
        if steps.version != self._pool.version:
            steps.found.clear()
            steps.version = self._pool.version
        sizes = padded_sizes(StepSizes.of(batch, num_wanted))
        step = steps.found.pop(sizes, None)
        if step is None:
            tensors = StepTensors(sizes, self._device)
            layers = [segments_of(prefix, layer) for layer in range(len(self._pool.keys))]
            step = _Step(tensors, PaddedState(tensors, self._pool, layers, batch.states[0].num_prefix))
        steps.found[sizes] = step
        if len(steps.found) > MAX_STEPS:
            steps.found.popitem(last=False)
        return step

    def _record(self, step: _Step) -> None:
        """Record a step that has run once; where launches that overlap cannot be recorded, with others."""
        ways = launch_ways()
        for tried in dict.fromkeys((ways, ways._replace(overlaps=False))):
            try:
                with launching(tried):
                    step.graph, step.logits = self._recorded(step)
            except RuntimeError as error:
                refused = error
            else:
                self._recordings.add(step.graph)
                return
        self._captures, self.refusal = False, str(refused)
        warnings.warn(f"steps are not recorded in CUDA graphs: {refused}", RuntimeWarning, stacklevel=2)

    def _recorded(self, step: _Step) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of a step and where it leaves its logits. Other threads may load a prefix meanwhile."""
        graph = torch.cuda.CUDAGraph()
        if not self._recordings:
            self._memory = torch.cuda.graph_pool_handle()
        stream = self._stream = self._stream or _stream_of_recordings(self._device)
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]  # a thread can't make its first in a recording
        before = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
                return graph, self._run(step.tensors, step.state)
        finally:
            torch.cuda.set_stream(before)  # torch stays in the other one if a recording does not end well


def _stream_of_recordings(device: torch.device) -> torch.cuda.Stream:
    """A stream in which nothing runs but what is recorded.

    torch has 32 streams of each priority and gives them out in turn, so one of the usual priority would come to a
    prefix that loads, too, and its copies into the recording. What is recorded here goes before what loads.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class _Step:
    """The memory of one bucket, and its recording if there is one."""

    def __init__(self, tensors: StepTensors, state: PaddedState) -> None:
        self.tensors, self.state = tensors, state
        self.has_run = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)


class _Steps:
    """The steps behind one prefix, those used last at the end, and the version of the pool they were made for."""

    def __init__(self) -> None:
        self.found: OrderedDict[StepSizes, _Step] = OrderedDict()
        self.version = -1
