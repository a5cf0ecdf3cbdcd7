"""The bytes of a cache read and nothing else: what a load is measured against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cag_store import Store
from cag_store.backends import SCRATCH_BYTES
from cag_store.codecs.jobs import READ_BYTES
from cag_store.pipeline import SPARE_READERS
from cag_store.scratch import Scratch


class Reader:
    """Reads files of a store as a load reads them: past the page cache where they are not in it, as many at once, in
    pieces as large or each whole. Whole files end at different times, which leaves the disk with less to do."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._num_threads = store.workers + SPARE_READERS
        self._scratch = Scratch(keep=self._num_threads)

    def seconds(self, paths: Sequence[str], piece_bytes: int | None = READ_BYTES) -> float:
        """Seconds that every byte of `paths` takes; None: each file is a piece."""
        backend = self._store.backend
        begin = time.perf_counter()
        sizes = [(path, backend.stat(path).size_bytes) for path in paths]
        most = piece_bytes or max(size for _, size in sizes)
        pieces = [(path, at, min(most, size - at)) for path, size in sizes for at in range(0, size, most)]

        def read(piece: tuple[str, int, int]) -> None:
            with self._scratch.taken(most + SCRATCH_BYTES) as memory:
                backend.read_range(*piece, memory)

        with ThreadPoolExecutor(self._num_threads) as pool:
            list(pool.map(read, pieces))
        return time.perf_counter() - begin
