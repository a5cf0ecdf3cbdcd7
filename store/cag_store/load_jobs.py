"""What a load reads: which groups of layers of which chunks, and how that is cut into jobs.

In: open chunks, and the first token that each layer keeps. Out: jobs, each neighbouring segments of one chunk. Reads
nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from cag_store.chunk_files import OpenChunk

Span = tuple[int, int]
"""Groups of layers, or layers, [first, last)."""


@dataclass(frozen=True, eq=False)
class Job:
    """Keys and values of the groups of layers [first, last) of one chunk, neighbours in its file; of a span of the
    plan."""

    chunk: OpenChunk
    first: int
    last: int
    span: int

    @property
    def segments(self) -> Span:
        """Places of its segments in the chunk's table, [first, last)."""
        sides = self.chunk.index.header.sides
        return sides * self.first, sides * self.last

    @property
    def num_bytes(self) -> int:
        """Encoded bytes."""
        first, last = self.segments
        return self.chunk.offsets[last] - self.chunk.offsets[first]


@dataclass(frozen=True, eq=False)
class LoadPlan:
    """Jobs of a load, span by span of neighbouring groups of layers: first spans of chunk 0, 1, ..., next spans of
    chunk 0, 1, ... The layers of a span count as whole together."""

    spans: list[Span]
    jobs: list[Job]

    @property
    def jobs_left(self) -> list[int]:
        """How many jobs each span has."""
        counts = [0] * len(self.spans)
        for job in self.jobs:
            counts[job.span] += 1
        return counts

    @property
    def chunks(self) -> list[OpenChunk]:
        """Those of which something is read, in order."""
        return sorted({job.chunk: None for job in self.jobs}, key=lambda chunk: chunk.entry.start)


def plan_load(
    chunks: Sequence[OpenChunk], first_tokens: Sequence[int], job_bytes: int, first_layer_soon: bool
) -> LoadPlan:
    """Jobs for what each layer keeps: all chunks from `first_tokens[layer]` on, which is alike for the layers of a
    group. With `first_layer_soon` layer 0 has jobs of its own, which costs small reads."""
    firsts = [first_tokens[first] for first, _ in chunks[0].index.header.groups]
    spans = list(group_spans(chunks, len(firsts), job_bytes, first_layer_soon))
    jobs = [
        Job(chunk, first, last, number)
        for number, span in enumerate(spans)
        for chunk in chunks
        for first, last in _kept_runs(firsts, chunk.entry.start, span)
    ]
    return LoadPlan(spans, jobs)


def _kept_runs(firsts: Sequence[int], start: int, span: Span) -> Iterator[Span]:
    """Runs of neighbouring groups of a span that keep the chunk which begins at `start`."""
    for kept, run in groupby(range(*span), key=lambda group: firsts[group] <= start):
        if kept:
            first, *others = run
            yield first, first + 1 + len(others)


def group_spans(chunks: Sequence[OpenChunk], num_groups: int, job_bytes: int, first_layer_soon: bool) -> Iterator[Span]:
    """Spans of neighbouring groups, which in the largest chunk have about equal bytes, about `job_bytes`: what would be
    left over otherwise is a small read for each chunk. The group of layer 0 has a span of its own where the caller
    waits for it first."""
    first = int(first_layer_soon and num_groups > 1)
    if first:
        yield 0, 1
    sides = chunks[0].index.header.sides
    largest = max((chunk.offsets for chunk in chunks), key=lambda offsets: offsets[-1] - offsets[0])
    ends = largest[sides * first :: sides]
    num_spans = min(max(round((ends[-1] - ends[0]) / job_bytes), 1), num_groups - first)
    goals = [ends[0] + (ends[-1] - ends[0]) * number / num_spans for number in range(1, num_spans)]
    bounds = [first + bisect_left(ends, goal) for goal in goals]
    yield from ((begin, end) for begin, end in pairwise([first, *bounds, num_groups]) if begin < end)
