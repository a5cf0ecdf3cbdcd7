"""Which layers' keys a codec hurts most: how far attention moves when the keys of one layer are decoded ones.

In: a model, a prefix with exact keys, probes, decoded keys layer by layer. Out: a number for each layer. One forward
over the probes gives the queries of all layers; nothing is generated and no layer is tried on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cag.building.probes import Branch
from cag.forward.branches import BranchedState
from cag.model import LanguageModel
from cag.residency.resident import ResidentPrefix

MAX_PROBE_TOKENS = 128


def key_errors(
    model: LanguageModel, prefix: ResidentPrefix, branches: Sequence[Branch], decoded: Callable[[int], Tensor]
) -> list[float]:
    """For each layer the KL divergence, to second order, of the weights that the probes' queries give to the prefix
    when `decoded(layer)` `[num_kv_heads, num_tokens, head_dim]` takes the place of its keys: half the variance of the
    change of a score under the weights, a mean over queries and a sum over heads.
    """
    found, chosen = [0.0] * len(model.kv_shapes), _first_tokens(branches)
    num_tokens = sum(len(branch.token_ids) for branch in chosen)

    def watch(layer: int, query: Tensor, scale: float) -> None:  # of all branches, or of one after the other
        keys = prefix.layer(layer)[0].float()
        moved = float(moved_weights(query.float(), keys, decoded(layer).to(keys.device).float(), scale))
        found[layer] += moved * (query.shape[1] / num_tokens)

    make_state = partial(_WatchedBranches, watch)
    model.forward_branches([list(branch.token_ids) for branch in chosen], prefix, [0], make_state=make_state)
    return found


def moved_weights(query: Tensor, keys: Tensor, decoded: Tensor, scale: float) -> Tensor:
    """See `key_errors`: query `[num_q_heads, num_queries, head_dim]`, keys and decoded `[num_kv_heads, num_tokens,
    head_dim]`, all float32; a scalar."""
    total = query.new_zeros(())
    groups = query.shape[0] // keys.shape[0]
    for head in range(keys.shape[0]):
        rows = query[head * groups : (head + 1) * groups].flatten(0, 1)
        weights = (rows @ keys[head].T * scale).softmax(-1)
        change = rows @ (decoded[head] - keys[head]).T * scale
        mean = (weights * change).sum(-1)
        total += ((weights * change.square()).sum(-1) - mean.square()).sum() / (2 * query.shape[1])
    return total


def _first_tokens(branches: Sequence[Branch]) -> list[Branch]:
    """Every other branch until there are enough tokens: questions and excerpts from all over the prefix."""
    chosen: list[Branch] = []
    for branch in [*branches[::2], *branches[1::2]]:
        if chosen and sum(len(other.token_ids) for other in chosen) + len(branch.token_ids) > MAX_PROBE_TOKENS:
            break
        chosen.append(branch)
    return chosen


class _WatchedBranches(BranchedState):
    """Branches whose queries are shown to `watch` before they attend."""

    def __init__(self, watch: Callable[[int, Tensor, float], None], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._watch = watch

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, *, scale: float, **rule: Any) -> Tensor:
        """See `BranchedState`."""
        self._watch(layer, query, scale)
        return super().attend(layer, query, keys, values, scale=scale, **rule)


def most_hurt(errors: Sequence[float], count: int) -> list[int]:
    """The `count` layers of the largest errors, ascending."""
    order = torch.tensor(errors).argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())
