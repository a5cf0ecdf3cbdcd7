"""Layers whose keys and values are made from one vector a token, their latent: attended to as latents, never expanded.

Such a layer (multi-head latent attention) projects a hidden state to a short vector `c` and, for head `h`, hands its
attention the keys `(K_h c | rotated)`, where the rotated part is the same for all heads, and the values `V_h c`. Scores
are `q . K_h c = (K_h' q) . c`, and what is found is `V_h` of the weighted sum of latents. So the query is projected
once, all heads attend to one key/value head of `(rotated | c)`, whose values are its keys, and what comes out is
projected once. Keys, values, caches and kernels see nothing but a layer of one wide head with one side.

Found by structure and proven to the bit when a model is loaded; knows modules of torch, and no model by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cag.forward.weights import HeadProducts, PackedLinear

LATENT = "cag_latent"
"""The name under which the attention module of a proven layer has its `LatentLayer`."""

_NAME = "cag_latents"
_NUM_TOKENS = 5  # of the forward that proves: different ones, at different positions


class LatentLayer(nn.Module):
    """What turns the queries of one layer into queries to latents, and back.

    A latent is `[num_tokens, rotated + rank]`: the rotated part first, where rotations of other models stand. Weights
    are kept in float32, and so are queries to latents and what these give: rounding them would be one rounding more
    than plain attention has.
    """

    def __init__(self, projection: Any, num_heads: int, value_dim: int) -> None:
        """`projection`: the linear layer that makes of `c` for each head its keys without the rotated part, and behind
        them its `value_dim` values."""
        super().__init__()
        self._caught: Tensor | None = None
        with torch.inference_mode(False):  # calibration asks for gradients through it
            whole: Tensor = projection.weight.detach().float()
        by_head = whole.view(num_heads, -1, whole.shape[1])
        self.plain_dim, self.rank = by_head.shape[1] - value_dim, whole.shape[1]
        self._keys = HeadProducts(by_head[:, : self.plain_dim])
        self._values = HeadProducts(by_head[:, self.plain_dim :].transpose(1, 2))
        projection.register_forward_pre_hook(self._catch)

    def asked(self, query: Tensor) -> Tensor:
        """Queries `[num_heads, num_rows, plain + rotated]` as they are asked of latents, `[num_heads, num_rows, rotated
        + rank]` float32."""
        query = query.float()
        return torch.cat([query[..., self.plain_dim :], self._keys(query[..., : self.plain_dim])], dim=-1)

    def kept(self, keys: Tensor) -> Tensor:
        """The latents of new tokens, `[1, num_tokens, rotated + rank]`, of whose expanded `keys` `[num_heads,
        num_tokens, plain + rotated]` the rotated part is needed; the rest was seen on its way."""
        assert self._caught is not None, "the projection has not run in this forward"
        caught, self._caught = self._caught, None
        return torch.cat([keys[:1, :, self.plain_dim :], caught.reshape(1, keys.shape[1], -1)], dim=-1)

    def found(self, out: Tensor) -> Tensor:
        """What weighted latents `[num_heads, num_rows, rotated + rank]` are as values, `[num_heads, num_rows,
        value_dim]`."""
        found: Tensor = self._values(out[..., -self.rank :])
        return found

    def expanded(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that `[1, num_tokens, rotated + rank]` stand for, `[num_heads, num_tokens, ...]`, in
        their dtype."""
        wide = latents.float()
        keys = wide[..., -self.rank :] @ self._keys.weight.transpose(1, 2)
        shared = wide[..., : -self.rank].expand(len(keys), -1, -1)
        return torch.cat([keys, shared], dim=-1).to(latents.dtype), self.found(wide).to(latents.dtype)

    def _catch(self, _module: Any, given: tuple[Tensor, ...]) -> None:
        self._caught = given[0]


def latent_of(module: Any) -> LatentLayer | None:
    """What was proven of an attention module, if anything was."""
    return getattr(module, LATENT, None)


def latent_layers(network: Any) -> list[LatentLayer]:
    """Those of a network, in the order of its layers."""
    found = [(module.layer_idx, latent) for module in network.modules() if (latent := latent_of(module)) is not None]
    return [latent for _, latent in sorted(found, key=lambda pair: pair[0])]


@torch.inference_mode()
def find_latent_layers(network: Any, attention_name: str) -> bool:
    """Let the layers of a network attend to latents, if all that attend are proven to be made so and it saves memory.

    `attention_name` is the one that the network has, and keeps. What is not proven attends to its own keys and values,
    which is right as well.
    """
    proof = _Proof()
    ids = torch.arange(1, _NUM_TOKENS + 1, device=network.device)[None] % network.config.get_text_config().vocab_size
    network.set_attn_implementation(_NAME)
    try:
        with proof.watching(network):
            network(input_ids=ids, use_cache=False, logits_to_keep=ids.new_zeros(1), cag_state=proof)
    finally:
        network.set_attn_implementation(attention_name)
    if not proof.found or not all(proof.found.values()):
        return False
    for module, found in proof.found.items():
        if found is not None:
            setattr(module, LATENT, LatentLayer(*found))
    return True


_Found = tuple[nn.Module, int, int]
"""Projection, number of heads, size of a value."""


class _Proof:
    """Notes what linear layers are given and give, and compares it with what attention is handed.

    Attributes:
        found: of each attention module what makes its keys and values; None where that is not known.
    """

    def __init__(self) -> None:
        self.found: dict[nn.Module, _Found | None] = {}
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def watching(self, network: Any) -> Iterator[None]:
        """Inside, linear layers of attention modules are seen."""
        parents = [module for module in network.modules() if hasattr(module, "layer_idx")]
        linear = {child for parent in parents for child in parent.children() if _is_linear(child)}
        hooks = [child.register_forward_hook(self._see) for child in linear]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def compare(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        """`[1, heads, tokens, head_dim]` each, as attention is handed them."""
        found = None
        if query.shape == key.shape and key.shape[1] == value.shape[1]:
            candidates = (child for child in module.children() if child in self._seen)
            found = next((child for child in candidates if _makes(*self._seen[child], key[0], value[0])), None)
        self.found[module] = None if found is None else (found, value.shape[1], value.shape[3])

    def _see(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._seen[module] = given[0], output


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | PackedLinear) and module.bias is None


def _makes(given: Tensor, output: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether keys and values `[num_heads, num_tokens, ...]` are, to the bit, what a linear layer made of `given`, but
    for a part of the keys that all heads share; and whether latents are smaller than they are."""
    num_heads, num_tokens, value_dim = value.shape
    if output.numel() % (num_heads * num_tokens) or given.numel() % num_tokens:
        return False
    made = output.reshape(num_tokens, num_heads, -1).transpose(0, 1)
    plain_dim = made.shape[2] - value_dim
    if not 0 < plain_dim <= key.shape[2]:
        return False
    rotated = key[:, :, plain_dim:]
    width = given.numel() // num_tokens + rotated.shape[2]
    return (
        torch.equal(key[:, :, :plain_dim], made[:, :, :plain_dim])
        and torch.equal(value, made[:, :, plain_dim:])
        and torch.equal(rotated, rotated[:1].expand_as(rotated))
        and width < num_heads * (key.shape[2] + value_dim)
    )


def _prove(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None = None,
    *,
    cag_state: _Proof | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: compares, and lets each token find itself."""
    if cag_state is not None:
        cag_state.compare(module, query, key, value)
    groups = query.shape[1] // value.shape[1]
    return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _prove)
