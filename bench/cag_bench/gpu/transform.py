"""How fast the codec `transform` becomes keys and values on the device: entropy decoding, then the inverse transform.

Random streams at the sizes that the codec has for a model of a shape: groups of `joint_layers` layers, 65 % of their
components coded, about 2.5 bits a code, the first few components with low bits, so that their codes are no bytes.
The figure is that of decoding everything: all groups and both sides in one launch, then a product for each group and
side. Beside it two other ways: a launch for each side in a stream of its own (apart), and launches of a few sides,
each beside the products of those before (in turn), as a load does it. Both halves are measured by themselves too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cag_bench.errors import KernelWrong
from cag_bench.figures import percentiles
from cag_bench.gpu.clock import Budget, median_of
from cag_bench.gpu.shapes import GpuOptions
from cag_bench.kernel_clock import Clock
from cag_kernels import CodeBlocks, RansSegments, RansSide, count_blocks, decode_segments, inverse_transform
from cag_kernels.inverse import inverse_transform_reference
from cag_kernels.rans import LANES, SLOTS, decode_segments_reference
from cag_kernels.rotation import angles

CODED_SHARE = 0.65  # of a group's components, at the codec's usual steps (docs/design/004)
CHUNK_TOKENS = 512
MEAN_SIZE = 1.0  # of a code: of the two-sided geometric distribution that the table is of
NUM_LARGE, LOW_BITS = 8, 3  # components whose codes take more than a byte, as those of keys in real caches
SPARE_WORDS = 1.03  # as many as the codes take, and a few more, or zeros would be read
CHECKED_SEGMENTS, CHECKED_COMPONENTS, CHECKED_TOKENS = 2, 24, 64


MOST_SAMPLES = 9  # of each way; a sample of everything takes half a second
SIDES_IN_TURN = 4  # that are decoded at once while others are multiplied, as a load of this size has them
Decoding = Callable[[], list[tuple[CodeBlocks, Tensor]]]


def transform_row(
    device: torch.device, clock: Clock, options: GpuOptions, bandwidth: float, budget: Budget
) -> dict[str, Any]:
    """The row of the codec: seconds of both halves for a whole prefix, and bfloat16 bytes a second.

    Raises:
        KernelWrong: codes or values that are not the reference's to the bit.
    """
    shape = options.network
    channels = shape.num_kv_heads * shape.head_dim
    num_groups = math.ceil(shape.num_layers / options.joint_layers)
    num_components = round(CODED_SHARE * options.joint_layers * channels)
    check_entropy(device)
    streams = [random_streams(device, options.prefix_tokens, num_components) for _ in range(2 * num_groups)]
    inverses = [Inverse(device, options, num_components, side) for side in ("keys", "values")]
    codes = decode_segments(streams[:1])[0][0]
    for inverse in inverses:
        inverse.check(codes)
    plain_bytes = 2 * 2 * shape.num_layers * channels * options.prefix_tokens
    together = partial(decode_segments, streams)
    apart = side_by_side([partial(decode_segments, [side]) for side in streams], device)
    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: products(together(), inverses),
        "decode_apart": lambda: products(apart(), inverses),
        "decode_in_turn": in_turn(streams, inverses, device),
        "entropy": together,
        "entropy_apart": apart,
    }
    found = {name: samples_of(clock.prepared(way), options, budget) for name, way in ways.items()}
    compressed = sum(part.nbytes for side in streams for part in side.segments)
    floor_s = (plain_bytes + compressed) / bandwidth
    timed = {side.name: samples_of(clock.prepared(partial(side, codes)), options, budget) for side in inverses}
    speeds = {way: plain_bytes / median_of(samples) / 1e9 for way, samples in found.items()}
    return {
        "name": "decode transform",
        "shape": {"num_tokens": options.prefix_tokens, "joint_layers": options.joint_layers}
        | {"num_components": num_components, "num_groups": num_groups},
        **{f"{way}_s": percentiles(samples) for way, samples in found.items()},
        **{f"{way}_samples_s": samples for way, samples in found.items()},
        "gb_per_s": speeds["decode"],
        "apart_gb_per_s": speeds["decode_apart"],
        "in_turn_gb_per_s": speeds["decode_in_turn"],
        "inverse_group_s": {side: percentiles(samples) for side, samples in timed.items()},
        "inverse_samples_s": timed,
        "compressed_bytes": compressed,
        "plain_bytes": plain_bytes,
        "floor_s": floor_s,
        "p50_over_floor": median_of(found["decode"]) / floor_s,
    }


def products(decoded: Sequence[tuple[CodeBlocks, Tensor]], inverses: Sequence[Inverse]) -> list[Tensor]:
    """Of all sides, keys and values in turn."""
    return [inverses[index % 2](codes) for index, (codes, _) in enumerate(decoded)]


def in_turn(sides: Sequence[RansSide], inverses: Sequence[Inverse], device: torch.device) -> Callable[[], list[Tensor]]:
    """A few sides are decoded in a stream of their own while those before them are multiplied."""
    batches = [sides[first : first + SIDES_IN_TURN] for first in range(0, len(sides), SIDES_IN_TURN)]
    if device.type != "cuda":
        return lambda: [part for batch in batches for part in products(decode_segments(batch), inverses)]
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run() -> list[Tensor]:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        made: list[Tensor] = []
        with torch.cuda.stream(stream):
            found = [decode_segments(batches[0])]  # kept, as its memory belongs to this stream
        for batch in [*batches[1:], []]:
            current.wait_stream(stream)
            with torch.cuda.stream(stream):
                found.append(decode_segments(batch))
            made += products(found[-2], inverses)
        return made

    return run


def random_streams(
    device: torch.device, num_tokens: int, num_components: int, chunk_tokens: int = CHUNK_TOKENS
) -> RansSide:
    """Segments of random words: codes of the table's distribution come out, as many words go in as they need.

    Such a stream does not end where a writer's would, which the decoder says and which costs it nothing.
    """
    counts = segment_tokens(num_tokens, chunk_tokens)
    num_segments, slots = len(counts), geometric_slots()
    low_bits = torch.zeros(num_components, dtype=torch.int8)
    low_bits[:NUM_LARGE] = LOW_BITS
    bits = num_components * bits_per_code(slots) + int(low_bits.sum())
    num_words = round(SPARE_WORDS * chunk_tokens * bits / 16)
    starts = torch.arange(num_segments + 1, dtype=torch.int32, device=device)
    token_starts = torch.tensor([0, *counts]).cumsum(0).to(device=device, dtype=torch.int32)
    half = 1 << 15
    segments = RansSegments(
        states=torch.randint(1 << 16, 1 << 31, (num_segments, LANES), dtype=torch.int32, device=device),
        words=torch.randint(-half, half, (num_segments * num_words,), dtype=torch.int16, device=device),
        word_starts=starts * num_words,
        escapes=torch.zeros(0, dtype=torch.int16, device=device),
        escape_starts=torch.zeros_like(starts),
        token_starts=token_starts,
        token_shifts=torch.zeros(num_tokens, dtype=torch.int8, device=device),
        component_shifts=torch.zeros(num_segments, num_components, dtype=torch.int8, device=device),
    )
    slots, tables, low_bits = (part.to(device) for part in (slots, torch.zeros_like(low_bits), low_bits))
    return RansSide(segments, slots, tables, low_bits, count_blocks(counts))


def segment_tokens(num_tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> list[int]:
    """Tokens of each segment."""
    num_segments = math.ceil(num_tokens / chunk_tokens)
    return [chunk_tokens] * (num_segments - 1) + [num_tokens - chunk_tokens * (num_segments - 1)]


def geometric_slots() -> Tensor:
    """`[1, 4096]`: one table, `frequency ~ exp(-|code| / MEAN_SIZE)` over the symbols 1 to 127, each at least once."""
    codes = torch.arange(1, 128) - 64
    weights = torch.exp(-codes.abs() / MEAN_SIZE)
    frequencies = 1 + (weights / weights.sum() * (SLOTS - len(codes))).floor().long()
    frequencies[63] += SLOTS - int(frequencies.sum())  # the code 0
    symbols = torch.repeat_interleave(torch.arange(1, 128), frequencies)
    places = torch.cat([torch.arange(int(count)) for count in frequencies])
    return (symbols << 24 | frequencies[symbols - 1] << 12 | places).to(torch.int32)[None].contiguous()


def bits_per_code(slots: Tensor) -> float:
    """The entropy of a table's symbols."""
    shares = torch.bincount(slots[0].long() >> 24).double() / SLOTS
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum())


class Inverse:
    """The inverse transform of one group's keys (with their rotation) or values, random rows and parameters."""

    def __init__(self, device: torch.device, options: GpuOptions, num_components: int, name: str) -> None:
        """`name`: keys or values."""
        shape, limit = options.network, 1 << 14
        channels = options.joint_layers * shape.num_kv_heads * shape.head_dim
        self.name = name
        self._rows = torch.randint(-limit, limit, (num_components, channels), dtype=torch.int16, device=device)
        counts = segment_tokens(options.prefix_tokens)
        self._scale = torch.rand(channels, device=device) * 1e-6
        self._means = torch.randn(len(counts), channels, device=device)
        numbers = torch.arange(len(counts), dtype=torch.int32)
        self._mean_of = torch.repeat_interleave(numbers, torch.tensor(counts)).to(device)
        self._options: dict[str, Any] = {"head_dim": shape.head_dim, "dtype": torch.bfloat16}
        self._turns: tuple[Tensor, Tensor] | None = None
        if name == "keys":
            half = shape.head_dim // 2
            frequencies = 500_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            cosines, sines = angles(torch.arange(options.prefix_tokens), frequencies)
            self._turns = cosines.to(device), sines.to(device)

    def __call__(self, codes: CodeBlocks) -> Tensor:
        """Keys or values of the tokens of all segments."""
        options = {"mean_of": self._mean_of, "angles": self._turns, **self._options}
        return inverse_transform(codes, self._rows, self._scale, self._means, **options)

    def check(self, codes: CodeBlocks) -> None:
        """Raises: KernelWrong: values of a few tokens that are not the reference's to the bit."""
        few = slice(-min(len(self._mean_of), CHECKED_TOKENS), None)
        operands = [part.cpu() for part in (codes.by_token()[few], self._rows, self._scale, self._means)]
        turns = None if self._turns is None else (self._turns[0][few].cpu(), self._turns[1][few].cpu())
        options = {"mean_of": self._mean_of[few].cpu(), "angles": turns, **self._options}
        expected = inverse_transform_reference(*operands, **options)
        if not torch.equal(self(codes)[:, few].cpu(), expected):
            raise KernelWrong(f"the inverse transform of {self.name} differs from its reference.")


def check_entropy(device: torch.device) -> None:
    """Raises: KernelWrong: codes of sides of two sizes that are not the reference's."""
    sizes = CHECKED_SEGMENTS * CHECKED_TOKENS, CHECKED_TOKENS
    widths = (CHECKED_COMPONENTS, 2 * CHECKED_COMPONENTS)
    sides = [random_streams(device, sizes[0], width, sizes[1]) for width in widths]
    for side, (found, _) in zip(sides, decode_segments(sides), strict=True):
        segments = RansSegments(*(part.cpu() for part in side.segments))
        on_host = RansSide(segments, side.slots.cpu(), side.tables.cpu(), side.low_bits.cpu(), side.num_blocks)
        if not torch.equal(found.by_token().T.cpu(), decode_segments_reference(on_host)[0]):
            raise KernelWrong("entropy decoding differs from its reference.")


def side_by_side(works: list[Decoding], device: torch.device) -> Decoding:
    """What all of them find, each in a stream of its own on a GPU; the caller's stream waits for all."""
    if device.type != "cuda":
        return lambda: [found for work in works for found in work()]
    streams = [torch.cuda.Stream(device) for _ in works]  # type: ignore[no-untyped-call]

    def run() -> list[tuple[CodeBlocks, Tensor]]:
        current = torch.cuda.current_stream(device)
        found: list[tuple[CodeBlocks, Tensor]] = []
        for stream, work in zip(streams, works, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                found += work()
        for stream in streams:
            current.wait_stream(stream)
        return found

    return run


def samples_of(timed: Callable[[], float], options: GpuOptions, budget: Budget) -> list[float]:
    """Seconds of up to `options.samples` runs and MOST_SAMPLES, one at least."""
    samples = [timed()]
    while len(samples) < min(options.samples, MOST_SAMPLES) and budget.left_s > 0:
        samples.append(timed())
    return samples
