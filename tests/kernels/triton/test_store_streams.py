"""What the store's codec `transform` writes, decoded by the device's entropy decoder and inverse product."""

import numpy as np
import torch

from cag_kernels.inverse import inverse_transform
from cag_kernels.rans import RansSegments, RansSide, count_blocks, decode_segments
from cag_kernels.triton.rans import decode_on_device
from cag_store.codecs.transform.product import product_reference
from cag_store.codecs.transform.rans import Layout, Tables, encode_codes
from cag_store.testing.bases import frequencies

COUNTS = (70, 1, 33)
TABLE_NUMBERS = np.array([11, 9, 9, 6, 4, 2, 0], np.int32)
LOW = np.array([4, 2, 0, 0, 0, 0, 0], np.uint8)


def make_streams():
    """Streams of segments whose components have shifts of their own, as a `RansSide`, and their codes."""
    generator, tables = np.random.default_rng(3), Tables.of(frequencies())
    codes, streams, token_shifts, component_shifts = [], [], [], []
    for count in COUNTS:
        part = np.rint(generator.laplace(size=(count, 7)) * [60, 20, 6, 3, 2, 1, 0.5]).astype(np.int16)
        part[generator.random(part.shape) < 0.01] = 9000
        shifts = generator.integers(-2, 3, count), generator.integers(-2, 3, 7)
        layout = Layout((TABLE_NUMBERS + shifts[1]).astype(np.int32), LOW, shifts[0].astype(np.int32))
        streams.append(encode_codes(part, layout, tables))
        codes.append(part)
        token_shifts.append(shifts[0])
        component_shifts.append(shifts[1])

    def starts(sizes):
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    segments = RansSegments(
        torch.from_numpy(np.stack([stream.states for stream in streams]).view(np.int32)),
        torch.from_numpy(np.concatenate([stream.words for stream in streams]).view(np.int16)),
        starts([stream.num_words for stream in streams]),
        torch.from_numpy(np.concatenate([stream.escapes for stream in streams])),
        starts([stream.num_escapes for stream in streams]),
        starts(COUNTS),
        torch.from_numpy(np.concatenate(token_shifts).astype(np.int8)),
        torch.from_numpy(np.stack(component_shifts).astype(np.int8)),
    )
    static = (
        torch.from_numpy(tables.slots.view(np.int32)),
        torch.from_numpy(TABLE_NUMBERS.astype(np.int8)),
        torch.from_numpy(LOW.astype(np.int8)),
    )
    return RansSide(segments, *static, count_blocks(COUNTS)), torch.from_numpy(np.concatenate(codes))


def test_streams_of_the_store_are_read(device):
    side, codes = make_streams()
    assert len(side.segments.escapes) > 0
    on_device = RansSegments(*(part.to(device) for part in side.segments))
    static = (part.to(device) for part in side[1:4])
    for decode, given in (
        (decode_segments, side),
        (decode_on_device, RansSide(on_device, *static, side.num_blocks)),
    ):
        ((found, whole),) = decode([given])
        assert torch.equal(found.by_token().cpu(), codes)
        assert whole.all()


def test_the_product_is_the_stores():
    _, codes = make_streams()
    rows = np.random.default_rng(4).integers(-2047, 2048, (7, 32)).astype(np.int16)
    ones, zeros = torch.ones(32), torch.zeros(32)
    found = inverse_transform(codes, torch.from_numpy(rows), ones, zeros, head_dim=16, dtype=torch.float32)
    expected = product_reference(codes.numpy(), rows).astype(np.float32).reshape(-1, 2, 16).transpose(1, 0, 2)
    assert np.array_equal(found.numpy(), expected)
