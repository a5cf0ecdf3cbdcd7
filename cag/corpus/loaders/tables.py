"""Tables of rows of cells as Markdown, which knows no cell that spans others: its text is repeated in each place.

So each value stands below all of its headings and beside all of its rows, and a row can be read by itself. Two things
are left out: columns in which no cell begins, as they repeat the column before, and all but the first place of a cell
that has a row to itself, as it is a title of the rows below and the value of no column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What repeated and blank cells may add to a table, in characters: a part of its own, and something for small ones.
_MAX_GROWTH = 8
_ALWAYS_ALLOWED = 1 << 18
_PLACE_CHARACTERS = 3  # " | "


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell over `num_columns` columns of `num_rows` rows, both at least 1; rows behind the last do not count."""

    text: str
    num_columns: int = 1
    num_rows: int = 1


def table(rows: Iterable[Sequence[Cell]]) -> str:
    """A table with one line a row, the first row as its head, blank rows left out; "" when all are.

    Cells are put on one line each. A table that would grow beyond measure is written as if no cell spanned others.
    """
    lines = [line for line in _lines(list(rows)) if any(line)]
    if not lines:
        return ""
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _lines(rows: list[Sequence[Cell]]) -> list[list[str]]:
    plain = [[" ".join(cell.text.split()) for cell in row] for row in rows]
    allowed = _ALWAYS_ALLOWED + _MAX_GROWTH * sum(len(text) + _PLACE_CHARACTERS for line in plain for text in line)
    if _spread_characters(rows) > allowed:
        return plain
    grid, columns = _grid(rows)
    if len(columns) * len(rows) * _PLACE_CHARACTERS > allowed:
        return plain
    return [_line([places.get(column) for column in columns]) for places, row in zip(grid, rows, strict=True) if row]


def _spread_characters(rows: list[Sequence[Cell]]) -> int:
    return sum(
        (len(cell.text) + _PLACE_CHARACTERS) * cell.num_columns * min(cell.num_rows, len(rows) - index)
        for index, row in enumerate(rows)
        for cell in row
    )


def _grid(rows: list[Sequence[Cell]]) -> tuple[list[dict[int, Cell]], list[int]]:
    """(for each row the cell in each column, the columns in which cells begin)."""
    grid: list[dict[int, Cell]] = [{} for _ in rows]
    columns = set()
    for index, row in enumerate(rows):
        column = 0
        for cell in row:
            while column in grid[index]:
                column += 1
            columns.add(column)
            for places in grid[index : index + cell.num_rows]:
                places.update(dict.fromkeys(range(column, column + cell.num_columns), cell))
            column += cell.num_columns
    return grid, sorted(columns)


def _line(cells: list[Cell | None]) -> list[str]:
    texts = [" ".join(cell.text.split()) if cell else "" for cell in cells]
    is_title = all(cell is cells[0] for cell in cells)
    return texts[:1] + [""] * (len(texts) - 1) if is_title else texts
