"""What more tokens in a step cost, by what runs them: how many drafted ones are worth their time follows from it."""

from __future__ import annotations

from typing import NamedTuple


class StepCost(NamedTuple):
    """What more than one token costs in a step, as shares of a step of one: `several` once, `row` for each more."""

    several: float
    row: float

    def of(self, num_rows: int) -> float:
        """A step of `num_rows` tokens, at least one, in steps of one."""
        return 1 + self.several * (num_rows > 1) + self.row * (num_rows - 1)


SHARED_READING = StepCost(0.0, 0.03)
"""Weights and prefix are read, whatever meets them: measured 0.012 to 0.034 a row by tiles."""

ARITHMETIC = {16: StepCost(0.35, 0.08), 8: StepCost(0.2, 0.2)}
"""In float32, by the numbers in a vector: a single token has code of its own, and more of them multiply for as long as
they read, or longer. Measured with 16: 1.41 for two rows, 1.56 for five, 1.85 for ten and 2.42 for 16; with 8: 1.30,
1.70, 3.0 and 3.7, and 7.5 for 32 (docs/design/013-speculation.md)."""
