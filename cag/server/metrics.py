"""Counters, gauges and histograms, and their text in the Prometheus exposition format 0.0.4.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator

from cag.errors import error_row
from cag.generation.answer import Answer
from cag.server.errors import METHODS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ANSWERS = (1, 2, 4, 8, 16, 32, 64)


class Counter:
    """A sum that only grows, one for each combination of label values."""

    kind = "counter"

    def __init__(self, name: str, text: str, *labels: str) -> None:
        self.name, self.text, self._labels = name, text, labels
        self._sums: dict[tuple[str, ...], float] = {} if labels else {(): 0}
        self._lock = threading.Lock()

    def add(self, amount: float, *values: str) -> None:
        """Add to the sum of these label values."""
        with self._lock:
            self._sums[values] = self._sums.get(values, 0) + amount

    def samples(self) -> Iterator[str]:
        """Lines of the exposition."""
        with self._lock:
            sums = sorted(self._sums.items())
        for values, total in sums:
            pairs = ",".join(f'{label}="{value}"' for label, value in zip(self._labels, values, strict=True))
            yield f"{self.name}{{{pairs}}} {total:.17g}" if pairs else f"{self.name} {total:.17g}"


class Reading:
    """A value that is read when somebody asks; of kind `counter` if it only grows."""

    def __init__(self, kind: str, name: str, text: str, read: Callable[[], float]) -> None:
        self.kind, self.name, self.text, self._read = kind, name, text, read

    def samples(self) -> Iterator[str]:
        """The line of the exposition."""
        yield f"{self.name} {self._read():.17g}"


class Histogram:
    """Counts of observations up to each bound."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: tuple[float, ...] = SECONDS) -> None:
        self.name, self.text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Count one observation."""
        with self._lock:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def samples(self) -> Iterator[str]:
        """Lines of the exposition; the buckets are cumulative."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        running = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), counts, strict=True):
            running += count
            yield f'{self.name}_bucket{{le="{bound}"}} {running}'
        yield f"{self.name}_sum {total:.9g}"
        yield f"{self.name}_count {running}"


class ServerMetrics:
    """What a server counts."""

    def __init__(self) -> None:
        self.requests = Counter("cag_http_requests_total", "HTTP responses.", "method", "route", "status")
        self.answers = Counter("cag_answers_total", "Answers by how they ended.", "outcome")
        self.prompt_tokens = Counter("cag_prompt_tokens_total", "Prompt tokens by where they came from.", "source")
        self.completion_tokens = Counter("cag_completion_tokens_total", "Tokens generated for whole answers.")
        self.reasoning_tokens = Counter("cag_reasoning_tokens_total", "Of these, thoughts before the answer itself.")
        self.drafted_tokens = Counter("cag_drafted_tokens_total", "Guessed tokens that were run.", "outcome")
        self.waited = Histogram("cag_queue_wait_seconds", "From a request to its slot.")
        self.first_token = Histogram("cag_time_to_first_token_seconds", "From the slot to the first token.")
        self.batch_size = Histogram("cag_step_answers", "Answers that shared a step of the model.", ANSWERS)
        self._all: list[Counter | Reading | Histogram] = [
            self.requests,
            self.answers,
            self.prompt_tokens,
            self.completion_tokens,
            self.reasoning_tokens,
            self.drafted_tokens,
            self.waited,
            self.first_token,
            self.batch_size,
        ]

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show `read()` under `name`."""
        self._all.append(Reading("gauge", name, text, read))

    def total(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show `read()`, which only grows, under `name`."""
        self._all.append(Reading("counter", name, text, read))

    def count_request(self, method: str, route: str, status: int) -> None:
        """Count one response."""
        self.requests.add(1, method if method in METHODS else "other", route, str(status))

    def count_answer(self, answer: Answer) -> None:
        """Count one whole answer."""
        self.answers.add(1, "answered")
        self.prompt_tokens.add(answer.usage.cached_tokens, "cached")
        self.prompt_tokens.add(answer.usage.computed_tokens, "computed")
        self.completion_tokens.add(answer.usage.completion_tokens)
        self.reasoning_tokens.add(answer.usage.reasoning_tokens)
        self.drafted_tokens.add(answer.usage.accepted_tokens, "accepted")
        self.drafted_tokens.add(answer.usage.drafted_tokens - answer.usage.accepted_tokens, "rejected")
        self.first_token.observe(answer.timings.ttft_s)

    def count_error(self, error: Exception) -> None:
        """Count an answer that there is not: "refused" where the request or its moment was wrong."""
        self.answers.add(1, "failed" if error_row(error).http_status >= 500 else "refused")

    def render(self) -> str:
        """The whole exposition."""
        lines: list[str] = []
        for metric in self._all:
            lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.samples()]
        return "\n".join(lines) + "\n"
