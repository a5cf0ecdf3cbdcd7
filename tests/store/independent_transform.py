"""The decoder of codec `transform` written from docs/format.md 5.4 and 5.5 alone: stdlib and numpy, one code at a time.

In: a segment, the content of its basis' blob, the shapes of its layers. Out: float32 values and exact tokens.
"""

import json
import math
import struct
from collections import deque
from dataclasses import dataclass

import numpy as np


class FormatError(Exception):
    """The bytes are not what docs/format.md says."""


def need(condition, what):
    if not condition:
        raise FormatError(what)


@dataclass
class Side:
    """One side of a group: arrays of section 5.5."""

    mean: np.ndarray
    unit: np.ndarray
    log_deviation: np.ndarray
    row_shift: np.ndarray
    mantissas: np.ndarray


class Bytes:
    """Arrays one behind the other."""

    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def take(self, kind, *shape):
        count = math.prod(shape)
        need(self.offset + count * np.dtype(kind).itemsize <= len(self.data), "length")
        array = np.frombuffer(self.data, kind, count, self.offset).reshape(shape)
        self.offset += array.nbytes
        return array

    def end(self):
        need(self.offset == len(self.data), "nothing follows")


def read_basis(blob):
    """The header, frequencies, and [(keys, values), one a group], or keys alone."""
    magic = b"cag-transform-basis 1\n"
    need(blob.startswith(magic), "magic of a basis")
    start = len(magic) + 4
    end = start + int.from_bytes(blob[len(magic) : start], "little")
    header = json.loads(blob[start:end])
    rest = Bytes(blob, end)
    frequencies = rest.take("<u2", header["num_tables"], 128)
    need((frequencies.sum(axis=1, dtype=int) == 4096).all() and (frequencies < 4096).all(), "frequencies")
    need((frequencies[:, 0] > 0).all(), "frequencies of escapes")
    groups = []
    for index, counts in enumerate(header["num_components"]):
        first = index * header["joint_layers"]
        layers = range(first, min(first + header["joint_layers"], len(header["head_dim"])))
        shapes = [(header["num_kv_heads"][layer], header["head_dim"][layer]) for layer in layers]
        wide = header["num_wide"][index]
        need(len(counts) == len(wide) == len(header["num_wide"][0]) in (1, 2), "sides")
        groups.append([read_side(rest, shapes, *side) for side in zip(counts, wide, strict=True)])
    rest.end()
    return header, frequencies, groups


def read_side(rest, shapes, num_components, num_wide):
    channels = sum(heads * dim for heads, dim in shapes)
    need(0 <= num_wide <= num_components <= channels, "number of components")
    mean, unit = rest.take("<f4", channels), rest.take("<f4", channels)
    deviation, shift = rest.take("<i2", num_components), rest.take("u1", num_components)
    wide, narrow = rest.take("<i2", num_wide, channels), rest.take("i1", num_components - num_wide, channels)
    rest.take("<f4", channels)
    for heads, dim in shapes:
        rest.take("i1", heads, dim, dim)
    return Side(mean, unit, deviation, shift, np.concatenate([wide, narrow.astype("<i2")]))


def transform_values(segment, shapes, config, itemsize, side, start, first_layer, blob):
    """For each layer float32 [num_kv_heads, num_tokens, head_dim]; places of exact tokens; their bytes, a row a token.

    shapes: (num_kv_heads, num_tokens, head_dim) of each layer.
    """
    header, frequencies, groups = read_basis(blob)
    need(header["joint_layers"] == config["joint_layers"], "joint layers")
    need(all(header["head_dim"][first_layer + i] == shape[2] for i, shape in enumerate(shapes)), "geometry")
    found = groups[first_layer // config["joint_layers"]][side]
    numbers, low = components(found.log_deviation, config["step"], len(frequencies))
    center, exact, rows, codes = read_segment(Bytes(segment), shapes, itemsize, side, numbers, low, frequencies)
    width = np.float32(2.0 ** (config["step"] / 64))
    scale = found.unit * width
    mean = found.mean + center.astype("<f4") * np.float32(64) * scale if len(center) else found.mean
    count = len(numbers)
    rows_of = found.mantissas[:count].astype(np.int64) << found.row_shift[:count, None].astype(np.int64)
    sums = codes @ rows_of
    tokens = np.zeros((shapes[0][1], len(mean)), "<f4")
    tokens[np.setdiff1d(np.arange(len(tokens)), exact)] = sums.astype("<i4").astype("<f4") * scale + mean
    layers, channel = [], 0
    for index, (heads, _, dim) in enumerate(shapes):
        values = tokens[:, channel : channel + heads * dim].reshape(-1, heads, dim).transpose(1, 0, 2).copy()
        rotation = header["layer_rotation"][first_layer + index]
        if side == 0 and rotation >= 0:
            turn(values, header["rotations"][rotation], start)
        layers.append(values)
        channel += heads * dim
    return layers, exact, rows


def components(log_deviation, step, num_tables):
    """Table number and number of low bits of each component that is coded."""
    spread = [int(deviation) - step + 128 for deviation in log_deviation]
    levels = [number * 4 // 64 + 4 for number in spread if number >= 0]
    low = [min(max(-(-level // 4) - 6, 0), 9) for level in levels]
    return [min(level - 4 * bits, num_tables - 1) for level, bits in zip(levels, low, strict=True)], low


def read_segment(rest, shapes, itemsize, side, numbers, low, frequencies):
    """Center, places and bytes of exact tokens, codes int64 [coded tokens, components]."""
    num_tokens, channels = shapes[0][1], sum(heads * dim for heads, _, dim in shapes)
    stated, centered, zero = struct.unpack("<BBH", rest.take("u1", 4).tobytes())
    num_exact, num_escapes, num_words = (int(number) for number in rest.take("<u4", 3))
    need((stated, zero) == (side, 0) and centered < 2 and num_exact <= num_tokens, "head of a segment")
    center = rest.take("i1", channels * centered)
    exact = rest.take("<u4", num_exact)
    need((np.diff(exact.astype(int)) > 0).all() and (exact < num_tokens).all(), "exact tokens")
    rows = rest.take("u1", num_exact, channels * itemsize)
    num_coded = num_tokens - num_exact
    by_component, by_token = read_shifts(rest, len(numbers)), read_shifts(rest, num_coded)
    escapes = rest.take("<i2", num_escapes)
    states, words = rest.take("<u4", 32), rest.take("<u2", num_words)
    rest.end()
    tables = [
        [min(max(n + c + t, 0), len(frequencies) - 1) for t in by_token]
        for n, c in zip(numbers, by_component, strict=True)
    ]
    return center, exact, rows, Codes(states, words, escapes, frequencies).read(tables, low, num_coded)


def read_shifts(rest, count):
    halves = [half - 8 for byte in rest.take("u1", -(-count // 2)).tolist() for half in (byte & 15, byte >> 4)]
    return halves[:count]


class Codes:
    """Reads codes off states, words and escapes."""

    def __init__(self, states, words, escapes, frequencies):
        self.states, self.words, self.escapes = (deque(array.tolist()) for array in (states, words, escapes))
        self.frequencies = frequencies.astype(int).tolist()
        self.starts = (np.cumsum(frequencies, axis=1, dtype=int) - frequencies).tolist()
        self.symbols = [np.repeat(np.arange(128), row).tolist() for row in frequencies]

    def read(self, tables, low, num_tokens):
        codes = np.zeros((num_tokens, len(low)), np.int64)
        for first in range(0, num_tokens, 32):
            lanes = range(min(32, num_tokens - first))
            for component, bits in enumerate(low):
                symbols = [self.symbol(lane, tables[component][first + lane]) for lane in lanes]
                below = [self.low_bits(lane, bits) if bits else 0 for lane in lanes]
                for lane, symbol in zip(lanes, symbols, strict=True):
                    need(symbol or self.escapes, "escapes")
                    code = ((symbol - 64) << bits) + below[lane] if symbol else self.escapes.popleft()
                    codes[first + lane, component] = (code + 32768) % 65536 - 32768
        need(not self.words and not self.escapes and set(self.states) == {65536}, "end of the words")
        return codes

    def symbol(self, lane, table):
        state = self.states[lane]
        symbol = self.symbols[table][state % 4096]
        rest = state % 4096 - self.starts[table][symbol]
        self.fill(lane, self.frequencies[table][symbol] * (state >> 12) + rest)
        return symbol

    def low_bits(self, lane, bits):
        state = self.states[lane]
        self.fill(lane, state >> bits)
        return state % (1 << bits)

    def fill(self, lane, state):
        if state < 65536:
            need(self.words, "words")
            state = state * 65536 + self.words.popleft()
        self.states[lane] = state


def turn(values, rotation, start):
    """Keys `[num_kv_heads, num_tokens, head_dim]` turned in place, from position `start` on."""
    frequencies = rotation["inverse_frequencies"]
    count = len(frequencies)
    halves = rotation["pairing"] == "halves"
    for token in range(values.shape[1]):
        for pair, frequency in enumerate(frequencies):
            one, two = (pair, pair + count) if halves else (2 * pair, 2 * pair + 1)
            angle = float(start + token) * frequency
            cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
            a, b = values[:, token, one].copy(), values[:, token, two].copy()
            values[:, token, one] = a * cosine - b * sine
            values[:, token, two] = b * cosine + a * sine
