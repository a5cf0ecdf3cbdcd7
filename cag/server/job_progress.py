"""How far a job is, from what its build tells: tokens that were read, which only grow, their speed and what is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cag.building.options import BuildProgress


class JobProgress:
    """Told each `BuildProgress` of one build. Speed is that of reading, unknown before it; what is left is known while
    it reads."""

    def __init__(self) -> None:
        self._last: BuildProgress | None = None
        self._began: BuildProgress | None = None  # to read
        self._done_tokens = 0
        self._tokens_per_s: float | None = None

    def tell(self, told: BuildProgress) -> None:
        """One more report."""
        if told.stage == "basis":  # whose tokens are not those of the cache
            self._last = replace(told, total_tokens=self._last.total_tokens if self._last else 0)
            return
        self._last = told
        self._done_tokens = max(self._done_tokens, told.done_tokens)  # later stages begin again at the first token
        if told.stage == "prefill":
            self._began = began = self._began or told
            if told.done_tokens > began.done_tokens:
                seconds = max(1e-9, told.elapsed_s - began.elapsed_s)
                self._tokens_per_s = (told.done_tokens - began.done_tokens) / seconds

    @property
    def eta_s(self) -> float | None:
        """Seconds until all tokens are read."""
        last, rate = self._last, self._tokens_per_s
        if last is None or not rate or last.stage != "prefill":
            return None
        return (last.total_tokens - self._done_tokens) / rate

    def to_json(self) -> dict[str, Any] | None:
        """As clients see it; None before the first report."""
        if self._last is None:
            return None
        return {
            "stage": self._last.stage,
            "done_tokens": self._done_tokens,
            "total_tokens": self._last.total_tokens,
            "tokens_per_s": self._tokens_per_s,
            "eta_s": self.eta_s,
        }
