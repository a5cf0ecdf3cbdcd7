"""Codecs tried on the cache that is being built, with one copy of it in memory.

A trial stores the cache's chunks in its codec, decodes them into the very buffers that hold the exact values, and runs
the probes: what is measured is what a reader will get. The exact values come back from the lossless chunks that
prefilling has stored. Chunks of a codec that was not chosen are referred to by nothing; `gc` frees them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cag.building.chunks import PrefixChunks
from cag.building.fidelity import FidelityProbe, same_bits
from cag.building.key_errors import key_errors, most_hurt
from cag.building.ladder import Trial
from cag.building.probes import Branch
from cag.machine.allocator import return_free_memory
from cag_store import ROOT, ChunkContext, ChunkEntry, codec_from_config, config_resources
from cag_store.errors import CorruptEntry, UnencodableArray

_WIDE_LAYERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
Report = Callable[[str, int], None]
"""`report(stage, done_tokens)`."""


class CodecTrials:
    """Tries codecs on `chunks`, which hold the exact values, stored too as `exact`. A context manager.

    Attributes:
        exact_s: seconds of the probes behind the exact values.
    """

    def __init__(
        self,
        chunks: PrefixChunks,
        exact: Sequence[ChunkEntry],
        exact_context: ChunkContext,
        branches: Sequence[Branch],
        besides_bytes: int,
        max_kl: float | None,
        report: Report,
    ) -> None:
        self._chunks = chunks
        self._exact = exact
        self._exact_context = exact_context
        self._branches = branches
        self._besides_bytes = besides_bytes
        self._max_kl = max_kl
        self._report = report
        self._holds_exact = True
        self._probe: FidelityProbe | None = None
        self.exact_s = 0.0

    def __enter__(self) -> CodecTrials:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._probe is not None:
            self._probe.close()

    def lossless(self) -> Trial:
        """The cache in the exact chunks, which are written already: read back, they must give the same bits.

        Call it before others are tried. Raises: CorruptEntry when they do not.
        """
        begin = time.perf_counter()
        self._report("measure", self._chunks.num_tokens)
        computed = self._chunks.checksum()
        self._chunks.load(self._exact, self._exact_context)
        found = self._chunks.checksum()
        if found != computed:
            raise CorruptEntry(
                "the store gives back other keys and values than were computed: memory or disk are unsound",
                where="exact chunks",
                expected=computed,
                found=found,
            )
        size = self._besides_bytes + sum(entry.stored_bytes for entry in self._exact)
        fidelity, seconds = same_bits(self._branches), time.perf_counter() - begin
        codec = dict(self._exact_context.codec)
        return Trial(codec, size, 0, fidelity, "within", tuple(self._exact), measure_s=seconds)

    def __call__(self, codec: dict[str, Any], limit_bytes: int | None = None) -> Trial:
        """Try `codec`; see `cag.building.ladder.TryCodec`. Raises: UnknownCodec, UnencodableArray, StoreError."""
        config = codec_from_config(codec).config()
        try:
            return self._tried(config, limit_bytes)
        finally:
            self._forget(config)

    def finer(self, codec: dict[str, Any]) -> list[dict[str, Any]]:
        """`int4` with the keys of more and more layers in 8 bits: those first whose keys it hurts most. See
        `cag.building.ladder.Refine`."""
        self._restore()
        chunks, config = self._chunks, codec_from_config(codec).config()
        errors = key_errors(chunks.model, chunks.resident, self._branches, partial(chunks.decoded_keys, config))
        counts = [count for count in _WIDE_LAYERS if count < len(errors)] + [len(errors)]
        return [{**config, "wide_key_layers": most_hurt(errors, count)} for count in counts]

    def _tried(self, config: dict[str, Any], limit_bytes: int | None) -> Trial:
        context = self._chunks.context(config)
        basis_bytes = self._chunks.store.blob_bytes(config_resources(config))
        self._restore()
        begin = time.perf_counter()
        try:
            entries, size = self._encoded(context, self._besides_bytes + basis_bytes, limit_bytes)
        except UnencodableArray:
            if limit_bytes is None:
                raise
            return Trial(config, None, basis_bytes, None, "refused", encode_s=time.perf_counter() - begin)
        encode_s = time.perf_counter() - begin
        self._forget(config)  # decoding prepares other things than encoding
        if limit_bytes is not None and size >= limit_bytes:
            return Trial(config, None, basis_bytes, None, "larger", encode_s=encode_s)
        probe = self._exact_probe()
        begin = time.perf_counter()
        self._holds_exact = False
        self._chunks.load(entries, context)
        self._forget(config)  # measuring needs memory of its own
        fidelity = probe.measure()
        outcome = "within" if self._max_kl is None or fidelity.mean_kl <= self._max_kl else "over"
        return Trial(
            config, size, basis_bytes, fidelity, outcome, tuple(entries), encode_s, time.perf_counter() - begin
        )

    def _forget(self, config: dict[str, Any]) -> None:
        """Free what the codec has prepared, which may be larger than a chunk."""
        self._chunks.store.forget_codec(config)
        return_free_memory()

    def _exact_probe(self) -> FidelityProbe:
        """The probes behind the exact values, which the buffers hold the first time."""
        self._report("measure", self._chunks.num_tokens)
        if self._probe is None:
            assert self._holds_exact
            begin = time.perf_counter()
            self._probe = FidelityProbe(self._chunks.model, self._chunks.resident, self._branches)
            self.exact_s = time.perf_counter() - begin
        return self._probe

    def _encoded(self, context: ChunkContext, size: int, limit_bytes: int | None) -> tuple[list[ChunkEntry], int]:
        """The chunks in another codec, and the size of the cache; not all of them when it reaches the limit."""
        entries: list[ChunkEntry] = []
        for start in range(0, self._chunks.num_tokens, context.chunk_tokens):
            if limit_bytes is not None and size >= limit_bytes:
                break
            self._report("encode", start)
            entries.append(self._chunks.put(context, entries[-1].key if entries else ROOT, start))
            size += entries[-1].stored_bytes
        return entries, size

    def _restore(self) -> None:
        if not self._holds_exact:
            self._chunks.load(self._exact, self._exact_context)
            self._holds_exact = True
