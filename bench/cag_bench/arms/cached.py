"""Arms behind a cache: resident on the device, stored bytes in memory, stored bytes on disk.

The engine counts tokens itself; here its counts are checked against a tokenization of our own, so that a restore that
secretly computes again cannot pass for a cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from cag.engine import Engine
from cag.generation.answer import Usage
from cag.generation.generate import SamplingOptions
from cag.prefix import Prefix
from cag.prompt import question_ids
from cag_bench.arms.base import ArmAnswer, BenchArm
from cag_bench.errors import PrefixRecomputed
from cag_bench.reading import Reader
from cag_store import object_paths


class HotArm(BenchArm):
    """The prefix lies decoded on the device before the question comes."""

    def __init__(self, name: str, engine: Engine, cache_name: str) -> None:
        """Open the cache and wait for its last layer. Raises as `Engine.open`."""
        super().__init__(name)
        self._prefix = engine.open(cache_name)
        try:
            self._prefix.resident.wait()
        except BaseException:
            self._prefix.close()
            raise

    def ask(self, question: str, options: SamplingOptions) -> ArmAnswer:
        """See `BenchArm`. Raises: `PrefixRecomputed`."""
        answer = self._prefix.ask(question, options)
        check_usage(self.name, answer.usage, *expected_tokens(self._prefix, question))
        return ArmAnswer(answer)

    def close(self) -> None:
        """Give the prefix back."""
        self._prefix.close()


class StoredArm(BenchArm):
    """Each question opens the cache anew: the stored bytes are read, verified and decoded inside the clock.

    With `from_disk` the page cache of the cache's files is dropped before, and behind the clock they are read once more
    by themselves; otherwise they are read once before, so that they lie in memory.
    """

    def __init__(self, name: str, engine: Engine, cache_name: str, *, from_disk: bool) -> None:
        super().__init__(name)
        self._engine = engine
        self._cache_name = cache_name
        self._from_disk = from_disk
        self._reader = Reader(engine.store)

    def ask(self, question: str, options: SamplingOptions) -> ArmAnswer:
        """See `BenchArm`. Raises: `PrefixRecomputed`, and as `Engine.open`."""
        paths = list(object_paths(self._engine.find(self._cache_name)[1]))
        dropped = self._drop() if self._from_disk else None
        if not self._from_disk:
            self._read_files(paths)
        started_at = time.perf_counter()
        with self._engine.open(self._cache_name, share=False) as prefix:
            answer = prefix.ask(question, options, started_at=started_at)
            check_usage(self.name, answer.usage, *expected_tokens(prefix, question))
        read_s = self._reader.seconds(paths) if self._from_disk and self._drop() else None
        return ArmAnswer(answer, page_cache_dropped=dropped, read_s=read_s)

    def _drop(self) -> bool:
        return self._engine.store.drop_page_cache(self._cache_name)

    def _read_files(self, paths: Sequence[str]) -> None:
        backend = self._engine.store.backend
        for path in paths:
            backend.get_range(path, 0, backend.stat(path).size_bytes)


def expected_tokens(prefix: Prefix, question: str) -> tuple[int, int]:
    """Tokens of the prefix and of the question, counted without the engine's answer."""
    suffix = question_ids(prefix.model.tokenizer, prefix.template, question)
    return prefix.manifest.num_tokens, len(suffix)


def check_usage(arm: str, usage: Usage, prefix_tokens: int, question_tokens: int) -> None:
    """Raises: `PrefixRecomputed` unless exactly the prefix was served from the cache and the question computed."""
    expected = (prefix_tokens + question_tokens, prefix_tokens, question_tokens)
    found = (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens)
    if found != expected:
        raise PrefixRecomputed(
            f"{arm}: expected {expected[0]} prompt tokens, {expected[1]} of them cached and {expected[2]} computed; "
            f"found {found[0]}, {found[1]} and {found[2]}.",
            hint="The run was stopped: its times would not be those of a cache.",
            arm=arm,
            expected=expected,
            found=found,
        )
