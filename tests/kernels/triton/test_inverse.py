"""Layers made of integer codes are the reference's, to the bit, and the store's own arithmetic."""

import numpy as np
import pytest
import torch

from cag_kernels.inverse import inverse_transform, inverse_transform_reference
from cag_kernels.rans import CodeBlocks
from cag_kernels.rotation import angles
from cag_kernels.triton.inverse import invert, operands
from cag_store.codecs.transform.product import finish_reference, product_reference
from oracle import normal


def inverted(codes, rows, scale, mean, tables, head_dim, dtype, pairing="halves", mean_of=None):
    """By the kernels, into memory with tokens before and behind."""
    num_tokens = codes.num_tokens if isinstance(codes, CodeBlocks) else len(codes)
    wide = torch.full((rows.shape[1] // head_dim, num_tokens + 5, head_dim), 7.0, dtype=dtype, device=rows.device)
    split = operands(codes, rows, tables, head_dim, pairing)
    found = invert(*split, scale, mean, mean_of, tables, wide[:, 3 : 3 + num_tokens])
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 3 + num_tokens :] == 7).all()
    return found


def make(num_tokens, num_components, num_channels):
    """Codes and rows over all 16 bits, so that sums wrap around; a scale that keeps values finite."""
    generator = torch.Generator().manual_seed(num_tokens)
    codes = torch.randint(-(1 << 15), 1 << 15, (num_tokens, num_components), generator=generator).short()
    rows = torch.randint(-(1 << 15), 1 << 15, (num_components, num_channels), generator=generator).short()
    codes[0, 0], rows[0, 0] = -(1 << 15), -(1 << 15)
    return codes, rows, normal(num_channels).abs() * 1e-8, normal(num_channels)


@pytest.mark.parametrize("pairing", ["halves", "adjacent"])
@pytest.mark.parametrize("num_pairs", [None, 48, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layers_are_the_references(device, pairing, num_pairs, dtype):
    codes, rows, scale, mean = make(39, 70, 2 * 96)
    tables = None if num_pairs is None else angles(torch.arange(39) * 31, 0.5 ** torch.arange(num_pairs))
    kwargs = {"head_dim": 96, "dtype": dtype, "pairing": pairing}
    expected = inverse_transform_reference(codes, rows, scale, mean, angles=tables, **kwargs)
    moved = None if tables is None else tuple(table.to(device) for table in tables)
    operands = [part.to(device) for part in (rows, scale, mean)]
    for given in (codes, codes.t().contiguous().t()):
        found = inverted(given.to(device), *operands, moved, 96, dtype, pairing)
        assert found.dtype == dtype
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("turned", [True, False])
def test_tiles_of_bytes_and_wide_tiles_are_added_up(device, turned):
    """Several tiles of tokens, components and channels; few codes that are no signed bytes, next to the largest."""
    generator = torch.Generator().manual_seed(8)
    codes = torch.randint(-128, 128, (270, 300), generator=generator).short()
    rows = torch.randint(-32767, 32768, (300, 4 * 40), generator=generator).short()
    for token, component, code in ((3, 299, 128), (130, 5, -129), (131, 140, 32767), (269, 128, -32768)):
        codes[token, component] = code
    scale, mean = normal(160).abs() * 1e-8, normal(160)
    tables = angles(torch.arange(270), 0.5 ** torch.arange(20)) if turned else None
    kwargs = {"head_dim": 40, "dtype": torch.float32}
    expected = inverse_transform_reference(codes, rows, scale, mean, angles=tables, **kwargs)
    moved = None if tables is None else tuple(table.to(device) for table in tables)
    operands = [part.to(device) for part in (codes.t().contiguous().t(), rows, scale, mean)]
    assert torch.equal(inverted(*operands, moved, 40, torch.float32).cpu(), expected)


def test_segments_have_means_of_their_own_and_codes_lie_as_they_were_decoded(device):
    """Tokens of three segments in blocks of 32, whose other places are never read."""
    codes, rows, scale, _ = make(150, 70, 2 * 48)
    starts, means = torch.tensor([0, 33, 34, 150], dtype=torch.int32), normal(3, 96)
    mean_of = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), starts.diff())
    places = torch.cat([torch.arange(33), torch.tensor([64]), torch.arange(96, 212)])
    blocks, tokens = torch.full((8 * 32, 70), 0x5555, dtype=torch.int16), torch.full((8 * 32,), -1, dtype=torch.int32)
    blocks[places], tokens[places] = codes, torch.arange(150, dtype=torch.int32)
    decoded = CodeBlocks(blocks.view(8, 32, 70).transpose(1, 2).contiguous(), tokens, 150)
    assert torch.equal(decoded.by_token(), codes)
    kwargs = {"head_dim": 48, "dtype": torch.bfloat16, "mean_of": mean_of}
    expected = inverse_transform_reference(codes, rows, scale, means, **kwargs)
    assert torch.equal(inverse_transform(decoded, rows, scale, means, **kwargs), expected)
    decoded = CodeBlocks(decoded.blocks.to(device), decoded.tokens.to(device), 150)
    operands = [part.to(device) for part in (rows, scale, means)]
    found = inverted(decoded, *operands, None, 48, torch.bfloat16, mean_of=mean_of.to(device))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("pairing", ["halves", "adjacent"])
def test_heads_of_128_channels_as_a_cache_has_them(device, pairing):
    """Blocks of the decoder over several tiles, wide codes in one of them, a mean a segment, keys and values."""
    generator, counts = torch.Generator().manual_seed(1), [124, 96, 33]
    codes = torch.randint(-9, 10, (sum(counts), 200), generator=generator).short()
    codes[:, :5] *= 40
    rows = torch.randint(-32767, 32768, (200, 3 * 128), generator=generator).short()
    scale, means = normal(384).abs() * 1e-7, normal(3, 384)
    mean_of = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(counts))
    places = torch.cat([torch.arange(124), 128 + torch.arange(96), 224 + torch.arange(33)])
    blocks, tokens = torch.full((9 * 32, 200), 0x5555, dtype=torch.int16), torch.full((9 * 32,), -1, dtype=torch.int32)
    blocks[places], tokens[places] = codes, torch.arange(len(codes), dtype=torch.int32)
    blocks = blocks.view(9, 32, 200).transpose(1, 2).contiguous()
    decoded = CodeBlocks(blocks.to(device), tokens.to(device), len(codes))
    operands = [part.to(device) for part in (rows, scale, means)]
    for tables in (angles(torch.arange(len(codes)) * 77, 0.7 ** torch.arange(64)), None):
        kwargs = {"head_dim": 128, "dtype": torch.bfloat16, "mean_of": mean_of, "pairing": pairing}
        expected = inverse_transform_reference(codes, rows, scale, means, angles=tables, **kwargs)
        moved = None if tables is None else tuple(table.to(device) for table in tables)
        found = inverted(decoded, *operands, moved, 128, torch.bfloat16, pairing, mean_of.to(device))
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("pairing", ["halves", "adjacent"])
def test_the_reference_is_the_stores(pairing):
    codes, rows, scale, mean = make(5, 40, 3 * 16)
    tables = angles(torch.arange(5), 0.5 ** torch.arange(6))
    channels = np.arange(12).reshape(2, 6).T if pairing == "halves" else np.arange(12).reshape(6, 2)
    out = torch.empty(3, 5, 16, dtype=torch.bfloat16)
    sums = product_reference(codes.numpy(), rows.numpy())
    arrays = [part.numpy() for part in (scale, mean, *tables)]
    finish_reference(sums, *arrays, channels, out.view(torch.uint16).numpy())
    kwargs = {"head_dim": 16, "dtype": torch.bfloat16, "angles": tables, "pairing": pairing}
    assert torch.equal(inverse_transform(codes, rows, scale, mean, **kwargs), out)


@pytest.mark.parametrize(
    "change", [{"head_dim": 15}, {"head_dim": 32}, {"dtype": torch.float64}, {"pairing": "thirds"}, {"angles": 9}]
)
def test_what_does_not_fit_is_refused(change):
    codes, rows, scale, mean = make(5, 40, 3 * 16)
    if "angles" in change:
        change = {"angles": angles(torch.arange(5), torch.ones(9))}
    with pytest.raises(ValueError, match="do not fit"):
        inverse_transform(codes, rows, scale, mean, **{"head_dim": 16, "dtype": torch.float32, **change})
    with pytest.raises(ValueError, match="do not fit"):
        inverse_transform(codes, rows.int(), scale, mean, head_dim=16, dtype=torch.float32)
