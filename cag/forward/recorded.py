"""Forwards of few rows, recorded once and run again: what CUDA graphs are to a GPU (`cag_kernels.cpu.tape`).

Everything between the embedding and the output matrix is written down as compiled steps over memory that stays. The
next forward of as many rows behind the same prefix only puts its rows and places there. Knows the decoder's layers;
what a batch needs beyond that, the decoder itself computes.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.forward.pages import PagePool
from cag_kernels import DensePrefix, QuantizedPrefix
from cag_kernels.attention import COMPILED_MAX_ROWS
from cag_kernels.cpu.attention.segments import (
    HEAD_DIM_MULTIPLE,
    MAX_FEW_ROWS,
    MAX_HEAD_DIM,
    attends_in_bfloat16,
    cpu_attention,
    cpu_attention_serves,
    cpu_quantized_attention,
    quantized_attention_serves,
)
from cag_kernels.cpu.processor import has_compiler, has_tiles
from cag_kernels.cpu.tape import Scratch, Tape

if TYPE_CHECKING:
    from cag.forward.batch import Batch
    from cag.forward.decoder_layers import Layer, Norm, Rotations
    from cag.forward.state import AttentionRule, PrefixLayers, PrefixSegment
    from cag_kernels.cpu.paged import Tails

MAX_RECORDINGS = 16  # each holds activations of its rows and a few hundred bytes a step
_PAGES_STEP = 8  # a table of pages grows by so many, or every page would be another recording


class RecordedForwards:
    """Recordings of a network's layers, the least recently used forgotten first. One forward at a time.

    Attributes:
        rows_stay_apart: whether the layers give a row the same bits whatever other rows there are.
    """

    def __init__(self, layers: Sequence[Layer], norm: Norm, head_dim: int, attends_in: torch.dtype) -> None:
        self._layers, self._norm = layers, norm
        self._head_dim, self._attends_in = head_dim, attends_in
        self._recordable = all(product.is_recordable for layer in layers for product in layer.products)
        self.rows_stay_apart = self._recordable and attends_apart(head_dim, attends_in)
        self._found: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._scratch = Scratch()
        self._places: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # where tails lay when recorded
        self._watched: weakref.WeakSet[Any] = weakref.WeakSet()  # owners whose end is heeded

    def forward(
        self,
        hidden: Tensor,
        rotations: Rotations,
        batch: Batch,
        chosen: Sequence[int] | None,
        wanted: list[int] | slice,
    ) -> Tensor | None:
        """The `wanted` rows behind the layers, normalized, `[num_wanted, size]` float32 until the next forward; None if
        this batch cannot be recorded.

        hidden: embedded rows, float32; chosen: indices of the layers that run, all if None.

        Where the last row of each sequence is wanted and no other, the last layer computes for these alone.
        """
        if not self._recordable or len(batch.groups) != 1 or batch.groups[0].earlier:
            return None
        prefix = batch.groups[0].prefix
        tails = self._owner_of_tails(batch)
        max_pages = -(-batch.pages.shape[1] // _PAGES_STEP) * _PAGES_STEP
        last_alone = self.rows_stay_apart and batch.num_rows > batch.num_sequences and wanted == batch.last_rows(None)
        sizes = batch.num_rows, batch.num_sequences, max_pages
        key = (id(tails), id(prefix), *sizes, chosen and tuple(chosen), last_alone)
        recording = self._found.get(key)
        if recording is None:
            recording = self._record(batch, max_pages, hidden.shape[1], chosen, last_alone)
            if recording is None:
                return None
            self._keep(key, recording, (tails, prefix))
        self._found.move_to_end(key)
        normed = recording.run(hidden, rotations, batch)
        return normed if last_alone else normed[as_slice(wanted)]

    def _owner_of_tails(self, batch: Batch) -> Any:
        """Whose memory the tails are in: a pool of pages, or a tail of its own. Recordings are forgotten when the
        memory has moved."""
        tail = batch.states[0].tail
        owner, place = getattr(tail, "pool", tail), batch.sides(0)[0].data_ptr()
        if self._places.setdefault(owner, place) != place:
            self._places[owner] = place
            self._forget_over(owner)
        return owner

    def _forget_over(self, owner: Any) -> None:
        _forget(self._found, id(owner))

    def _record(
        self, batch: Batch, max_pages: int, size: int, chosen: Sequence[int] | None, last_alone: bool
    ) -> _Recording | None:
        indices = range(len(self._layers)) if chosen is None else chosen
        segments = {index: self._segments(batch, index) for index in indices}
        if any(found is None for found in segments.values()):
            return None
        found = {index: of_layer or [] for index, of_layer in segments.items()}
        return _Recording(self, batch, max_pages, size, found, last_alone)

    def _segments(self, batch: Batch, layer: int) -> list[PrefixSegment] | None:
        """What a layer's rows attend to before their tails; None where compiled code does not serve that."""
        prefix = batch.groups[0].prefix
        segments = [] if prefix is None else list(prefix.places(layer))
        keys = batch.sides(layer)[0]
        group = self._layers[layer].num_q_heads(self._head_dim) // keys.shape[1]
        if group * batch.num_rows > COMPILED_MAX_ROWS:
            return None
        query = torch.empty(group * keys.shape[1], batch.num_rows, self._head_dim, dtype=self._attends_in)
        for segment in segments:
            if isinstance(segment, QuantizedPrefix):
                served = quantized_attention_serves(query, segment)
            else:
                served = cpu_attention_serves(query, segment.keys) and segment.values.is_contiguous()
            if not served:
                return None
        return segments

    def _keep(self, key: tuple[Any, ...], recording: _Recording, owners: tuple[Any, ...]) -> None:
        """Until one of those is gone whose memory the recording holds; it does not hold themselves."""
        self._found[key] = recording
        for owner in owners:
            if owner is not None and owner not in self._watched:
                self._watched.add(owner)
                weakref.finalize(owner, _forget, self._found, id(owner)).atexit = False
            if isinstance(owner, PagePool):
                owner.before_moving = self._forget_over
        while len(self._found) > MAX_RECORDINGS:
            self._found.popitem(last=False)


def _forget(found: OrderedDict[tuple[Any, ...], _Recording], owner: int) -> None:
    """Drop the recordings over the tails or the prefix that had this identity."""
    for key in list(found):  # a copy: another owner may go at any moment, and takes its recordings along
        if owner in key[:2]:
            found.pop(key, None)


class _Rows:
    """Some rows between the layers: `hidden`, what blocks read of them and give, and where they stand in their tails
    and what these are."""

    def __init__(self, num_rows: int, size: int, tails: Tails) -> None:
        self.hidden = torch.zeros(num_rows, size, dtype=torch.float32)
        self.normed = torch.empty_like(self.hidden)
        self.updates = [torch.empty_like(self.hidden) for _ in range(2)]
        self.places = torch.zeros(num_rows, dtype=torch.int32)
        self.tails = tails


class _Recording:
    """One forward: the memory of its rows, and the tape over it."""

    def __init__(
        self,
        owner: RecordedForwards,
        batch: Batch,
        max_pages: int,
        size: int,
        segments: dict[int, list[PrefixSegment]],
        last_alone: bool,
    ) -> None:
        from cag_kernels.cpu import paged as cpu_paged
        from cag_kernels.cpu import steps as cpu_steps

        num_rows, num_sequences = batch.num_rows, batch.num_sequences
        self._steps = cpu_steps
        self._head_dim, self._attends_in = owner._head_dim, owner._attends_in
        self._rotations = {
            layer.turning: torch.empty(2, num_rows, self._head_dim, dtype=torch.float32) for layer in owner._layers
        }
        self.pages = np.zeros((num_sequences, max_pages), dtype=np.int32)
        self.lengths, self.starts, self.skipped = batch.lengths.copy(), batch.starts.copy(), batch.skipped.copy()
        self._targets = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, dtype=torch.int64)
        self._all = _Rows(num_rows, size, cpu_paged.Tails(self.pages, self.lengths, self.starts, self.skipped))
        self._last = self._all
        self._last_rows = torch.zeros(num_sequences, dtype=torch.int64)
        if last_alone:
            starts = np.arange(num_sequences + 1, dtype=np.int32)
            self._last = _Rows(num_sequences, size, cpu_paged.Tails(self.pages, self.lengths, starts, self.skipped))
        self._nothing = torch.zeros_like(self._all.hidden)
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._tape = Tape(owner._scratch)
        self._needs: list[int] = []  # the step of each layer that is the first to need its prefix
        with self._tape.recording():
            rows, update, behind = self._all, self._nothing, None
            last = next(reversed(segments))
            for index, found in segments.items():
                layer = owner._layers[index]
                read = self._pass_on(rows, update, behind, layer.before_attention)
                self._needs.append(len(self._tape))
                rows = self._last if index == last else self._all
                self._attend(layer, read, batch.sides(index), found, rows)
                read = self._pass_on(rows, rows.updates[0], layer.behind_attention, layer.before_mlp)
                self._mlp(layer, read, rows)
                update, behind = rows.updates[1], layer.behind_mlp
            self._pass_on(rows, update, behind, owner._norm)

    def run(self, hidden: Tensor, rotations: Rotations, batch: Batch) -> Tensor:
        """Normalized rows, all or the last of each sequence; see `RecordedForwards.forward`."""
        self._all.hidden.copy_(hidden)
        for turning, memory in self._rotations.items():
            for target, source in zip(memory, rotations[turning], strict=True):
                target.copy_(source)
        self.pages[:, : batch.pages.shape[1]] = batch.pages
        self.lengths[:], self.starts[:], self.skipped[:] = batch.lengths, batch.starts, batch.skipped
        self._all.places.numpy()[:] = places = tail_places(batch)
        if self._last is not self._all:
            self._last_rows.numpy()[:] = last_rows = batch.starts[1:] - 1
            self._last.places.numpy()[:] = places[last_rows]
        for rows, found in zip(self._targets, (batch.row_pages, batch.row_places), strict=True):
            rows.numpy()[:] = found
        begin = self._run_arriving(batch.groups[0].prefix)
        self._tape.run(begin)
        return self._last.normed

    def _run_arriving(self, prefix: PrefixLayers | None) -> int:
        """Run what can be run while the prefix is loading, and return the first step that is left then.

        Where loading needs the same cores, this takes one of them: threads that have to meet behind each step would
        wait for each other as often as one of them loses its core.
        """
        if prefix is None:
            return 0
        first = 0
        for index, last in enumerate(self._needs):
            if prefix.is_loaded:
                break
            self._tape.run(first, last, alone=prefix.shares_cores)
            first = last
            prefix.wait_for(index)
        prefix.wait_for(0)  # says what went wrong
        return first

    def _pass_on(self, rows: _Rows, update: Tensor, behind: Norm | None, before: Norm | None) -> Tensor:
        """As `FewRowsDecoder._pass_on`."""
        if before is None:
            if behind is not None:
                self._steps.add_normed(rows.hidden, update, torch.from_numpy(behind.weight), behind.epsilon)
            else:
                assert update is self._nothing, "each block has a norm on one of its sides"
            return rows.hidden
        norm = torch.from_numpy(before.weight), before.epsilon
        if behind is None:
            self._steps.add_and_norm(rows.hidden, update, *norm, rows.normed)
        else:
            own = torch.from_numpy(behind.weight), behind.epsilon
            self._steps.add_normed_and_norm(rows.hidden, update, *own, *norm, rows.normed)
        return rows.normed

    def _attend(
        self,
        layer: Layer,
        read: Tensor,
        pool: tuple[Tensor, Tensor],
        segments: list[PrefixSegment],
        rows: _Rows,
    ) -> None:
        """Keys and values are of all rows, queries of `rows`."""
        head_dim, num_kv_heads = self._head_dim, pool[0].shape[1]
        num_q_heads = layer.num_q_heads(head_dim)
        projected = self._memory("projected", len(read), layer.projections.out_features)
        layer.projections.into(read, projected)
        for norm, first, count in layer.head_norms(num_kv_heads * head_dim):
            self._steps.head_norm(projected, first, count, torch.from_numpy(norm.weight), norm.epsilon)
        query, rounded = self._queries(num_q_heads, len(read))
        cosines, sines = self._rotations[layer.turning]
        self._steps.rotate_and_store(projected, cosines, sines, query, rounded, pool, self._targets)
        if rows is not self._all:
            whole, (query, rounded) = query, self._queries(num_q_heads, len(rows.hidden))
            self._steps.take_rows(whole, self._last_rows, query, rounded)
            self._steps.take_rows(self._all.hidden[None], self._last_rows, rows.hidden[None])
        shape = query.shape
        parts = self._memory("parts", len(segments), *shape)
        logsumexps = self._memory("part_logsumexps", len(segments), *shape[:2])
        attending = rounded if self._rounds(query, segments) else query
        for index, (segment, offset) in enumerate(before_tails(segments)):
            into = parts[index], logsumexps[index]
            _attend_segment(attending, segment, offset, rows.places, layer.rule, into)
        out, own = self._memory("attended", shape[1], num_q_heads * head_dim), self._memory("logsumexps", *shape[:2])
        rule = layer.rule
        rows.tails.attend(query, *pool, rule.scale, parts, logsumexps, out, own, window=rule.window)
        layer.output.into(out, rows.updates[0])

    def _queries(self, num_heads: int, num_rows: int) -> tuple[Tensor, Tensor]:
        """Memory for queries, and for them in bfloat16."""
        shape = num_heads, num_rows, self._head_dim
        return self._memory("query", *shape), self._memory("rounded", *shape, dtype=torch.bfloat16)

    def _mlp(self, layer: Layer, read: Tensor, rows: _Rows) -> None:
        if layer.mlp is not None:
            layer.mlp.into(read, rows.updates[1])
            return
        projected = self._memory("gate_and_up", len(read), layer.gate_and_up.out_features)
        layer.gate_and_up.into(read, projected)
        gated = self._memory("gated", len(read), layer.gate_and_up.out_features // 2)
        self._steps.gate(projected, gated, layer.activation)
        layer.down.into(gated, rows.updates[1])

    def _rounds(self, query: Tensor, segments: list[PrefixSegment]) -> bool:
        return bool(segments) and attends_rounded(query, segments[0], self._attends_in)

    def _memory(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The same memory for all layers, as none needs it any more when the next one writes it."""
        found = self._buffers.get((name, shape))
        if found is None:
            found = self._buffers[name, shape] = torch.empty(*shape, dtype=dtype)
        return found


def attends_apart(head_dim: int, attends_in: torch.dtype) -> bool:
    """Whether a row that is attended in `attends_in` has the same bits in any company: by compiled code."""
    if attends_in == torch.bfloat16:
        return attends_in_bfloat16(head_dim)
    fits = attends_in == torch.float32 and head_dim % HEAD_DIM_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM
    return fits and has_compiler()


def attention_dtype(own: torch.dtype, head_dim: int, kv_dtype: torch.dtype) -> torch.dtype:
    """What a network of the type `own` attends in to keys and values in `kv_dtype`: in bfloat16 where compiled code
    does, over bfloat16; elsewhere in float32 by compiled code, which is quicker than a library in bfloat16."""
    if kv_dtype != torch.bfloat16 or own != torch.bfloat16:
        return torch.float32
    return own if attends_apart(head_dim, own) or not attends_apart(head_dim, torch.float32) else torch.float32


def attends_rounded(query: Tensor, segment: PrefixSegment, attends_in: torch.dtype) -> bool:
    """Whether a float32 query is rounded to the type that the network attends in: not for codes where no tiles meet
    them, nor where only code for a few float32 rows serves a single token quickly."""
    if attends_in == query.dtype:
        return False
    if not isinstance(segment, DensePrefix):
        return has_tiles() or not has_compiler()
    few = query.shape[0] // segment.keys.shape[0] * query.shape[1] <= MAX_FEW_ROWS
    return attends_apart(query.shape[2], attends_in) or not (few and cpu_attention_serves(query, segment.keys))


def as_slice(rows: list[int] | slice) -> list[int] | slice:
    """Rows that are neighbours as a slice: a list would become a tensor first."""
    if isinstance(rows, slice) or rows != list(range(rows[0], rows[0] + len(rows))):
        return rows
    return slice(rows[0], rows[-1] + 1)


def before_tails(segments: Sequence[PrefixSegment]) -> list[tuple[PrefixSegment, int]]:
    """Segments that end where tails begin, each with the place of a tail's first token counted from its first key."""
    behind = accumulate(segment.num_tokens for segment in reversed(segments))
    return list(zip(segments, reversed(list(behind)), strict=True))


def tail_places(batch: Batch) -> NDArray[np.int32]:
    """Where each row of a batch stands in its tail."""
    prefixes = np.repeat([state.num_prefix for state in batch.states], batch.counts)
    places: NDArray[np.int32] = (batch.row_positions - prefixes).astype(np.int32)
    return places


def _attend_segment(
    query: Tensor, segment: PrefixSegment, offset: int, places: Tensor, rule: AttentionRule, into: tuple[Tensor, Tensor]
) -> None:
    """Of rows at places of their tails, the first of which stands `offset` tokens behind the segment's first."""
    seen = seen_from(offset, places, segment, rule)
    if isinstance(segment, QuantizedPrefix):
        cpu_quantized_attention(query, segment, scale=rule.scale, into=into, **seen)
    else:
        cpu_attention(query, *segment, scale=rule.scale, into=into, **seen)


def seen_from(offset: int, places: Tensor, segment: PrefixSegment, rule: AttentionRule) -> dict[str, Any]:
    """What compiled attention has to know of where rows stand; without a window only that it is behind the segment."""
    if rule.window is None:
        return {"offset": segment.num_tokens}
    return {"offset": offset, "positions": places, "window": rule.window}
