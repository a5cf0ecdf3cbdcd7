"""Several texts behind one prefix in one forward, apart from each other: how the loss of a cache is measured.

Knows kernels and a prefix's segments; knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cag.forward.recurrent import States
from cag.forward.state import PrefixLayers, numbers_of, sink_parts
from cag_kernels import DensePrefix, merge_segments, segment_attention


class BranchedState:
    """Several sequences behind one prefix, for one forward over all of them: a token sees the prefix and what stands
    before it in its own branch. Nothing is kept.

    The tokens of the forward are those of the branches one behind the other, `branch_tokens[i]` of each.
    """

    def __init__(self, prefix: PrefixLayers, branch_tokens: Sequence[int]) -> None:
        self.prefix = prefix
        self.branches = [slice(first, last) for first, last in pairwise(accumulate(branch_tokens, initial=0))]

    @property
    def sequences(self) -> list[BranchedState]:
        """Where layers are recurrent, there is one branch."""
        return [self]

    @property
    def recurrent(self) -> States:
        """What recurrent layers know before a branch."""
        return self.prefix.recurrent

    @property
    def num_tokens(self) -> int:
        """Tokens before each branch."""
        return self.prefix.num_tokens

    def stage(self, states: States) -> None:
        """Nothing is kept; see `SequenceState`."""

    def positions(self) -> Tensor:
        """Of all tokens, `[num_tokens]` int64: each branch begins right behind the prefix."""
        return torch.cat([torch.arange(part.stop - part.start) for part in self.branches]) + self.prefix.num_tokens

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
        stores: bool = True,  # noqa: ARG002 - nothing is stored
    ) -> Tensor:
        """As `SequenceState.attend`, each branch apart; keys and values are used as they come, unrounded."""
        attend = partial(segment_attention, scale=scale, window=window, softcap=softcap)
        visible = self._visible(layer, window)
        # one pass over the prefix serves all branches, unless a window hides other keys from each
        shared = [attend(query, *segment, offset=behind) for segment, behind in visible] if window is None else None
        merged = []
        for part in self.branches:
            own = query[:, part]
            if shared is None:
                before = [attend(own, *segment, offset=behind) for segment, behind in visible]
            else:
                before = [(out[:, part], lse[:, part]) for out, lse in shared]
            found = [attend(own, keys[:, part], values[:, part], offset=0), *before, *sink_parts(own, sinks)]
            merged.append(merge_segments(found))
        return torch.cat(merged, dim=1).to(query.dtype)

    def _visible(self, layer: int, window: int | None) -> list[tuple[DensePrefix, int]]:
        """What any branch can see of the prefix, and how many tokens there are from each segment's first to the
        prefix's end."""
        found, segments = [], self.prefix.segments(layer)
        behind = sum(segment.num_tokens for segment in segments)
        for segment in segments:
            hidden = 0 if window is None else min(max(behind - window, 0), segment.num_tokens)
            if hidden < segment.num_tokens:
                numbers = DensePrefix(*(side[:, hidden:] for side in numbers_of(segment)))
                found.append((numbers, behind - hidden))
            behind -= segment.num_tokens
        return found
