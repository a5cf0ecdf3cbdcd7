"""The bytes of a cache read and nothing else: what a load is measured against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cag_store import Store
from cag_store.backends import SCRATCH_BYTES
from cag_store.pipeline import SPARE_READS
from cag_store.scratch import Scratch


class Reader:
    """Reads files of a store as a load reads them: past the page cache where they are not in it, as many at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._num_threads = store.workers + SPARE_READS
        self._scratch = Scratch(keep=self._num_threads)

    def seconds(self, paths: Sequence[str]) -> float:
        """Seconds that every byte of `paths` takes."""
        backend = self._store.backend
        begin = time.perf_counter()
        sizes = {path: backend.stat(path).size_bytes for path in paths}
        largest = max(sizes.values()) + SCRATCH_BYTES

        def read(path: str) -> None:
            with self._scratch.taken(largest) as buffer:
                backend.read_range(path, 0, sizes[path], buffer)

        with ThreadPoolExecutor(self._num_threads) as pool:
            list(pool.map(read, paths))
        return time.perf_counter() - begin
