"""The public operations on prefixes: dispatch, checks, what serves them on a CPU, and that Triton stays away there."""

import subprocess
import sys

import pytest
import torch

from cag_kernels import (
    DensePrefix,
    PagedTails,
    cascade_attention,
    choose_prefix_path,
    dequantize,
    dequantize_prefix,
    move_keys,
    paged_attention,
    prefix_attention,
    quantize,
    quantize_prefix,
    segment_attention_reference,
)
from cag_kernels.cpu.attention.segments import cpu_attention_serves
from cag_store import codec_from_config
from cag_store.errors import UnknownCodec


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def make_tails(**changes):
    """Two sessions with tails of 3 and 5 tokens, asking 1 and 2 queries, in pages of 4 tokens."""
    keys, values = normal(2, 4, 2, 4, 16)
    integers = {"pages": [[2, 0], [1, 3]], "lengths": [3, 5], "query_starts": [0, 1, 3]}
    parts = {name: torch.tensor(value, dtype=torch.int32) for name, value in integers.items()}
    return PagedTails(**{"keys": keys, "values": values, **parts, "max_queries": 2, **changes})


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_cascade_is_attention_over_everything(bits):
    prefix, tails, query = DensePrefix(*normal(2, 2, 40, 16)), make_tails(), normal(4, 3, 16)
    if bits:
        prefix = quantize_prefix(*prefix, key_bits=bits, value_bits=bits, group_channels=8, num_exact=2)
    found = cascade_attention(query, prefix, tails, scale=0.25)
    shared = dequantize_prefix(prefix, torch.float32) if bits else prefix
    for own, pages, length in ((slice(0, 1), [2], 3), (slice(1, 3), [1, 3], 5)):
        tail = (side[pages].transpose(0, 1).reshape(2, -1, 16)[:, :length] for side in tails[:2])
        keys, values = (torch.cat(sides, dim=1) for sides in zip(shared, tail, strict=True))
        offset = 40 + length - (own.stop - own.start)
        expected, _ = segment_attention_reference(query[:, own], keys, values, scale=0.25, offset=offset)
        torch.testing.assert_close(found[:, own], expected, atol=1e-6, rtol=1e-5)


def test_a_plain_prefix_is_a_segment():
    prefix, query = DensePrefix(*normal(2, 3, 70, 32, dtype=torch.bfloat16)), normal(9, 4, 32)
    assert choose_prefix_path(query, prefix, window=None, softcap=None) == "segment"
    windowed = "compiled" if cpu_attention_serves(query, prefix.keys) else "torch"
    assert choose_prefix_path(query, prefix, window=9, softcap=None) == windowed
    assert choose_prefix_path(query.double(), prefix, window=9, softcap=None) == "torch"
    found = prefix_attention(query, prefix, scale=0.2)
    expected = segment_attention_reference(query, *prefix, scale=0.2, offset=70)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["key_codes", "value_codes"])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_codes_whose_tokens_are_not_side_by_side(side, num_queries):
    prefix, query = quantize_prefix(*normal(2, 2, 200, 64)), normal(8, num_queries, 64)
    by_token = getattr(prefix, side).transpose(0, 1).contiguous().transpose(0, 1)
    found = prefix_attention(query, prefix._replace(**{side: by_token}), scale=0.125)
    for got, want in zip(found, prefix_attention(query, prefix, scale=0.125), strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_a_window_goes_by_the_positions_of_the_queries():
    prefix, query = DensePrefix(*normal(2, 1, 30, 16)), normal(2, 2, 16)
    positions = torch.tensor([30, 45], dtype=torch.int32)
    out, lse = prefix_attention(query, prefix, scale=0.2, window=12, positions=positions)
    expected, expected_lse = segment_attention_reference(query[:, :1], *prefix, scale=0.2, offset=30, window=12)
    torch.testing.assert_close(out[:, :1], expected)
    torch.testing.assert_close(lse[:, :1], expected_lse)
    assert torch.isneginf(lse[:, 1]).all()


@pytest.mark.parametrize(("codec", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_codes_are_those_of_the_store(codec, bits, side):
    """To the bit: the numbers that codec and kernels decode to, and the bytes of the codes in the codec's segment."""
    try:
        stored = codec_from_config({"id": codec} | ({"recent_tokens": 0} if codec == "int4" else {}))
    except UnknownCodec:
        pytest.skip(f"no codec {codec}")
    numbers = normal(2, 131, 32, dtype=torch.bfloat16) + 3 * normal(32, dtype=torch.bfloat16)
    encoded = stored.encode(numbers.view(torch.uint16).numpy(), "bfloat16", side)
    decoded = torch.empty(numbers.shape, dtype=torch.bfloat16)
    stored.decode_into(encoded, decoded.view(torch.uint16).numpy())
    sizes = {"group_tokens": 64, "group_channels": 1} if side == "keys" else {"group_tokens": 1, "group_channels": 32}
    coded = quantize(numbers, bits=bits, num_exact=4, **sizes)
    found = dequantize(coded, dtype=torch.bfloat16, **sizes)
    assert torch.equal(found[:, 4:], decoded[:, 4:])
    parts = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in (coded.scales, coded.offsets)]
    assert b"".join(parts) in encoded
    if stored.config()["packer"] is None:
        assert encoded.endswith(coded.codes.numpy().tobytes())


def test_moved_keys_are_those_of_the_new_place():
    keys, frequencies = normal(1, 5, 8).double(), torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    start, end = torch.arange(5), torch.tensor([90, 3, 4, 4, 4])
    zero = torch.zeros(5, dtype=torch.int64)
    for pairing in ("halves", "adjacent"):
        at_start = move_keys(keys, start, frequencies, pairing=pairing)
        moved = move_keys(at_start, end - start, frequencies, pairing=pairing)
        torch.testing.assert_close(moved, move_keys(keys, end, frequencies, pairing=pairing))
        assert torch.equal(move_keys(keys, zero, frequencies, pairing=pairing), keys)
        assert torch.equal(moved[..., 6:], keys[..., 6:])
    first = move_keys(keys, end, frequencies)[0, 0]
    torch.testing.assert_close(
        first[0], keys[0, 0, 0] * torch.cos(end[0]) - keys[0, 0, 3] * torch.sin(end[0]), check_dtype=False
    )


def test_what_does_not_fit_is_refused():
    query, prefix = normal(4, 3, 16), DensePrefix(*normal(2, 2, 40, 16))
    coded = quantize_prefix(*prefix)
    wrong = [
        (normal(3, 3, 16), prefix),
        (normal(4, 3, 8), prefix),
        (query, prefix._replace(values=prefix.values[:, :-1])),
        (query, prefix._replace(keys=prefix.keys.double())),
        (query, prefix._replace(keys=normal(2, 16, 40).transpose(1, 2))),
        (query, coded._replace(key_scales=coded.key_scales[:, :0])),
        (query, coded._replace(key_codes=coded.key_codes.view(torch.uint8))),
        (query, coded._replace(group_tokens=8)),
        (query, coded._replace(value_offsets=coded.value_offsets.float())),
        (query, coded._replace(group_channels=17)),
    ]
    for operands in wrong:
        with pytest.raises(ValueError, match="fit"):
            prefix_attention(*operands, scale=1.0)
    with pytest.raises(ValueError, match="positions"):
        prefix_attention(query, prefix, scale=1.0, window=3)
    for change in (
        {"lengths": torch.tensor([3], dtype=torch.int32)},
        {"pages": torch.zeros(2, 2, dtype=torch.int64)},
        {"max_queries": 0},
        {"values": normal(4, 2, 4, 8)},
    ):
        with pytest.raises(ValueError, match="fit"):
            paged_attention(query, make_tails(**change), scale=1.0)
        with pytest.raises(ValueError, match="fit"):
            cascade_attention(query, prefix, make_tails(**change), scale=1.0)
    for sizes in ({"key_bits": 5}, {"group_tokens": 24}, {"num_exact": -1}, {"group_channels": 0}):
        with pytest.raises(ValueError, match=r"quantize|fit"):
            quantize_prefix(*prefix, **sizes)
    for distances, frequencies, pairing in (
        (torch.zeros(40), torch.ones(8), "halves"),
        (torch.zeros(39, dtype=torch.int64), torch.ones(8), "halves"),
        (torch.zeros(40, dtype=torch.int64), torch.ones(9), "halves"),
        (torch.zeros(40, dtype=torch.int64), torch.ones(8), "thirds"),
    ):
        with pytest.raises(ValueError, match=r"fit|pairing"):
            move_keys(prefix.keys, distances, frequencies, pairing=pairing)


def test_a_cpu_never_loads_triton():
    code = (
        "import sys, torch\n"
        "from cag_kernels import *\n"
        "prefix = DensePrefix(*torch.ones(2, 1, 20, 16))\n"
        "prefix_attention(torch.ones(1, 1, 16), prefix, scale=1.0)\n"
        "prefix_attention(torch.ones(1, 1, 16), quantize_prefix(*prefix), scale=1.0)\n"
        "move_keys(prefix.keys, torch.arange(20), torch.ones(4))\n"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
