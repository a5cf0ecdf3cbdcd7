"""How one range of a prefix in codes is served by integer products, as LLVM code: tile by tile with all rows, or by
code for few.

Tiles that hold exact tokens, the first ones, become numbers as a whole and meet the panels for numbers; codes go on
with the same maxima, denominators and weighted sums.
"""

from __future__ import annotations

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.code_panel import MAX_CODE_WIDTH, CodePanel
from cag_kernels.cpu.attention.code_tile import CodeTile, codes_place, num_channel_groups
from cag_kernels.cpu.attention.dequantize import SIDES, Dequantizer
from cag_kernels.cpu.attention.few_codes import FewCodes
from cag_kernels.cpu.attention.panel import MAX_WIDTH, WideTile
from cag_kernels.cpu.attention.ranges import Range, Serve, emit_nothing, emit_panels, float_panels
from cag_kernels.cpu.emit import INT16, Value
from cag_kernels.prefixes import Codes


def serve_by_integers(call: Call, codes: Codes, few_rows: int | None = None) -> Serve:
    """Groups of keys must be whole tiles. With `few_rows`: for one query of exactly so many rows, without a window, of
    codes that `few_codes_serve`."""
    assert codes.group_tokens % call.blocking.tile == 0
    if few_rows is None:
        emit_codes, widest = _tile_by_tile(call, codes), MAX_WIDTH
    else:
        emit_codes, widest = _few(call, codes, few_rows), 1  # they are no more than a vector has lanes
    exact = _ExactTiles(call, codes, widest)
    builder = call.emit.builder

    def serve(part: Range) -> None:
        emit_nothing(call, part.sums)
        num_exact = exact.emit_tiles(part)
        left = builder.sub(part.count, num_exact)
        with call.emit.when(builder.icmp_signed(">", left, call.emit.integer(0))):
            emit_codes(part._replace(first=builder.add(part.first, num_exact), count=left))

    return serve


def _few(call: Call, codes: Codes, rows: int) -> Serve:
    """All tiles of codes at once, where they lie."""
    emit, builder, head_dim = call.emit, call.emit.builder, call.head_dim
    few = FewCodes(call.function.module, head_dim, rows, call.blocking, codes).function
    num_groups = num_channel_groups(head_dim, codes)

    def emit_codes(part: Range) -> None:
        group = call.index(part.head, (call[Field.NUM_GROUPS], 0), (head_dim, 0))
        token = call.index(part.head, (call[Field.NUM_KEYS], part.first), (num_groups, 0))
        sides = [codes_place(call, codes, side, part.head, part.first) for side in range(2)]
        parameters = [emit.at(call[SIDES[0].scales], group, INT16), emit.at(call[SIDES[0].offsets], group, INT16)]
        parameters += [emit.at(call[SIDES[1].scales], token, INT16), emit.at(call[SIDES[1].offsets], token, INT16)]
        numbers = [part.first, part.count, call[Field.NUM_LANES]]
        builder.call(few, [part.query, *sides, *parameters, *part.sums, *numbers])

    return emit_codes


def _tile_by_tile(call: Call, codes: Codes) -> Serve:
    """A tile of codes in 16 bits, and all panels of rows."""
    emit, builder, tile = call.emit, call.emit.builder, call.blocking.tile
    panels = [
        CodePanel(call.function.module, call.head_dim, width, call.blocking, call.has_window, codes).function
        for width in range(1, MAX_CODE_WIDTH + 1)
    ]
    code_tile = CodeTile(call, codes)

    def emit_codes(part: Range) -> None:
        with emit.loop(emit.integer(0), part.count, tile) as begin:
            count = emit.minimum(builder.sub(part.count, begin.index), emit.integer(tile))
            token = builder.add(part.first, begin.index)
            code_tile.emit_tile(part.head, token, count)
            pointers = [part.query, code_tile.keys, code_tile.values, *part.sums]
            pointers += _ahead(call, codes, part.head, token)
            pointers += [code_tile.key_parameters, code_tile.value_parameters]
            emit_panels(call, panels, pointers, count, token)

    return emit_codes


def _ahead(call: Call, codes: Codes, head: Value, token: Value) -> list[Value]:
    """Where the codes behind the tile that begins with a token lie."""
    following = call.emit.builder.add(token, call.emit.integer(call.blocking.tile))
    return [codes_place(call, codes, side, head, following) for side in range(2)]


class _ExactTiles:
    """Tiles of codes that hold exact tokens, as numbers, and the panels that meet them, up to `widest` vectors of rows
    at once."""

    def __init__(self, call: Call, codes: Codes, widest: int) -> None:
        self._call, self._codes = call, codes
        self._num_tokens = call.blocking.tile
        self._dequantizer = Dequantizer(call, codes)
        self._rows = [self._dequantizer.rows_on_stack(self._num_tokens) for _ in range(2)]
        self._wide = WideTile(call.emit, call.head_dim, call.blocking, call.kept)
        self._panels = float_panels(call, widest)

    def emit_tiles(self, part: Range) -> Value:
        """Serve those of a range, which are its first ones; how many tokens they have."""
        emit, builder, call = self._call.emit, self._call.emit.builder, self._call
        tile, zero = emit.integer(self._num_tokens), emit.integer(0)
        left = builder.sub(call[Field.NUM_EXACT], part.first)
        left = builder.select(builder.icmp_signed(">", left, zero), left, zero)
        num_tokens = emit.minimum(builder.mul(emit.rounded_up(left, tile), tile), part.count)
        with (
            emit.when(builder.icmp_signed(">", num_tokens, zero)),
            emit.loop(zero, num_tokens, self._num_tokens) as begin,
        ):
            count = emit.minimum(builder.sub(num_tokens, begin.index), tile)
            token = builder.add(part.first, begin.index)
            for side, rows in enumerate(self._rows):
                self._dequantizer.emit_side(side, part.head, token, count, rows, self._num_tokens)
            keys, values = self._rows
            self._wide.emit_widened(keys, values, count)
            pointers = [part.query, self._wide.keys, self._wide.values, *part.sums]
            pointers += _ahead(call, self._codes, part.head, token)
            emit_panels(call, self._panels, pointers, count, token)
        return num_tokens
