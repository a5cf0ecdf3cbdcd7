"""How a network's own layers multiply inside of a forward: in float32 over weights in 16 bits, or each sequence apart.

Both are context managers around a forward; the weights stay as they lie. Knows no model and no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cag.forward.weights import CompiledLinear, HeadProducts, PackedLinear, TransposedLinear

_PIECE_WEIGHTS = 1 << 22  # widened at once
_EMBEDS = frozenset({functional.embedding, torch.embedding})
_TAKES_ONE_TYPE = frozenset(
    {
        functional.group_norm,
        functional.layer_norm,
        functional.rms_norm,
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.conv1d,
        torch.einsum,
        torch.matmul,
        torch.mm,
        Tensor.__matmul__,
        Tensor.matmul,
    }
)
"""Of the functions that refuse tensors of several types, those that networks give rows and weights."""


class Float32Products(TorchFunctionMode):
    """A context manager: inside of it, a network over 16-bit weights computes in float32.

    Rows of embeddings come out in float32, and stay so: weights that they meet are widened. That of a linear layer is a
    piece at a time, so memory holds no second copy of it; nothing of the network is changed.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See torch."""
        named = kwargs or {}
        if func is functional.linear:
            return _widened_linear(*args, **named)
        if func in _TAKES_ONE_TYPE:
            args, named = _of_one_type(args, named)
        result = func(*args, **named)
        return result.float() if func in _EMBEDS else result


class SequencesApart:
    """Lets the linear layers of a network multiply the rows of each sequence by themselves, as if it were alone.

    A library's product of many rows rounds otherwise than the same rows' products one by one, so that what a sequence
    is answered would depend on who else is there. Where few rows are multiplied by compiled code they stay together:
    each has the same bits there in any company. Calling it gives a context manager; without a network it does nothing.
    Layers that do more than to multiply are left alone, and so are rows that are not the sequences' own (those that go
    to one expert). One thread at a time.
    """

    def __init__(self, network: nn.Module | None) -> None:
        self._counts: Sequence[list[int]] = ()
        for module in network.modules() if network is not None else ():
            if type(module) in (nn.Linear, TransposedLinear):
                module.forward = partial(self._forward, module.forward)
            elif isinstance(module, CompiledLinear | PackedLinear):
                module.forward = partial(self._few_together, module, module.forward)  # type: ignore[method-assign]
            elif isinstance(module, HeadProducts):
                module.forward = partial(self._side_by_side, module.forward)  # type: ignore[method-assign]

    @contextmanager
    def __call__(self, counts: Sequence[int], wanted: Sequence[int]) -> Iterator[None]:
        """Around a forward of `counts[i]` rows of sequence `i`, side by side, with logits of `wanted[i]` of them."""
        several = len(counts) > 1
        self._counts = (list(counts), [count for count in wanted if count]) if several else ()
        try:
            yield
        finally:
            self._counts = ()

    def _few_together(
        self, module: CompiledLinear | PackedLinear, forward: Callable[[Tensor], Tensor], block: Tensor
    ) -> Tensor:
        return forward(block) if module.keeps_rows_apart(block) else self._forward(forward, block)

    def _forward(self, forward: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        if self._counts and block.ndim > 2 and len(block) == len(self._counts[0]):  # each a row of the forward
            return torch.cat([forward(part) for part in torch.split_with_sizes(block, [1] * len(block))])
        return self._side_by_side(forward, block)

    def _side_by_side(self, forward: Callable[[Tensor], Tensor], block: Tensor) -> Tensor:
        counts = next((counts for counts in self._counts if sum(counts) == block.shape[-2]), None)
        if counts is None:
            return forward(block)
        return torch.cat([forward(part) for part in torch.split_with_sizes(block, counts, dim=-2)], dim=-2)


def _widened_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear`, whose names these are, in float32."""
    rows = max(1, _PIECE_WEIGHTS // weight.shape[1])
    wide = input.float()
    product = wide.new_empty(*wide.shape[:-1], weight.shape[0])
    for first in range(0, weight.shape[0], rows):
        product[..., first : first + rows] = wide @ weight[first : first + rows].float().t()
    return product if bias is None else product.add_(bias)


def _of_one_type(args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with all tensors in float32, if one of them is; else as they are."""
    if not any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in (*args, *named.values())):
        return args, named
    return tuple(map(_widened, args)), {name: _widened(value) for name, value in named.items()}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
