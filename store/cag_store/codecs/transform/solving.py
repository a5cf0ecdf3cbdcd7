"""Solving a symmetric positive definite system in place, in float32: a basis' products of components are well
conditioned, and numpy's own solver would take four times the memory, in float64.

Source: blocked Cholesky factorization, Golub and Van Loan, "Matrix Computations", 4.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 256


def solve_positive(matrix: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    """Replace `right` `[n, m]` by the solution of `matrix @ x = right`; `matrix` `[n, n]` is destroyed.

    Raises: numpy.linalg.LinAlgError when the matrix is not positive definite.
    """
    spans = [slice(first, min(first + _BLOCK, len(matrix))) for first in range(0, len(matrix), _BLOCK)]
    inverses = [_factored(matrix, span) for span in spans]
    for span, inverse in zip(spans, inverses, strict=True):
        right[span] -= matrix[span, : span.start] @ right[: span.start]
        right[span] = inverse @ right[span]
    for span, inverse in zip(reversed(spans), reversed(inverses), strict=True):
        right[span] -= matrix[span.stop :, span].T @ right[span.stop :]
        right[span] = inverse.T @ right[span]


def _factored(matrix: NDArray[np.float32], span: slice) -> NDArray[np.float32]:
    """One step of the factorization: the factor's columns of `span` below its diagonal block take the place of the
    matrix', and what is left behind them is reduced. Returns the inverse of the diagonal block."""
    factor = np.linalg.cholesky(matrix[span, span].astype(np.float64))
    inverse: NDArray[np.float32] = np.linalg.inv(factor).astype(np.float32)
    below = slice(span.stop, len(matrix))
    matrix[below, span] = matrix[below, span] @ inverse.T
    for first in range(span.stop, len(matrix), _BLOCK):  # the lower triangle, a block of columns at a time
        part = slice(first, min(first + _BLOCK, len(matrix)))
        matrix[first:, part] -= matrix[first:, span] @ matrix[part, span].T
    return inverse
