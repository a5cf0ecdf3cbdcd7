"""Reading tokens into a sequence, block by block, so that memory beyond keys and values stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cag.forward.state import SequenceState
from cag.model import LanguageModel

BLOCK_TOKENS = 512  # also the tokens of a stored chunk, so that a resumed build computes the very same blocks
PROMPT_BLOCK_TOKENS = 1024  # of what is not stored: fewer passes over the weights, memory still bounded


def prefill(
    model: LanguageModel,
    state: SequenceState,
    token_ids: Sequence[int],
    *,
    block_tokens: int = BLOCK_TOKENS,
    on_block: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run `token_ids` behind what the state holds.

    Args:
        model: the model.
        state: grows by `len(token_ids)` tokens.
        token_ids: at least one.
        block_tokens: tokens of one forward at most.
        on_block: called with `(start, end)` in `token_ids` after each block.

    Returns:
        Logits of the last token, `[vocab_size]` float32.
    """
    assert len(token_ids) > 0, "a prompt has at least one token"
    state.begin(len(token_ids))
    for start in range(0, len(token_ids), block_tokens):
        block = list(token_ids[start : start + block_tokens])
        logits = model.forward(block, state)
        if on_block is not None:
            on_block(start, start + len(block))
    return logits[-1]
