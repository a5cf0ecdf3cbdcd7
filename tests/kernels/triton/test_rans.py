"""Entropy decoding by the Triton kernel and by the reference, of streams that an encoder written here made."""

import numpy as np
import pytest
import torch

from cag_kernels.rans import RansSegments, RansSide, count_blocks, decode_segments, decode_segments_reference
from cag_kernels.triton.rans import decode_on_device

NUM_TABLES = 5
LOW_BITS = np.array([3, 1, 0, 0, 0, 2], np.int8)
TABLES = np.array([4, 4, 3, 2, 0, 4], np.int8)
SCALES = np.array([40, 6, 3, 2, 1, 20])
WIDE = 20  # components of each kind: of four windows of 32 the third has no low bits, and the last is not full


def make_frequencies():
    """Two-sided geometric tables of growing width; each symbol that is used, and the escape, has a frequency."""
    symbols = np.abs(np.arange(128) - 64)
    rows = []
    for width in range(1, NUM_TABLES + 1):
        row = np.maximum((4000 * 0.5 ** (symbols / width) / (3 * width)).astype(np.int64), symbols < 12)
        row[0] = 1
        row[64] += 4096 - row.sum()
        rows.append(row)
    return np.stack(rows)


FREQUENCIES = make_frequencies()
STARTS = np.cumsum(FREQUENCIES, axis=1) - FREQUENCIES


def make_slots():
    rows = []
    for row in FREQUENCIES:
        symbols = np.repeat(np.arange(128), row)
        places = np.concatenate([np.arange(count) for count in row])
        rows.append(symbols << 24 | row[symbols] << 12 | places)
    return torch.from_numpy(np.stack(rows).astype(np.uint32).view(np.int32))


def encode(codes, token_shifts, component_shifts):
    """States, words and escapes of one segment: every step of a decoder undone, the last one first."""
    num_tokens, num_components = codes.shape
    tables, low_bits = np.repeat([TABLES, LOW_BITS], num_components // len(TABLES), axis=1)
    states, words, escapes = [1 << 16] * 32, [], []

    def push(lane, limit):
        if states[lane] >= limit:
            words.append(states[lane] & 0xFFFF)
            states[lane] >>= 16

    for begin in reversed(range(0, num_tokens, 32)):
        tokens = range(begin, min(begin + 32, num_tokens))
        for component in reversed(range(num_components)):
            low = int(low_bits[component])
            for token in reversed(tokens):
                if low:
                    push(token - begin, 1 << 32 - low)
                    states[token - begin] = states[token - begin] << low | int(codes[token, component]) & (1 << low) - 1
            for token in reversed(tokens):
                number = int(tables[component]) + int(component_shifts[component]) + int(token_shifts[token])
                table, symbol = min(max(number, 0), NUM_TABLES - 1), (int(codes[token, component]) >> low) + 64
                if not 0 < symbol < 128 or FREQUENCIES[table, symbol] == 0:
                    symbol = 0
                    escapes.append(codes[token, component])
                frequency = int(FREQUENCIES[table, symbol])
                push(token - begin, frequency << 20)
                whole, rest = divmod(states[token - begin], frequency)
                states[token - begin] = (whole << 12) + rest + int(STARTS[table, symbol])
    return states, words[::-1], escapes[::-1]


def make_segments(counts, times=1):
    """Segments of as many tokens, and their codes `[num_components, num_tokens]`, `times` components of each kind."""
    generator = np.random.default_rng(0)
    scale = np.repeat(SCALES, times)
    coded, parts, shifts = [], [], []
    for count in counts:
        codes = np.rint(generator.laplace(size=(count, len(scale))) * scale).astype(np.int16)
        codes[generator.random(codes.shape) < 0.02] = 3000
        shifts.append(
            (generator.integers(-2, 3, count).astype(np.int8), generator.integers(-2, 3, len(scale)).astype(np.int8))
        )
        parts.append(encode(codes, *shifts[-1]))
        coded.append(codes)

    def joined(index, dtype):
        return torch.from_numpy(np.concatenate([np.asarray(part[index]) for part in parts]).astype(dtype))

    def starts(sizes):
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    states = torch.from_numpy(np.array([part[0] for part in parts]).astype(np.uint32).view(np.int32))
    words = joined(1, np.uint16).view(torch.int16)
    segments = RansSegments(
        states, words, starts([len(part[1]) for part in parts]),
        joined(2, np.int16), starts([len(part[2]) for part in parts]), starts(counts),
        torch.from_numpy(np.concatenate([pair[0] for pair in shifts])),
        torch.from_numpy(np.stack([pair[1] for pair in shifts])),
    )  # fmt: skip
    return segments, torch.from_numpy(np.concatenate(coded).T.copy())


COUNTS, FEW = [70, 1, 32], [33, 1]
BOTH = pytest.mark.parametrize("counts, times", [(COUNTS, 1), (FEW, WIDE)])


def side_of(segments, times=1, num_blocks=None):
    """As long a side as there are tokens, unless a number of blocks is given."""
    tables, low_bits = (torch.from_numpy(np.repeat(part, times)) for part in (TABLES, LOW_BITS))
    if num_blocks is None:
        num_blocks = count_blocks(segments.token_starts.diff().tolist())
    return RansSide(segments, make_slots(), tables, low_bits, num_blocks)


def moved(side, device):
    segments = RansSegments(*(part.to(device) for part in side.segments))
    return RansSide(segments, *(part.to(device) for part in side[1:4]), side.num_blocks)


@BOTH
def test_the_reference_reads_what_was_written(counts, times):
    segments, codes = make_segments(counts, times)
    assert len(segments.words) > 100
    assert len(segments.escapes) > 3
    ((found, whole),) = decode_segments([side_of(segments, times)])
    assert torch.equal(found.by_token().T, codes)
    assert whole.all()


@BOTH
def test_the_kernel_reads_what_was_written(device, counts, times):
    segments, codes = make_segments(counts, times)
    ((found, whole),) = decode_on_device([moved(side_of(segments, times), device)])
    assert torch.equal(found.by_token().T.cpu(), codes)
    assert whole.all()


def sides_of_all_kinds():
    """Sides that differ in all that a side has, and their codes: tokens, segments (none, 35, some without tokens),
    components (none, too), tables, low bits, and blocks that nobody needs."""
    wide, wide_codes = make_segments(FEW, 6)
    many, many_codes = make_segments([1, 0, 33] + 32 * [0])
    few, few_codes = make_segments([40])
    swapped = np.array([3, 3, 3, 0, 4, 2]), np.array([0, 0, 0, 0, 5, 0], np.int8)
    other, _ = make_segments([65])
    numbers = torch.from_numpy(swapped[0].astype(np.int8)), torch.from_numpy(swapped[1])
    sides = [
        side_of(wide, 6),
        RansSide(other, make_slots()[[0, 2, 3, 1]].contiguous(), *numbers, 3),
        side_of(many, num_blocks=5),
        side_of(make_segments([0])[0]._replace(component_shifts=torch.zeros(1, 0, dtype=torch.int8)), 0),
        side_of(few),
    ]
    none = few._replace(**{name: getattr(few, name)[:0] for name in ("states", "component_shifts", "token_shifts")})
    start = torch.zeros(1, dtype=torch.int32)
    none = none._replace(word_starts=start, escape_starts=start, token_starts=start)
    return [*sides, side_of(none)], {0: wide_codes, 2: many_codes, 4: few_codes}


def test_sides_that_differ_are_read_in_one_launch(device):
    """Each as it would be alone, laid out as the operation does it; the second one's is no stream of its tables, and
    reads as the reference reads it."""
    sides, written = sides_of_all_kinds()
    found = decode_on_device([moved(side, device) for side in sides])
    for number, (side, (blocks, whole)) in enumerate(zip(sides, found, strict=True)):
        expected, expected_whole = decode_segments_reference(side)
        assert torch.equal(blocks.by_token().T.cpu(), expected)
        assert torch.equal(whole.cpu(), expected_whole)
        assert blocks.blocks.shape == (side.num_blocks, len(side.tables), 32)
        assert blocks.num_tokens == len(side.segments.token_shifts)
        if number in written:
            assert torch.equal(expected, written[number])
            assert whole.all()
    assert not found[1][1].any()
    ((again, _),) = decode_on_device([moved(sides[0], device)])
    assert torch.equal(again.tokens, found[0][0].tokens)
    for (mine, whole), (theirs, expected) in zip(found, decode_segments(sides), strict=True):
        is_token = (theirs.tokens >= 0).view(-1, 32)[:, None].expand_as(theirs.blocks)
        assert torch.equal(mine.tokens.cpu(), theirs.tokens)
        assert torch.equal(mine.blocks.cpu()[is_token], theirs.blocks[is_token])
        assert torch.equal(whole.cpu(), expected)
    assert decode_segments([]) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_recorded_launch_of_many_sides_reads_them_again():
    """Sixteen sides at the sizes of real chunks, by the public operation, recorded: addresses are in the graph."""
    sides, codes = [], []
    for number in range(16):
        segments, written = make_segments([512, 65][number % 2 :], 1 + number % 3)
        sides.append(moved(side_of(segments, 1 + number % 3), "cuda"))
        codes.append(written)
    decode_segments(sides)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_segments(sides)
    for _ in range(2):
        for blocks, whole in found:
            blocks.blocks.fill_(0x55)
            whole.zero_()
        graph.replay()
        for (blocks, whole), written in zip(found, codes, strict=True):
            assert torch.equal(blocks.by_token().T.cpu(), written)
            assert whole.all()


@pytest.mark.parametrize("part, index", [("words", 9), ("words", 60), ("states", (0, 5)), ("token_shifts", 40)])
def test_a_changed_segment_harms_itself_only(device, part, index):
    """What comes out is the reference's even then, and the other segments are as they were."""
    segments, codes = make_segments(COUNTS)
    getattr(segments, part)[index] += 1
    expected, whole = read_by_both(device, segments)
    assert whole[1:].all()
    assert not whole[0] or not torch.equal(expected[:, :70], codes[:, :70])  # a change may stay within low bits
    assert torch.equal(expected[:, 70:], codes[:, 70:])


@pytest.mark.parametrize(
    "part, first, times", [("word_starts", 5, 1), ("word_starts", 900, WIDE), ("escape_starts", 1, 1)]
)
def test_a_segment_cut_short_reads_nothing_of_what_follows(device, part, first, times):
    """Zeros stand for what it lacks, and it is not whole; nor is the next, which begins too early."""
    segments, _ = make_segments(FEW, times)
    assert getattr(segments, part)[1] > first
    getattr(segments, part)[1] = first
    assert not read_by_both(device, segments, times)[1].any()


def read_by_both(device, segments, times=1):
    """What the reference reads, which must be what the kernel does."""
    side = side_of(segments, times, 9)
    expected, whole = decode_segments_reference(side)
    ((found, found_whole),) = decode_on_device([moved(side, device)])
    assert torch.equal(found.by_token().T.cpu(), expected)
    assert torch.equal(found_whole.cpu(), whole)
    return expected, whole


def test_what_does_not_fit_is_refused():
    segments, _ = make_segments([3])
    side = side_of(segments)
    for change in (
        {"states": segments.states[:, :31]},
        {"words": segments.words.int()},
        {"token_starts": segments.token_starts[:1]},
        {"component_shifts": segments.component_shifts[:, :2]},
        {"words": segments.words.to("meta")},
    ):
        with pytest.raises(ValueError, match="do not fit"):
            decode_segments([side, side._replace(segments=segments._replace(**change))])
    for other in ({"slots": side.slots[:, :9]}, {"tables": side.tables[:2]}, {"num_blocks": 0}):
        with pytest.raises(ValueError, match="do not fit"):
            decode_segments([side, side._replace(**other)])
