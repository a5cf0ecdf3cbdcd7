"""Random operands, plain torch in the operands' own precision, and the bound that both give."""

import torch

from cag_kernels import DensePrefix, QuantizedPrefix, dequantize_prefix, quantize_prefix
from cag_kernels.prefix_reference import prefix_attention_reference
from cag_kernels.reference import visibility
from cag_kernels.triton.launch import attend

MANY_PROCESSORS = 24  # so that even short prefixes are split


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def moved(operand, device):
    """A tensor or a tuple of them on a device."""
    if isinstance(operand, torch.Tensor):
        return operand.to(device)
    return operand._replace(
        **{name: part.to(device) for name, part in operand._asdict().items() if isinstance(part, torch.Tensor)}
    )


def make_prefix(kind, num_kv_heads, num_tokens, head_dim, dtype):
    """A prefix of one of the kinds: plain ones are slices of larger buffers full of NaN."""
    if kind == "plain":
        buffers = torch.full((2, num_kv_heads, num_tokens + 9, head_dim), torch.nan, dtype=dtype)
        inside = buffers[:, :, 4 : 4 + num_tokens]
        inside.copy_(normal(2, num_kv_heads, num_tokens, head_dim))
        return DensePrefix(*inside)
    keys, values = normal(2, num_kv_heads, num_tokens, head_dim, dtype=torch.bfloat16)
    keys = keys + 3 * normal(head_dim, dtype=torch.bfloat16)  # channels have means, as those of models have
    return quantize_prefix(keys, values, **kind)


def plain_attention(query, keys, values, visible, *, scale, softcap):
    """Attention as anybody writes it, every tensor in the query's dtype but the softmax; the log-sum-exp too."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (side.to(query.dtype).repeat_interleave(group, dim=0) for side in (keys, values))
    scores = (query @ keys.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num().to(query.dtype)
    return weights @ values, torch.logsumexp(scores, dim=-1)


def plain_prefix_attention(query, prefix, *, scale, positions=None, window=None, softcap=None):
    """The same over a prefix, dequantized to the query's dtype first."""
    keys, values = dequantize_prefix(prefix, query.dtype) if isinstance(prefix, QuantizedPrefix) else prefix
    visible = torch.ones(query.shape[1], keys.shape[1], dtype=torch.bool)
    if window is not None:
        visible = positions[:, None] - torch.arange(keys.shape[1])[None, :] < window
    return plain_attention(query, keys, values, visible, scale=scale, softcap=softcap)


def plain_tail_attention(query, keys, values, *, scale, window=None, softcap=None):
    """The same over one session's tail."""
    num_queries, num_keys = query.shape[1], keys.shape[1]
    visible = visibility(num_queries, num_keys, num_keys - num_queries, window, query.device)
    return plain_attention(query, keys, values, visible, scale=scale, softcap=softcap)


def assert_close(found, expected, plain):
    """Error at most twice that of plain torch in the same precision, plus a few roundings of float32."""
    for got, want, ordinary in zip(found, expected, plain, strict=True):
        got, ordinary = got.cpu().double(), ordinary.double()
        assert not torch.isnan(got).any()
        seen = torch.isfinite(want)
        assert torch.equal(seen, torch.isfinite(got))
        if seen.any():
            rounding = 4 * torch.finfo(torch.float32).eps * want[seen].abs().max().clamp_min(1.0)
            assert (got - want)[seen].abs().max() <= 2 * (ordinary - want)[seen].abs().max() + rounding


def check_prefix_attention(device, shape, kind, dtype, window=None, softcap=None, num_exact=3):
    """The launches of one prefix against the float64 oracle.

    `shape` is query heads, key/value heads, head_dim, queries, tokens.
    """
    num_q_heads, num_kv_heads, head_dim, num_queries, num_tokens = shape
    kind = kind if kind == "plain" else kind | {"num_exact": num_exact}
    prefix = make_prefix(kind, num_kv_heads, num_tokens, head_dim, dtype)
    query = normal(num_queries, num_q_heads, head_dim, dtype=dtype).transpose(0, 1)
    positions = None
    if window is not None:
        positions = num_tokens + torch.arange(num_queries, dtype=torch.int32) * 41
    kwargs = {"scale": head_dim**-0.5, "positions": positions, "window": window, "softcap": softcap}
    expected = prefix_attention_reference(query.double(), prefix, **kwargs)
    plain = plain_prefix_attention(query, prefix, **kwargs)
    kwargs["positions"] = None if positions is None else positions.to(device)
    found = attend(query.to(device), moved(prefix, device), None, MANY_PROCESSORS, **kwargs)
    assert all(part.dtype == torch.float32 for part in found)
    assert_close(found, expected, plain)
