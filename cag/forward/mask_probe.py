"""Whether a network masks what the rules of its layers say, asked at positions all over its window.

transformers makes masks from a function of two positions, whichever attention a network has. Under a name of its own
nothing attends; the mask function is asked about far positions in the place of the few tokens that there are. What a
network masks in a way of its own is compared for those few. Knows a network's forward as transformers have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from cag.errors import UnsupportedModel
from cag.forward.attention_hook import ATTENTION_NAME

_NAME = "cag_masks"
_NUM_TOKENS = 3  # of a forward under it
_MOST = 1 << 20  # positions of a window that are asked about


@torch.inference_mode()
def check_masks(network: Any, token: int) -> None:
    """Run a few times `token` and compare the masks that each layer is given.

    Raises:
        UnsupportedModel: a token sees other tokens than those before it, the last `window` of them where there is one.
    """
    ids = torch.full((1, _NUM_TOKENS), token, device=network.device)
    network.set_attn_implementation(_NAME)
    try:
        network(input_ids=ids, use_cache=False, logits_to_keep=ids.new_zeros(1), cag_state=_Compared())
    finally:
        network.set_attn_implementation(ATTENTION_NAME)


class _Compared:
    """Masks that layers were given, which have it from one another, and whether each was the one of a window."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int | None], tuple[Tensor, bool]] = {}

    def is_same(self, mask: Tensor, window: int | None) -> bool:
        """Whether a mask hides what comes later, and what is not in the window, and nothing else."""
        key = id(mask), window
        if key not in self._found:
            self._found[key] = mask, _is_same(mask, window)
        return self._found[key][1]


def _compare_mask(
    module: Any,
    query: Tensor,
    _key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    sliding_window: int | None = None,
    cag_state: _Compared | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: compares the mask, and gives zeros."""
    compared = cag_state or _Compared()
    hides_later = getattr(module, "is_causal", True)
    if not (hides_later if attention_mask is None else compared.is_same(attention_mask, sliding_window)):
        window = "" if sliding_window is None else f", the last {sliding_window}"
        raise UnsupportedModel(
            f"a layer of type {type(module).__name__} sees other tokens than those before each token{window}."
        )
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _is_same(mask: Tensor, window: int | None) -> bool:
    num_tokens = mask.shape[-1]
    is_far = num_tokens != _NUM_TOKENS
    rows = (_shown(num_tokens) if is_far else torch.arange(num_tokens))[:, None]
    columns = torch.arange(num_tokens)
    expected = (columns <= rows) & (columns > rows - (window or num_tokens))
    found = mask if mask.dtype == torch.bool else mask == 0
    return found.shape[-2:] == expected.shape and bool((found.cpu() == expected).all())


def _shown(num_tokens: int) -> Tensor:
    """Of which queries a far mask shows what they see, int64."""
    return torch.tensor([0, num_tokens // 3, num_tokens - 1])


def _far_mask(*_: Any, mask_function: Callable[..., Tensor], config: Any, device: Any = "cpu", **__: Any) -> Tensor:
    """transformers' mask interface: bool `[1, 1, 3, num_tokens]`, which tokens of the window some of them see; of the
    tokens that are there alone where the function looks up something of them."""
    num_tokens = min(config.get_text_config().max_position_embeddings, _MOST)
    for rows, columns in ((_shown(num_tokens), torch.arange(num_tokens)), (torch.arange(_NUM_TOKENS),) * 2):
        first = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        try:
            found = mask_function(
                first, first, rows.to(device)[None, None, :, None], columns.to(device)[None, None, None]
            )
        except IndexError:
            continue
        return found.expand(1, 1, len(rows), len(columns))
    raise UnsupportedModel("transformers masks tokens of the model in a way that cannot be asked about.")


AttentionInterface.register(_NAME, _compare_mask)
AttentionMaskInterface.register(_NAME, _far_mask)
