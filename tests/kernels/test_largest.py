"""The largest output from 8 bits of a weight is that of the whole product, to the bit, whatever rows and weights."""

import pytest
import torch

from cag_kernels import (
    PackedWeight,
    dot_linear,
    has_compiler,
    has_dots,
    has_numba,
    largest_output,
    largest_output_serves,
    pack_weight,
    packed_linear,
    tile_linear,
    tile_linear_serves,
)
from cag_kernels import largest as largest_module
from cag_kernels.cpu.processor import has_byte_tiles, has_tiles
from cag_kernels.largest import MAX_ROWS, largest_output_reference

if has_numba():
    from cag_kernels.cpu.products.choice import MOST_FOUND, CodedWeight, exact_weight, num_code_bytes
    from cag_kernels.cpu.products.codes import bound_of_sums

pytestmark = pytest.mark.skipif(not has_compiler() or not has_numba(), reason="llvmlite or numba is not there")
by_tiles = pytest.mark.skipif(not has_byte_tiles(), reason="this processor has no tiles of bytes (AMX)")
by_pairs = pytest.mark.skipif(not largest_module._has_pairs(), reason="this processor does not multiply pairs")

SHAPES = [(64, 64), (77, 128), (1000, 64), (1003, 576), (4096, 192), (333, 1536)]  # num_features, size
NUM_ROWS = [1, 2, 7, 8, 9, 16, 31, MAX_ROWS, MAX_ROWS + 1]


by_dots = pytest.mark.skipif(not has_dots() or has_tiles(), reason="other products come first, or there are none")


@pytest.fixture(
    params=[
        pytest.param(False, marks=by_tiles, id="tiles"),
        pytest.param(False, marks=[by_dots, by_pairs], id="dots"),
        pytest.param(True, marks=by_pairs, id="panels"),
    ]
)
def lay(request):
    """A weight as it lies where it is multiplied: plain for tiles or vectors of bfloat16, or packed."""
    return pack_weight if request.param else lambda weight: weight


def product(rows, weight):
    if isinstance(weight, PackedWeight):
        return packed_linear(rows, weight)
    return tile_linear(rows, weight) if tile_linear_serves(weight) else dot_linear(rows, weight)


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    monkeypatch.setattr(largest_module, "_LEAST_FEATURES", 32)


def random_weight(shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def random_rows(num_rows, size, seed=1, outliers=True):
    """As a network's: a few features are far above all others."""
    rows = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed))
    if outliers:
        rows[:, :: size // 8] *= 40
    return rows


def num_found(choice, rows):
    """How many outputs were computed exactly for some rows."""
    choice(rows)
    return choice._choices[len(rows)].num_found


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_rows(lay, shape):
    weight = random_weight(shape)
    choice = largest_output(lay(weight))
    for num_rows in NUM_ROWS:
        for seed in range(4):
            rows = random_rows(num_rows, shape[1], seed)
            assert choice(rows) == largest_output_reference(rows, lay(weight))


def test_few_outputs_are_computed_exactly(lay):
    weight = random_weight((4096, 576))
    choice = largest_output(lay(weight))
    found = [num_found(choice, random_rows(1, 576, seed, outliers=False)) for seed in range(50)]
    assert min(found) >= 1
    assert sum(found) / len(found) < 16


@pytest.mark.parametrize("shape", [(77, 128), (1003, 576)])
def test_every_output_lies_within_its_bounds(lay, shape):
    """Rows that meet one feature's loss head on, too: there the bound is what is lost, and nothing is to spare."""
    weight = random_weight(shape, scale=3.0)
    choice = largest_output(lay(weight))
    coded = choice._coded
    codes = coded.codes.view(torch.int8).view(len(coded.codes), shape[1] // 4, 16, 4).permute(0, 2, 1, 3)
    codes = codes.reshape(-1, shape[1])[: shape[0]]
    lost = weight.double() - codes.double() * coded.scales[: shape[0], None].double()
    assert lost.abs().max() <= coded.scales.max().double() / 2 * (1 + 1e-5)
    rows = torch.cat([random_rows(5, shape[1]), lost[[3, 50, shape[0] - 1]].float() * 1e4])
    choice(rows)
    exact = product(rows, lay(weight)).double()
    uppers = choice._space.uppers[: coded.scales.numel() * len(rows)].view(-1, len(rows), 16)
    uppers = uppers.permute(1, 0, 2).reshape(len(rows), -1)[:, : shape[0]].double()
    lowers = choice._space.lowers[: 64 * len(rows) * 16].view(64, len(rows), 16).double()
    assert (exact <= uppers).all()
    assert (lowers.amax((0, 2)) <= exact.amax(1)).all()
    read = rows if isinstance(lay(weight), PackedWeight) else rows.bfloat16()  # what the exact product multiplies
    from_codes = read.double() @ (codes.double() * coded.scales[: shape[0], None].double()).t()
    share = (exact - from_codes) / (uppers - from_codes)
    assert share.abs().max() <= 1
    assert (share[[5, 6, 7], [3, 50, shape[0] - 1]] > 0.9).all()


def test_the_bound_of_sums_covers_products(lay):
    for size in (64, 576, 1536, 8960):
        weight, rows = random_weight((64, size)), random_rows(8, size)
        rows = rows if isinstance(lay(weight), PackedWeight) else rows.bfloat16().float()
        error = (product(rows, lay(weight)).double() - rows.double() @ weight.double().t()).abs()
        norms = rows.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
        assert (error <= bound_of_sums(size) * norms).all()


def test_equal_outputs_give_the_lowest(lay):
    weight = random_weight((1000, 128))
    rows = random_rows(3, 128)
    best = largest_output_reference(rows, lay(weight))
    for row, place in enumerate(best):
        weight[[990 + row, 500 + row]] = weight[place].clone()
    expected = largest_output_reference(rows, lay(weight))
    assert largest_output(lay(weight))(rows) == expected == [min(place, 500 + row) for row, place in enumerate(best)]


def test_outputs_that_differ_by_the_last_bit_of_a_weight(lay):
    weight = random_weight((256, 64))
    rows = random_rows(1, 64)
    best = largest_output_reference(rows, lay(weight))[0]
    for place in range(0, 40, 2):
        weight[place] = weight[best]
        weight[place].view(torch.int16)[place] += 1 if rows[0, place] * weight[place, place] > 0 else -1
    assert largest_output(lay(weight))(rows) == largest_output_reference(rows, lay(weight))


def test_rows_are_bounded_as_they_are_multiplied(lay):
    """Rounding makes two of their numbers equal, and two outputs; all codes are exact."""
    weight, rows = -torch.ones(300, 64).bfloat16(), torch.ones(1, 64)
    weight[[100, 200]] = 1
    weight[100, 0] = weight[200, 1] = -1
    rows[0, :2] += torch.tensor([3, 1]) * 2.0**-10
    assert largest_output(lay(weight))(rows) == largest_output_reference(rows, lay(weight))


def test_what_cannot_be_bounded_takes_the_whole_product(lay):
    weight = random_weight((300, 64))
    choice = largest_output(lay(weight))
    for value in (torch.nan, torch.inf, 1e30, 0.0):
        rows = random_rows(2, 64)
        rows[1] = value if value == 0 else rows[1]
        rows[1, 5] = value
        assert choice(rows) == largest_output_reference(rows, lay(weight))
        assert num_found(choice, rows) == 0
    same = weight[:1].expand(300, 64).contiguous()  # all are equal: more than are computed exactly
    assert MOST_FOUND < 300
    assert largest_output(lay(same))(random_rows(1, 64)) == [0]


@pytest.mark.parametrize("value", [torch.inf, 3e38, 1e-38, 0.0])
def test_weights_beyond_bounds(lay, value):
    weight = random_weight((300, 64))
    weight[7], weight[299] = value, 0
    rows = random_rows(3, 64).abs()  # so that nothing infinite is subtracted from itself
    assert largest_output(lay(weight))(rows) == largest_output_reference(rows, lay(weight))


def test_a_weight_with_what_is_no_number(lay):
    """torch takes the first output that is none for the largest."""
    weight = random_weight((300, 64))
    weight[100, 5], weight[150, 7], weight[20, 9] = torch.nan, torch.nan, torch.inf
    choice = largest_output(lay(weight))
    for rows in (random_rows(3, 64), torch.eye(64)[:3]):
        assert choice(rows) == largest_output_reference(rows, lay(weight))
        assert num_found(choice, rows) > 0


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_rows_of_any_size(lay, scale):
    weight = random_weight((1000, 64), scale=1 / scale)
    choice = largest_output(lay(weight))
    for seed in range(5):
        rows = random_rows(2, 64, seed) * scale
        assert choice(rows) == largest_output_reference(rows, lay(weight))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(lay, threads):
    weight, rows = random_weight((3001, 192)), random_rows(5, 192)
    expected, before = largest_output_reference(rows, lay(weight)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert largest_output(lay(weight))(rows) == expected
    finally:
        torch.set_num_threads(before)


def test_a_copy_is_half_of_the_weight_and_can_be_given_up(lay):
    weight = lay(random_weight((1000, 64)))
    exact = exact_weight(weight)
    assert largest_output(weight).num_bytes == num_code_bytes(exact) == 1008 * 64
    assert largest_output(weight, goes_on=lambda: False) is None
    memory = torch.empty(num_code_bytes(exact), dtype=torch.uint8)
    assert CodedWeight.encoded(exact, memory, lambda: True).codes.data_ptr() == memory.data_ptr()


@by_pairs
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-18])
def test_weights_packed_in_float16(shape, scale):
    """Also such as are smaller than its normal numbers."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = pack_weight((torch.randn(shape, generator=generator) * scale).half())
    largest = largest_output(weight)
    for num_rows in (1, 7, MAX_ROWS):
        rows = random_rows(num_rows, shape[1])
        assert largest(rows) == packed_linear(rows, weight).argmax(-1).tolist()


@by_pairs
def test_float16_weights_that_differ_by_their_last_bit():
    row = torch.randn(64, generator=torch.Generator().manual_seed(0)).half()
    other = row.clone()
    other.view(torch.int16)[5] += 1
    weight = pack_weight(torch.stack([row] * 40 + [other] + [row] * 40))
    for sign in (1, -1):
        rows = sign * other.sign() * torch.eye(64)[5:6]
        assert (
            largest_output(weight)(rows) == packed_linear(rows, weight).argmax(-1).tolist() == [40 if sign > 0 else 0]
        )


def test_weights_that_are_not_served(lay):
    assert not largest_output_serves(random_weight((1000, 96)))  # no whole tiles of bytes
    assert not largest_output_serves(lay(random_weight((31, 64))))
    with pytest.raises(ValueError, match="not served"):
        largest_output(lay(random_weight((1000, 64)).float()))
