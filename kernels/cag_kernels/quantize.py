"""Numbers to codes and back: keys a channel over groups of tokens, values a token over groups of channels.

`x ~ code * scale + offset` with bfloat16 scales and offsets; codes are computed against the rounded pair, and scales
are rounded up, so that codes stay in their range. The arithmetic is fixed to the bit: torch, the Triton kernels and
the store's codecs of the same bits give the same (docs/format.md 5.2 and 5.3).
Source: keys a channel, values a token as in KIVI (arXiv:2402.02750); first tokens exact as in KVQuant
(arXiv:2401.18079).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cag_kernels.device import triton_runs_on, triton_serves
from cag_kernels.prefixes import FLOATS, QuantizedPrefix, check_prefix, code_bits

LARGEST_HALF = 65504.0
MAX_GROUP_TOKENS = 256  # of a tile on the device


class Coded(NamedTuple):
    """Codes of `[num_kv_heads, num_tokens, head_dim]` numbers as `prefixes.QuantizedPrefix` has them.

    scales, offsets: bfloat16 `[num_kv_heads, num_token_groups, num_channel_groups]`.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor


def quantize_prefix(
    keys: Tensor,
    values: Tensor,
    *,
    key_bits: int = 8,
    value_bits: int = 8,
    group_tokens: int = 64,
    group_channels: int = 64,
    num_exact: int = 4,
) -> QuantizedPrefix:
    """Quantize keys over `group_tokens` tokens, values over `group_channels` channels; keep the first tokens exact.

    Args:
        keys, values: `[num_kv_heads, num_tokens, head_dim]`, finite; keys after RoPE.
        key_bits, value_bits: 8 or 4.
        group_tokens: a multiple of 16.
        group_channels: more than head_dim means head_dim.
        num_exact: how many first tokens; they take no part in scales and their codes are 0.

    Raises:
        ValueError: shapes or sizes that do not fit.
    """
    num_exact, group_channels = min(num_exact, keys.shape[1]), min(group_channels, keys.shape[2])
    coded_keys = quantize(keys, bits=key_bits, group_tokens=group_tokens, group_channels=1, num_exact=num_exact)
    coded_values = quantize(values, bits=value_bits, group_tokens=1, group_channels=group_channels, num_exact=num_exact)
    exact_keys, exact_values = (side[:, :num_exact].contiguous() for side in (keys, values))
    prefix = QuantizedPrefix(*coded_keys, *coded_values, exact_keys, exact_values, group_tokens, group_channels)
    check_prefix(prefix, keys.shape[2])
    return prefix


def dequantize_prefix(prefix: QuantizedPrefix, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values `[num_kv_heads, num_tokens, head_dim]` in `dtype`, new memory."""
    keys = dequantize(Coded(*prefix[:3]), group_tokens=prefix.group_tokens, group_channels=1, dtype=dtype)
    values = dequantize(Coded(*prefix[3:6]), group_tokens=1, group_channels=prefix.group_channels, dtype=dtype)
    num_exact = prefix.exact_keys.shape[1]
    keys[:, :num_exact], values[:, :num_exact] = prefix.exact_keys.to(dtype), prefix.exact_values.to(dtype)
    return keys, values


def quantize(numbers: Tensor, *, bits: int, group_tokens: int, group_channels: int, num_exact: int = 0) -> Coded:
    """Codes of numbers; see `quantize_reference`.

    Raises:
        ValueError: shapes or sizes that do not fit.
    """
    sizes_fit = bits in (4, 8) and min(group_tokens, group_channels) == 1 and 0 <= num_exact <= numbers.shape[1]
    if numbers.ndim != 3 or numbers.dtype not in FLOATS or numbers.shape[2] % 2 or not sizes_fit:
        raise ValueError(
            f"cannot quantize {numbers.dtype} {tuple(numbers.shape)} to {bits} bits in groups of {group_tokens} tokens "
            f"and {group_channels} channels behind {num_exact} exact tokens"
        )
    kwargs = {"bits": bits, "group_tokens": group_tokens, "group_channels": group_channels, "num_exact": num_exact}
    if not triton_serves(numbers) or group_tokens > MAX_GROUP_TOKENS:
        return quantize_reference(numbers, **kwargs)
    from cag_kernels.triton.quantize import quantize_on_device

    return Coded(*quantize_on_device(numbers, **kwargs))


def quantize_reference(
    numbers: Tensor, *, bits: int, group_tokens: int, group_channels: int, num_exact: int = 0
) -> Coded:
    """Codes of groups of `group_tokens` by `group_channels` numbers, all in float32.

    8 bits: `offset = (high + low) / 2`, `scale = max(high - offset, offset - low) / 127`; 4 bits: `offset = low`,
    `scale = max(high - offset, 0) / 15`; offsets to nearest, scales upwards.
    `code = round((x - offset) / scale)`, to even, not beyond the range. A group without numbers has scale and offset 0.

    Args:
        numbers: `[num_kv_heads, num_tokens, head_dim]`, finite, head_dim even.
        bits: 8 (codes -127 to 127) or 4 (0 to 15).
        group_tokens, group_channels: one of them is 1.
        num_exact: first tokens that take no part; their codes are 0.
    """
    is_coded = torch.arange(numbers.shape[1], device=numbers.device)[:, None] >= num_exact
    wide = numbers.float()
    high = _by_group(wide.masked_fill(~is_coded, -torch.inf), group_tokens, group_channels, -torch.inf).amax((2, 4))
    low = _by_group(wide.masked_fill(~is_coded, torch.inf), group_tokens, group_channels, torch.inf).amin((2, 4))
    high, low = high.masked_fill(high == -torch.inf, 0.0), low.masked_fill(low == torch.inf, 0.0)
    if bits == 8:
        offsets = narrowed(high * 0.5 + low * 0.5, 0x8000)
        reach = torch.maximum(high - offsets.float(), offsets.float() - low) / 127.0
    else:
        offsets = narrowed(low, 0x8000)
        reach = (high - offsets.float()).clamp_min(0.0) / 15.0
    scales = narrowed(reach, 0xFFFF)
    scale, offset = (spread(part.float(), wide, group_tokens, group_channels) for part in (scales, offsets))
    codes = ((wide - offset) / torch.where(scale > 0, scale, 1.0)).round()
    codes = (codes.clamp(-127, 127) if bits == 8 else codes.clamp(0, 15)) * is_coded
    return Coded(codes.to(torch.int8) if bits == 8 else packed(codes), scales, offsets)


def dequantize(coded: Coded, *, group_tokens: int, group_channels: int, dtype: torch.dtype) -> Tensor:
    """Numbers of codes; see `dequantize_reference`."""
    kwargs: dict[str, Any] = {"group_tokens": group_tokens, "group_channels": group_channels, "dtype": dtype}
    if not triton_runs_on(coded.codes.device) or dtype not in FLOATS:
        return dequantize_reference(coded, **kwargs)
    from cag_kernels.triton.quantize import dequantize_on_device

    return dequantize_on_device(*coded, **kwargs)


def dequantize_reference(coded: Coded, *, group_tokens: int, group_channels: int, dtype: torch.dtype) -> Tensor:
    """`code * scale + offset`, one product and one sum, each rounded to float32 (float64 if that is wanted).

    To bfloat16 halves are rounded away from zero; to float16 what is too large becomes the largest number.
    """
    codes = unpacked(coded.codes).to(torch.promote_types(dtype, torch.float32))
    scale, offset = (spread(part.to(codes.dtype), codes, group_tokens, group_channels) for part in coded[1:])
    return narrowed_to(codes * scale + offset, dtype)


def unpacked(codes: Tensor) -> Tensor:
    """Codes, one an element: 8-bit ones as they are, 4-bit ones out of their bytes."""
    return codes if code_bits(codes) == 8 else torch.cat([codes & 15, codes >> 4], dim=-1)


def packed(codes: Tensor) -> Tensor:
    """4-bit codes `[..., n]` in bytes `[..., n / 2]`: code `i` in the low nibble, `i + n / 2` in the high one."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def narrowed(numbers: Tensor, addend: int) -> Tensor:
    """float32 to bfloat16: `addend` to the bit patterns, of which the upper 16 stay. 0x8000 rounds to nearest."""
    return (numbers.view(torch.int32) + addend >> 16).to(torch.int16).view(torch.bfloat16)


def narrowed_to(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to a storage dtype as the store rounds: bfloat16 halves away from zero, float16 without infinities."""
    if dtype == torch.bfloat16:
        return narrowed(numbers, 0x8000)
    return numbers.clamp(-LARGEST_HALF, LARGEST_HALF).half() if dtype == torch.float16 else numbers


def spread(parts: Tensor, numbers: Tensor, group_tokens: int, group_channels: int) -> Tensor:
    """For each number that of its group: `[num_kv_heads, token groups, channel groups]` to the numbers' shape."""
    tokens, channels = (torch.arange(size, device=parts.device) for size in numbers.shape[1:])
    return parts[:, tokens // group_tokens][:, :, channels // group_channels]


def _by_group(numbers: Tensor, group_tokens: int, group_channels: int, filler: float) -> Tensor:
    """`[num_kv_heads, token groups, group_tokens, channel groups, group_channels]`, the last groups filled up."""
    num_heads, num_tokens, head_dim = numbers.shape
    missing = (0, -head_dim % group_channels, 0, -num_tokens % group_tokens)
    whole = torch.nn.functional.pad(numbers, missing, value=filler)
    token_groups, channel_groups = whole.shape[1] // group_tokens, whole.shape[2] // group_channels
    return whole.reshape(num_heads, token_groups, group_tokens, channel_groups, group_channels)
