"""Keys and values of one sequence while it runs: an immutable prefix that may be shared, and a tail of its own.

The prefix is attended where it lies; only the tail grows. A tail lies in one piece (`Tail`), as a prefix that is being
built does, or in pages of a pool (`cag.forward.pages.PagedTail`), as those of sessions do; whoever attends sees pages
in both. Knows kernels and tensors; knows no text, no model and no store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cag.forward.recurrent import KeptStates, RecurrentLayers, States
from cag_kernels import (
    DensePrefix,
    QuantizedPrefix,
    choose_prefix_path,
    dequantize_prefix,
    merge_segments,
    prefix_attention,
    rows_stay_apart,
    segment_attention,
)

MIN_TAIL_TOKENS = 128

PrefixSegment = DensePrefix | QuantizedPrefix


@dataclass(frozen=True)
class KvShape:
    """Keys and values of one layer: `[num_kv_heads, num_tokens, head_dim]` each. With one of `sides` the values are the
    keys, in the same memory."""

    num_kv_heads: int
    head_dim: int
    sides: int = 2

    @property
    def width(self) -> int:
        """Numbers of a token, keys and values."""
        return self.sides * self.num_kv_heads * self.head_dim

    def values_beside(self, keys: Tensor) -> Tensor:
        """Memory of any content for the values of `keys`: new, or those themselves."""
        return keys if self.sides == 1 else torch.empty_like(keys)


@dataclass(frozen=True)
class AttentionRule:
    """How a layer attends: factor of the scores, sliding window and cap of the scores (None where it has none)."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def first_seen(self, num_tokens: int) -> int:
        """The first token of a prefix of so many that a query behind it can see; `num_tokens` where it sees none."""
        return 0 if self.window is None else min(max(0, num_tokens - self.window + 1), num_tokens)


@dataclass(frozen=True)
class KvPlace:
    """In which layer's keys and values a layer of a network finds its own, and whether it is the one that makes them;
    layers may share them."""

    layer: int
    stores: bool = True


def sides_of(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """Those of a layer that are memory of their own: one where the values are the keys."""
    return (keys,) if values is keys else (keys, values)


class AttendingState(Protocol):
    """What a forward's attention goes through; see `SequenceState.attend`."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        stores: bool,
    ) -> Tensor:
        """Queries after RoPE to what each of them finds."""


class PrefixLayers(Protocol):
    """What a sequence needs of the prefix it stands behind.

    The segments of a layer follow each other and end with the prefix. They need not begin with it: a layer with a
    window may have only what queries behind the prefix can see. So places are counted from the end.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""

    @property
    def recurrent(self) -> States:
        """What recurrent layers know behind the prefix."""

    @property
    def is_loaded(self) -> bool:
        """Whether all layers are there, or will not come."""

    def segments(self, index: int) -> tuple[PrefixSegment, ...]:
        """Keys and values of a layer, at least of all tokens that are seen behind the prefix, as segments that follow
        each other; waits until they have arrived, and where `shares_cores` until all have."""

    def places(self, index: int) -> tuple[PrefixSegment, ...]:
        """As `segments`, without waiting: where the layer lies, or will lie."""

    shares_cores: bool
    """Whether its loading needs the cores that a forward would run on."""

    def wait_for(self, index: int) -> None:
        """Wait until a layer is there, whether or not that is a good moment to compute."""

    def wait(self) -> None:
        """Wait until all layers are there."""


class SequenceTail(Protocol):
    """Growing keys and values of one sequence: pages of `page_tokens` tokens, the last one not always full."""

    pages: list[int]

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""

    def reserve(self, num_tokens: int, used: int) -> None:
        """Make room for `num_tokens` in all, keeping the first `used`."""

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that `pages` counts in, `[num_pages, num_kv_heads, page_tokens, head_dim]`, borrowed."""

    def gathered(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens side by side, `[num_kv_heads, num_tokens, head_dim]`; a copy where they do not lie so."""

    def store(self, layer: int, place: int, keys: Tensor, values: Tensor) -> None:
        """Put `[num_kv_heads, num_new, head_dim]`, rounded to the tail's dtype, at token `place` and behind it."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""


class Tail:
    """One page that grows by doubling: a pair of buffers a layer, in the storage dtype of the cache."""

    def __init__(self, shapes: list[KvShape], dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        self.shapes = shapes
        self.capacity = capacity
        self.pages = [0]
        self.keys = [torch.empty(s.num_kv_heads, capacity, s.head_dim, dtype=dtype, device=device) for s in shapes]
        self.values = [shape.values_beside(keys) for shape, keys in zip(shapes, self.keys, strict=True)]

    @property
    def page_tokens(self) -> int:
        """All that there is room for."""
        return self.capacity

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of a layer, as one page `[1, num_kv_heads, capacity, head_dim]`."""
        return self.keys[layer][None], self.values[layer][None]

    def gathered(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of a layer, borrowed."""
        sides = [side[:, :num_tokens] for side in sides_of(self.keys[layer], self.values[layer])]
        return sides[0], sides[-1]

    def store(self, layer: int, place: int, keys: Tensor, values: Tensor) -> None:
        """See `SequenceTail`."""
        end = place + keys.shape[1]
        for side, new in zip(sides_of(self.keys[layer], self.values[layer]), (keys, values), strict=False):
            side[:, place:end] = new

    def reserve(self, num_tokens: int, used: int) -> None:
        """Make room for `num_tokens` in all, keeping the first `used`."""
        if num_tokens <= self.capacity:
            return
        self.capacity = max(num_tokens, 2 * self.capacity, MIN_TAIL_TOKENS)
        for index, shape in enumerate(self.shapes):
            before = sides_of(self.keys[index], self.values[index])
            self.keys[index] = before[0].new_empty(shape.num_kv_heads, self.capacity, shape.head_dim)
            self.values[index] = shape.values_beside(self.keys[index])
            for side, old in zip((self.keys[index], self.values[index]), before, strict=False):
                side[:, :used] = old[:, :used]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        pairs = zip(self.keys, self.values, strict=True)
        return sum(side.nbytes for pair in pairs for side in sides_of(*pair))


class SequenceState:
    """One sequence: `num_prefix` tokens of a shared prefix, then `num_tail` tokens of its own.

    With recurrent `layers` it goes back to its last `mark` only, or to its beginning.
    """

    def __init__(
        self, tail: SequenceTail, prefix: PrefixLayers | None = None, layers: RecurrentLayers | None = None
    ) -> None:
        self.prefix = prefix
        self.tail = tail
        self.num_prefix = prefix.num_tokens if prefix is not None else 0
        self.num_tail = 0
        self._kept = None if layers is None else KeptStates({} if prefix is None else prefix.recurrent)
        self._staged: States = {}

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are there."""
        return self.num_prefix + self.num_tail

    @property
    def sequences(self) -> list[SequenceState]:
        """The only one."""
        return [self]

    @property
    def recurrent(self) -> States:
        """What recurrent layers know behind the last token."""
        return {} if self._kept is None else self._kept.behind(self.num_tail)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of what recurrent layers know behind tokens of its own."""
        return 0 if self._kept is None else self._kept.num_bytes

    def begin(self, num_tokens: int) -> None:
        """Make room for a forward of `num_tokens` tokens."""
        self.tail.reserve(self.num_tail + num_tokens, used=self.num_tail)

    def stage(self, states: States) -> None:
        """What recurrent layers know behind the tokens that `finish` will count."""
        self._staged = states

    def finish(self, num_tokens: int) -> None:
        """Count the tokens of a forward that went through all layers."""
        if self._kept is not None:
            self._kept.add(self.num_tail + num_tokens, self._staged)
        self.num_tail += num_tokens
        if self._kept is not None:
            self._kept.settle(self.num_tail)

    def leave_prefix(self) -> None:
        """Hold the tail and nothing else, until `join_prefix`."""
        self.prefix = None
        if self._kept is not None and not self.num_tail:  # what the recurrent layers know is the prefix's own
            self._kept = KeptStates({})

    def join_prefix(self, prefix: PrefixLayers) -> None:
        """Go on behind the prefix that was left, wherever it is now."""
        self.prefix = prefix
        if self._kept is not None and not self.num_tail:
            self._kept = KeptStates(prefix.recurrent)

    def mark(self) -> None:
        """Go back no further than here from now on."""
        if self._kept is not None:
            self._kept.settle(self.num_tail, mark=True)

    def rewind(self, num_tail: int) -> None:
        """Forget the tokens of the tail behind the first `num_tail`: as many as there were at the last `mark`, or with
        no recurrent layers any number."""
        assert 0 <= num_tail <= self.num_tail
        assert self._kept is None or self._kept.has(num_tail), "recurrent layers know nothing of that place"
        self.num_tail = num_tail

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        stores: bool = True,
    ) -> Tensor:
        """Store the keys and values of new tokens, and attend to everything up to each of them.

        Args:
            layer: index of the layer.
            query: `[num_q_heads, num_queries, head_dim]`, after RoPE; of all new tokens, or of the last ones where a
                network asks for no more.
            keys: `[num_kv_heads, num_new, head_dim]`, after RoPE; rounded to the tail's dtype before anyone sees them.
            values: as `keys`.
            scale: factor of the scores.
            window: sliding window of the layer, or None.
            softcap: cap of the scores, or None.
            sinks: `[num_q_heads]` scores of a key that each query of a head sees besides, with a value of zeros; or
                None.
            stores: whether nobody has stored these keys and values in this forward, as a layer may have that shares
                them.

        Returns:
            `[num_q_heads, num_queries, head_dim]` in the query's dtype.
        """
        if stores:
            self.tail.store(layer, self.num_tail, keys, values)
        rule: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
        end = self.num_tail + keys.shape[1]
        places = range(end - query.shape[1], end)
        parts = [segment_attention(query, *self.tail.gathered(layer, places.stop), offset=places.start, **rule)]
        if self.prefix is not None and window is None and softcap is None:
            parts += attend_prefix(query, self.prefix.segments(layer), scale)
        elif self.prefix is not None:
            parts += attend_end(query, self.prefix.segments(layer), [places], **rule)
        return merge_segments([*parts, *sink_parts(query, sinks)]).to(query.dtype)


class WholeState(SequenceState):
    """A sequence whose own tokens lie in one piece, as those of a prefix that is being built."""

    tail: Tail


def sink_parts(query: Tensor, sinks: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """What queries `[num_q_heads, num_new, head_dim]` find in the `sinks` of `SequenceState.attend`, as
    `attend_prefix`."""
    if sinks is None:
        return []
    out = query.new_zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
    return [(out, sinks.to(out.dtype)[:, None].expand(out.shape[:2]))]


def attend_prefix(query: Tensor, segments: Sequence[PrefixSegment], scale: float) -> list[tuple[Tensor, Tensor]]:
    """What queries `[num_q_heads, num_new, head_dim]` behind a whole prefix find in each of its segments: outputs and
    log-sum-exps, as `cag_kernels.segment_attention` gives them."""
    return [
        prefix_attention(query, segment, scale=scale)
        if isinstance(segment, QuantizedPrefix)
        else segment_attention(query, *segment, scale=scale, offset=segment.num_tokens)
        for segment in segments
    ]


def attend_end(
    query: Tensor,
    segments: Sequence[PrefixSegment],
    places: Sequence[range],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> list[tuple[Tensor, Tensor]]:
    """As `attend_prefix`, with a window or a cap, for queries of several sequences side by side.

    Args:
        query: `[num_q_heads, num_rows, head_dim]`.
        segments: of a layer: they end where the tails begin.
        places: of the rows of each sequence, in its tail.
        scale, window, softcap: as in `SequenceState.attend`.
    """
    rule: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    found, behind = [], sum(segment.num_tokens for segment in segments)
    for segment in segments:
        counted = [range(part.start + behind, part.stop + behind) for part in places]  # from the segment's first key
        found.append(_attend_segment(query, segment, counted, rule))
        behind -= segment.num_tokens
    return found


def _attend_segment(
    query: Tensor, segment: PrefixSegment, places: Sequence[range], rule: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """See `attend_end`; `places` are counted from the segment's first key. In one operation where a row's result does
    not depend on how many there are, else sequence by sequence."""
    path = choose_prefix_path(query, segment, window=rule["window"], softcap=rule["softcap"])
    if len(places) > 1 and (path == "torch" or not rows_stay_apart(query, segment, window=rule["window"])):
        rows = torch.split_with_sizes(query, list(map(len, places)), dim=1)
        parts = [_attend_segment(own, segment, [part], rule) for own, part in zip(rows, places, strict=True)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)
    if len(places) == 1 and (path == "torch" or isinstance(segment, DensePrefix)):
        return segment_attention(query, *numbers_of(segment), offset=places[0].start, **rule)
    positions = torch.cat([torch.arange(part.start, part.stop, dtype=torch.int32) for part in places])
    return prefix_attention(query, segment, positions=positions.to(query.device), **rule)


def numbers_of(segment: PrefixSegment) -> DensePrefix:
    """A segment as numbers: borrowed, or made from codes."""
    if isinstance(segment, DensePrefix):
        return segment
    return DensePrefix(*dequantize_prefix(segment, segment.exact_keys.dtype))
