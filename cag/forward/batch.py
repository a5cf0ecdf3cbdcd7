"""New tokens of several sequences in one forward: whose rows they are, where their keys go, what they attend to.

Rows of sequences behind one prefix stand side by side, and attend to it in one operation; each then sees its own tail
in its pages. What a row sees is never looked up by what else is in the batch. Knows kernels and states; no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.forward.state import (
    AttentionRule,
    PrefixLayers,
    PrefixSegment,
    SequenceState,
    attend_end,
    attend_prefix,
    sink_parts,
)
from cag.forward.step_tensors import StepSizes, StepState, StepTensors
from cag_kernels import (
    DensePrefix,
    cascade_attention,
    merge_segments,
    paged_attention,
    prefix_attention,
    rows_stay_apart,
)

TAIL_PAIRS = 1 << 16  # new tokens x earlier ones of a tail, above which several new tokens see the earlier as a segment

Array = NDArray[Any]


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring sequences behind one prefix: sequences `[sequences)` with rows `[rows)`.

    `earlier`, of a single sequence only, is how many tokens of its tail are attended to as a segment of their own.
    """

    prefix: PrefixLayers | None
    sequences: slice
    rows: slice
    earlier: int = 0


class Batch:
    """`counts[i]` new tokens of `states[i]`; those behind one prefix must be neighbours.

    The states have made room, and share one pool of pages unless there is only one. Attributes: `states`, `counts`;
    int32 arrays `pages [num_sequences, max_pages]`, `lengths`, `skipped` `[num_sequences]` and `starts
    [num_sequences + 1]` as `cag_kernels.cpu.paged.Tails` has them; int64 `row_pages`, `row_places`, `row_positions`
    `[num_rows]`: where each row's key and value go, and where it stands; `groups`.
    """

    def __init__(self, states: Sequence[SequenceState], counts: Sequence[int]) -> None:
        self.states, self.counts = states, counts
        self.starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        self.num_rows = int(self.starts[-1])
        self.lengths = np.array([s.num_tail + n for s, n in zip(states, counts, strict=True)], dtype=np.int32)
        tails = [state.tail for state in states]
        used = [tail.pages[: -(-int(n) // tail.page_tokens)] for tail, n in zip(tails, self.lengths, strict=True)]
        self.pages = np.zeros((len(states), max(map(len, used))), dtype=np.int32)
        for row, pages in zip(self.pages, used, strict=True):
            row[: len(pages)] = pages
        owners = np.repeat(np.arange(len(states)), counts)
        places = np.arange(self.num_rows) + np.repeat(self.lengths - self.starts[1:], counts)
        self.page_tokens = tails[0].page_tokens
        self.row_pages = self.pages[owners, places // self.page_tokens].astype(np.int64)
        self.row_places = (places % self.page_tokens).astype(np.int64)
        self.row_positions = places + np.repeat([state.num_prefix for state in states], counts)
        self.groups = list(self._grouped())
        self.skipped = np.zeros(len(states), dtype=np.int32)
        for group in self.groups:
            self.skipped[group.sequences] = group.earlier

    @property
    def num_sequences(self) -> int:
        """Sequences of the batch."""
        return len(self.states)

    @property
    def stands_behind_one(self) -> bool:
        """Whether all sequences stand behind one prefix, or all behind none."""
        return all(state.prefix is self.states[0].prefix for state in self.states)

    def last_rows(self, counts: int | Sequence[int] | None) -> list[int]:
        """The last rows of each sequence: as many as `counts` says of each, 1 if None. A number is of a single
        sequence, and means all rows if 0."""
        if isinstance(counts, int):
            return list(range(self.num_rows))[-counts:]
        counts = [1] * self.num_sequences if counts is None else counts
        ends = zip(self.starts[1:].tolist(), counts, strict=True)
        return [row for stop, count in ends for row in range(stop - count, stop)]

    def num_of_each(self, rows: Sequence[int]) -> list[int]:
        """How many of some rows, ascending, each sequence has."""
        counts: list[int] = np.diff(np.searchsorted(rows, self.starts)).tolist()
        return counts

    def positions(self, device: torch.device) -> Tensor:
        """Of all rows, `[num_rows]` int64."""
        return torch.from_numpy(self.row_positions).to(device)

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """The pages of a layer, keys and values."""
        return self.states[0].tail.sides(layer)

    def earlier(self, group: RowGroup, layer: int) -> list[PrefixSegment]:
        """The segment that `group.earlier` speaks of, if any."""
        if not group.earlier:
            return []
        return [DensePrefix(*self.states[group.sequences.start].tail.gathered(layer, group.earlier))]

    def finish(self) -> None:
        """All layers have seen the rows."""
        for state, count in zip(self.states, self.counts, strict=True):
            state.finish(count)

    def _grouped(self) -> Iterator[RowGroup]:
        """Sequences with many new tokens behind a long tail apart; that depends on the sequence alone."""
        start = 0
        for index, state in enumerate(self.states):
            own = self._earlier(index)
            following = self.states[index + 1] if index + 1 < len(self.states) else None
            ends = following is None or following.prefix is not state.prefix or own or self._earlier(index + 1)
            if ends:
                rows = slice(int(self.starts[start]), int(self.starts[index + 1]))
                yield RowGroup(state.prefix, slice(start, index + 1), rows, own)
                start = index + 1

    def _earlier(self, index: int) -> int:
        count, before = self.counts[index], self.states[index].num_tail
        return before if count > 1 and count * before > TAIL_PAIRS else 0


class BatchState(Batch, StepState):
    """A batch that a network's own forward attends with; see `SequenceState.attend`, of which it gives the same.

    `are_alike`: `run_alike` has put these sequences together.
    """

    are_alike = False

    @property
    def sequences(self) -> Sequence[SequenceState]:
        """Those whose rows these are."""
        return self.states

    def run_alike(
        self, ids: Tensor, wanted: Sequence[int], run: Callable[[Tensor, BatchState, list[int]], Tensor]
    ) -> Tensor:
        """Logits of the `wanted` rows, ascending, by forwards in which each sequence is a row of its own, since side by
        side they would run into each other in recurrent layers. `run` is given those sequences together that have as
        many new tokens, of which the same are wanted, and that all have tokens already or none; the wanted ones are
        counted in each sequence."""
        parts, order = [], []
        for (count, own, _), members in self._kinds(wanted).items():
            starts = [int(self.starts[index]) for index in members]
            rows = [start + row for start in starts for row in range(count)]
            alike = BatchState([self.states[index] for index in members], [count] * len(members))
            alike.are_alike = True
            parts.append(run(ids[rows], alike, list(own)))
            order += [start + row for start in starts for row in own]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _kinds(self, wanted: Sequence[int]) -> dict[tuple[int, tuple[int, ...], bool], list[int]]:
        kinds: dict[tuple[int, tuple[int, ...], bool], list[int]] = {}
        for index, (state, count) in enumerate(zip(self.states, self.counts, strict=True)):
            first = int(self.starts[index])
            own = tuple(row - first for row in wanted if first <= row < first + count)
            kinds.setdefault((count, own, state.num_tokens > 0), []).append(index)
        return kinds

    def upload(self, ids: Tensor, wanted: Sequence[int], device: torch.device) -> StepTensors:
        """What the forward needs, ids and wanted rows too, on `device`: before the first layer attends."""
        self.tensors = StepTensors(StepSizes.of(self, len(wanted)), device)
        self.tensors.fill(ids, self, wanted)
        return self.tensors

    def attend_stored(self, layer: int, query: Tensor, rule: AttentionRule, sinks: Tensor | None = None) -> Tensor:
        """Attend; the keys and values of all rows are in their pages."""
        tails, masks = self.tensors.tails(*self.sides(layer)), asdict(rule)
        if query.is_cuda and self.stands_behind_one and sinks is None:
            return cascade_attention(query, segments_of(self.states[0].prefix, layer), tails, **masks)
        found = [paged_attention(query, tails, **masks), *self._before(layer, query, masks), *sink_parts(query, sinks)]
        return merge_segments(found).to(query.dtype)

    def _before(self, layer: int, query: Tensor, rule: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """What all rows find in their prefixes, as many parts as the prefix with most segments has."""
        found = [(group.rows, self._group_before(group, layer, query[:, group.rows], rule)) for group in self.groups]
        parts = []
        for index in range(max(len(of_group) for _, of_group in found)):
            out = query.new_zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
            lse = out.new_full(query.shape[:2], -torch.inf)
            for rows, of_group in found:
                if index < len(of_group):
                    out[:, rows], lse[:, rows] = of_group[index]
            parts.append((out, lse))
        return parts

    def _group_before(
        self, group: RowGroup, layer: int, query: Tensor, rule: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        if group.prefix is None:
            return []
        segments, counts = group.prefix.segments(layer), self._counts_of(group)
        if query.is_cuda:
            return attend_on_device(group.prefix.num_tokens, segments, query, self.tensors.positions[group.rows], rule)
        if rule["window"] is None and rule["softcap"] is None:
            return attend_prefix_by_rows(query, segments, rule["scale"], counts)
        tails = zip(self.states[group.sequences], counts, strict=True)
        return attend_end(query, segments, [range(s.num_tail, s.num_tail + count) for s, count in tails], **rule)

    def _counts_of(self, group: RowGroup) -> Sequence[int]:
        return self.counts[group.sequences]


def attend_on_device(
    num_prefix: int, segments: Sequence[PrefixSegment], query: Tensor, positions: Tensor, rule: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """What rows at `positions [num_rows]` find in each segment of a prefix of so many tokens, read once for all of
    them, codes as they are; see `cag.forward.state.attend_prefix`."""
    missing = num_prefix - sum(segment.num_tokens for segment in segments)  # before the first segment
    positions, found = positions.int() - missing, []
    for segment in segments:
        found.append(prefix_attention(query, segment, positions=positions, **rule))
        positions = positions - segment.num_tokens
    return found


def segments_of(prefix: PrefixLayers | None, layer: int) -> tuple[PrefixSegment, ...]:
    """The segments of a layer of a prefix, none of no prefix; waits for the layer."""
    return () if prefix is None else prefix.segments(layer)


def attend_prefix_by_rows(
    query: Tensor, segments: Sequence[PrefixSegment], scale: float, counts: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """`cag.forward.state.attend_prefix` for rows of several sequences, `counts` of each: in one operation where a row's
    result does not depend on how many there are, else sequence by sequence."""
    if len(counts) == 1 or all(rows_stay_apart(query, segment) for segment in segments):
        return attend_prefix(query, segments, scale)
    found = [attend_prefix(part, segments, scale) for part in torch.split_with_sizes(query, list(counts), dim=1)]
    return [
        (torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1))
        for parts in zip(*found, strict=True)
    ]
