"""A weight in 8 bits beside the exact one, rows split into two times 8 bits, and what both lose, compiled with numba.

Every loss is stated as a bound: for a row `x` and a feature `w` that became `scale * code`,

    |w . x - found| <= errors * norm(x) + norms * lost(x)

where `found` is the product of the codes, `lost(x)` the norm of what splitting took from `x`, and `w . x` any float32
sum of the products, however rounded (`bound_of_sums`). A row is rounded to bfloat16 first where the exact product does
so. Knows the layouts of `cpu.products.tile_bounds` and `cpu.products.bounds`; no tiles.
"""

from __future__ import annotations

import numpy as np

from cag_kernels.cpu.rows import Array, compiled, narrowed, widened

LANES = 16  # features side by side, and rows of a tile
QUAD = 4  # numbers of the summed axis that a tile of bytes sums at once
DEPTH = 64  # numbers of the summed axis in one product of tiles
ROWS = LANES // 2  # rows in a tile: of each its upper and its lower half
MOST_CODE = 127
SHIFT = 7  # bits of the lower half
_MOST_SPLIT = MOST_CODE << SHIFT
_HALF = 1 << (SHIFT - 1)
_MOST_PAIRED, _MOST_SUM = 2**15 - 2, 2**31 - 2**15  # of an int16 and of an int32, and room for what rounding adds
_SLACK = np.float32(1.001)  # above all rounding of norms of up to 16,000 numbers in float32
_LEAST = np.float32(2.0**-126)  # what a processor may take for zero
_TINY, _HUGE = np.float32(2.0**-50), np.float32(2.0**50)  # between these norms nothing that is bounded overflows, and
# what is taken for zero is below `_TINY` times a norm
_INFINITY = np.float32(np.inf)
_MAXIMA = {"reassoc", "nnan", "nsz"}


def bound_of_sums(count: int) -> float:
    """Of a sum of `count` products in float32, in any order, and of the few operations behind it: its error over the
    product of both norms (Higham, Accuracy and Stability of Numerical Algorithms, 3.1)."""
    unit = (count + 32) * 2.0**-24
    return unit / (1 - unit)


@compiled
def encode(weight: Array, unit: float, codes: Array, scales: Array, errors: Array, norms: Array) -> None:
    """A weight in codes.

    weight: `[num_features, size]` as `cpu.rows.kept_numbers`; unit: `bound_of_sums(size)`; codes (out): `[num_groups,
    size / QUAD, LANES]` int32, four codes each; scales, errors, norms (out): `[num_groups * LANES]` float32. Features
    behind the last, and those with numbers beyond all bounds, are bounded by nothing.
    """
    num_features, size = weight.shape
    row, number = np.empty(size, np.int8), np.empty(size, np.float32)
    quads = row.view(np.int32)
    for feature in range(codes.shape[0] * LANES):
        group, lane = feature // LANES, feature % LANES
        most, squares = np.float32(0), np.float32(0)
        if feature < num_features:
            for index in range(size):
                number[index] = widened(weight[feature, index])
                most = max(most, abs(number[index]))
                squares += number[index] * number[index]
        if feature >= num_features or not squares < _HUGE * _HUGE:
            codes[group, :, lane] = 0
            scales[feature], errors[feature], norms[feature] = 0, _INFINITY, 0
            continue
        scale = most / np.float32(MOST_CODE)
        inverse = np.float32(1) / scale if scale >= _LEAST else np.float32(0)
        lost = np.float32(0)
        for index in range(size):
            code = np.rint(number[index] * inverse)
            row[index] = np.int8(code)
            rest = number[index] - code * scale
            lost += rest * rest
        for quad in range(size // QUAD):
            codes[group, quad, lane] = quads[quad]
        norm, rest = np.sqrt(squares) * _SLACK, np.sqrt(lost) * _SLACK
        scales[feature] = scale
        norms[feature] = norm + rest
        errors[feature] = rest + np.float32(unit) * (norm + rest) + _TINY


@compiled
def split(rows: Array, left: Array, facts: Array) -> bool:
    """Rows, rounded to bfloat16, as `scale * (upper * 2 ** SHIFT + lower)`; whether all of them can be bounded.

    rows: `[num_rows, size]` float32; left (out): `[row tiles, size / DEPTH, LANES, DEPTH]` int8, of each row the upper
    halves and behind them the lower ones; facts (out): `[num_rows, 3]` float32: scale, norm, and norm of what is lost.
    """
    num_rows, size = rows.shape
    bounded = True
    for row in range(num_rows):
        most, squares = np.float32(0), np.float32(0)
        for index in range(size):
            value = widened(narrowed(rows[row, index]))
            most = max(most, abs(value))
            squares += value * value
        if not _TINY * _TINY < squares < _HUGE * _HUGE:  # also where one is no number
            bounded = False
        scale = most / np.float32(_MOST_SPLIT)
        inverse = np.float32(1) / scale if scale >= _LEAST else np.float32(0)
        lost = np.float32(0)
        tile, place = row // ROWS, 2 * (row % ROWS)
        for index in range(size):
            value = widened(narrowed(rows[row, index]))
            whole = np.rint(value * inverse)
            rest = value - whole * scale
            lost += rest * rest
            number = np.int32(whole)
            upper = (number + _HALF) >> SHIFT
            left[tile, index // DEPTH, place, index % DEPTH] = np.int8(upper)
            left[tile, index // DEPTH, place + 1, index % DEPTH] = np.int8(number - (upper << SHIFT))
        facts[row, 0], facts[row, 1] = scale, np.sqrt(squares) * _SLACK
        facts[row, 2] = np.sqrt(lost) * _SLACK + np.float32(size) * _LEAST
    return bounded


@compiled
def round_rows(rows: Array) -> None:
    """Rows `[num_rows, size]` float32 to the bfloat16 that products of pairs take of them, in place."""
    for row in range(rows.shape[0]):
        for index in range(rows.shape[1]):
            rows[row, index] = widened(narrowed(rows[row, index]))


@compiled
def split_pairs(rows: Array, pairs: Array, facts: Array) -> bool:
    """Rows as `scale * number`, of as many bits as sums of all products with codes leave in int32; whether all rows can
    be bounded.

    rows: `[num_rows, size]` float32; pairs (out): `[num_rows, size / QUAD, 2, 2]` int16: numbers 0 and 2, then 1 and 3
    of each quad; facts as in `split`.
    """
    num_rows, size = rows.shape
    most_number = min(_MOST_PAIRED, _MOST_SUM // (MOST_CODE * size))
    bounded = True
    for row in range(num_rows):
        most, squares = np.float32(0), np.float32(0)
        for index in range(size):
            most = max(most, abs(rows[row, index]))
            squares += rows[row, index] * rows[row, index]
        if not _TINY * _TINY < squares < _HUGE * _HUGE:  # also where one is no number
            bounded = False
        scale = most / np.float32(most_number)
        inverse = np.float32(1) / scale if scale >= _LEAST else np.float32(0)
        lost = np.float32(0)
        for index in range(size):
            whole = np.rint(rows[row, index] * inverse)
            rest = rows[row, index] - whole * scale
            lost += rest * rest
            place = index % QUAD
            pairs[row, index // QUAD, place % 2, place // 2] = np.int16(whole)
        facts[row, 0], facts[row, 1] = scale, np.sqrt(squares) * _SLACK
        facts[row, 2] = np.sqrt(lost) * _SLACK + np.float32(size) * _LEAST
    return bounded


def _reaching(uppers: Array, lowers: Array, num_features: int, found: Array) -> int:
    """Features that may be the largest of a row: those whose upper bound reaches the row's largest lower one.

    uppers: `[num_groups, num_rows, LANES]`; lowers: `[num_units, num_rows, LANES]`; found (out): int64, in order and
    each once. Returns how many there are, 0 if more than `found` holds.
    """
    num_groups, num_rows, _ = uppers.shape
    least = np.full(num_rows, -_INFINITY)
    for unit in range(lowers.shape[0]):
        for row in range(num_rows):
            for lane in range(LANES):
                least[row] = max(least[row], lowers[unit, row, lane])
    count = 0
    for group in range(num_groups):
        reached = False
        for row in range(num_rows):
            most = -_INFINITY
            for lane in range(LANES):
                most = max(most, uppers[group, row, lane])
            reached = reached or most >= least[row]
        if not reached:
            continue
        for lane in range(min(LANES, num_features - group * LANES)):
            for row in range(num_rows):
                if uppers[group, row, lane] >= least[row]:
                    if count == len(found):
                        return 0
                    found[count] = group * LANES + lane
                    count += 1
                    break
    return count


reaching = compiled(_reaching, _MAXIMA)


@compiled
def gather(weight: Array, found: Array, count: int, out: Array) -> None:
    """Rows `found[:count]` of a weight to the first ones of `out`."""
    for place in range(count):
        for index in range(weight.shape[1]):
            out[place, index] = weight[found[place], index]


@compiled
def gather_panels(panels: Array, found: Array, count: int, out: Array) -> None:
    """Features `found[:count]` of a weight in panels `[num_panels, size, LANES]` to the first ones of `out`, alike."""
    for place in range(count):
        feature = found[place]
        for index in range(panels.shape[1]):
            number = panels[feature // LANES, index, feature % LANES]
            out[place // LANES, index, place % LANES] = number


@compiled
def pick(outputs: Array, found: Array, count: int, chosen: Array) -> None:
    """For each row of `outputs [num_rows, at least count]` which feature its largest output is of: the first of equal
    ones, and as in torch what is no number is above all. -1 where there are none."""
    for row in range(len(chosen)):
        best = 0
        for place in range(1, count):
            most = outputs[row, best]
            if most == most and not outputs[row, place] <= most:
                best = place
        chosen[row] = found[best] if count else -1
