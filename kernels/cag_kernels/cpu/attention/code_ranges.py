"""How one range of a prefix in codes is served by integer products, as LLVM code: tile by tile with all rows.

A tile that holds exact tokens becomes numbers as a whole and meets the panels for numbers, which go on with the same
maxima, denominators and weighted sums.
"""

from __future__ import annotations

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.code_panel import MAX_CODE_WIDTH, CodePanel
from cag_kernels.cpu.attention.code_tile import CodeTile
from cag_kernels.cpu.attention.dequantize import Dequantizer
from cag_kernels.cpu.attention.panel import WideTile
from cag_kernels.cpu.attention.ranges import Range, Serve, emit_nothing, emit_panels, float_panels
from cag_kernels.cpu.emit import Value
from cag_kernels.prefixes import Codes


def serve_by_code_panels(call: Call, codes: Codes) -> Serve:
    """Groups of keys must be whole tiles."""
    emit, builder, tile = call.emit, call.emit.builder, call.blocking.tile
    assert codes.group_tokens % tile == 0
    module, head_dim = call.function.module, call.head_dim
    panels = [
        CodePanel(module, head_dim, width, call.blocking, call.has_window, codes).function
        for width in range(1, MAX_CODE_WIDTH + 1)
    ]
    code_tile, number_tile = CodeTile(call, codes), _NumberTile(call, codes)

    def serve(part: Range) -> None:
        emit_nothing(call, part.sums)
        with emit.loop(emit.integer(0), part.count, tile) as begin:
            count = emit.minimum(builder.sub(part.count, begin.index), emit.integer(tile))
            token = builder.add(part.first, begin.index)
            following = builder.add(token, emit.integer(tile))
            ahead = [code_tile.place(side, part.head, following) for side in range(2)]
            is_exact = builder.icmp_signed("<", token, call[Field.NUM_EXACT])
            with emit.when(is_exact):
                number_tile.emit_tile(part.head, token, count)
                pointers = [part.query, number_tile.keys, number_tile.values, *part.sums, *ahead]
                emit_panels(call, number_tile.panels, pointers, count, token)
            with emit.when(builder.not_(is_exact)):
                code_tile.emit_tile(part.head, token, count)
                pointers = [part.query, code_tile.keys, code_tile.values, *part.sums, *ahead]
                pointers += [code_tile.key_parameters, code_tile.value_parameters]
                emit_panels(call, panels, pointers, count, token)

    return serve


class _NumberTile:
    """A tile of codes as numbers, and the panels that meet it."""

    def __init__(self, call: Call, codes: Codes) -> None:
        self._num_tokens = call.blocking.tile
        self._dequantizer = Dequantizer(call, codes)
        self._rows = [self._dequantizer.rows_on_stack(self._num_tokens) for _ in range(2)]
        self._wide = WideTile(call.emit, call.head_dim, call.blocking)
        self.keys, self.values = self._wide.keys, self._wide.values
        self.panels = float_panels(call)

    def emit_tile(self, head: Value, first: Value, count: Value) -> None:
        """Tokens `[first, first + count)` of a head."""
        keys, values = self._rows
        for side, rows in enumerate((keys, values)):
            self._dequantizer.emit_side(side, head, first, count, rows, self._num_tokens)
        self._wide.emit_widened(keys, values, count)
