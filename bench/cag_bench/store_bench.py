"""`cag bench store`: how fast codecs encode and decode, and what a load takes against its reading and its decoding.

A loaded engine, a corpus and codecs in; a row a codec, a table and a plot out. One prefill gives the keys and values of
all. From memory to memory codecs are called as the store calls them, without its files; loads go through the store's
reader, with the files in the page cache and with them dropped from it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cag.building.chunks import PrefixChunks
from cag.engine import Engine
from cag.errors import UsageError
from cag.residency.buffers import HostBuffers, storage_view
from cag_bench.codec_list import codec_label, parse_codecs
from cag_bench.cores import can_pin, on_cores
from cag_bench.corpus import BenchCorpus
from cag_bench.errors import WrongValues
from cag_bench.figures import paired_ratio, percentiles
from cag_bench.kept_codes import Encoded, KeptCodes
from cag_bench.plot import plot_store, require_matplotlib
from cag_bench.provenance import commit, load_average, machine_facts, versions
from cag_bench.quality import ready_codecs, warm_up
from cag_bench.quality_corpus import cut_corpus
from cag_bench.reading import Reader
from cag_bench.rows import STORE_PLOT, SUMMARY, TABLE, ResultRows, write_json
from cag_bench.store_table import markdown, notes
from cag_store import ROOT, ChunkContext, ChunkEntry, Codec, Store
from cag_store.codecs import CodedSide, EncodedSegment, Side, layer_groups
from cag_store.paths import chunk_path

CODECS = ("lossless", "int8", "int4", "transform@-580", "transform@-515", "transform@-445")
ENCODE_SAMPLES = 3  # at most: encoding takes seconds, and its time is compared with that of a prefill
SIDES: tuple[Side, Side] = ("keys", "values")
Progress = Callable[[str, int, int], None]
Buffers = list[tuple[NDArray[Any], ...]]


@dataclass(frozen=True)
class StoreOptions:
    """codecs: as `parse_codecs` gives them. cores: on how many the codecs are timed. num_samples: of each timing."""

    codecs: Sequence[dict[str, Any]] = tuple(parse_codecs(CODECS))
    num_tokens: int = 6144
    cores: Sequence[int] = (1, 2)
    num_samples: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.cores or min(self.num_tokens, self.num_samples, *self.cores) < 1:
            raise UsageError("tokens, samples and cores must be at least 1.")


def run_store(
    engine: Engine, corpus: BenchCorpus, options: StoreOptions, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Measure every codec and write the files; the object that `--json` prints. Raises: UsageError; StoreError."""
    require_matplotlib()
    origin = {"machine": machine_facts(engine.model), "commit": commit(), "versions": versions()}
    rows: list[dict[str, Any]] = []
    with ResultRows(directory, origin) as results, engine.store.build_lease():
        progress("prepare codecs", 0, 0)
        codecs, _ = ready_codecs(engine, options.codecs, progress)
        warm_up(engine)
        cut = cut_corpus(engine.model, corpus.documents, min(options.num_tokens, engine.model.window_tokens))
        ids = cut.layout.token_ids
        chunks = PrefixChunks(engine.model, engine.store, ids, engine.model.new_state(capacity=len(ids)))
        progress("prefill", 0, 0)
        prefill_s = _seconds(lambda: chunks.compute(lambda _: None))
        for number, codec in enumerate(codecs):
            progress("measure, codecs", number, len(codecs))
            row = TimedCodec(chunks, codec, options).row()
            row["encode_over_prefill"] = row["encode"][str(max(options.cores))]["p50"] / prefill_s
            results.write_row("store", row)
            rows.append(row)
        facts: dict[str, Any] = {"model": engine.model.model_id, "model_fingerprint": engine.model.fingerprints.weights}
        facts |= {"corpus": corpus.cut_to(cut.documents).facts(), "num_tokens": len(ids), "prefill_s": prefill_s}
        facts |= {"load_average": load_average(), "cores_bound": can_pin()}
        facts["options"] = {"num_samples": options.num_samples, "seed": options.seed}
        results.write_run(facts)
    summary = origin | facts | {"rows": rows, "notes": notes(rows, can_pin())}
    write_json(directory / SUMMARY, summary)
    (directory / TABLE).write_text(markdown(summary), encoding="utf-8")
    plot_store(rows, f"{engine.model.model_id}, {len(ids)} tokens", directory / STORE_PLOT)
    return summary


class TimedCodec:
    """One codec over the keys and values that `chunks` holds."""

    def __init__(self, chunks: PrefixChunks, codec: dict[str, Any], options: StoreOptions) -> None:
        self._chunks, self._options, self._config = chunks, options, codec
        self._store: Store = chunks.store
        self._context: ChunkContext = chunks.context(codec)
        tail = chunks.state.tail
        self._sides, pairs = self._context.sides, zip(tail.keys, tail.values, strict=True)
        self._arrays: Buffers = [tuple(map(storage_view, pair[: self._sides])) for pair in pairs]
        sizes = [(keys.shape[0], keys.shape[1], keys.shape[2]) for keys, *_ in self._arrays]
        # as the engine's, in huge pages
        memory = HostBuffers.of(sizes, tail.keys[0].dtype, torch.device("cpu"), sides=self._sides)
        self._buffers: Buffers = memory.views()
        self._reader = Reader(self._store)

    def row(self) -> dict[str, Any]:
        """All figures of the codec."""
        codec, options = self._store.codec(self._config), self._options
        encoded = self._encoded(codec, 1)  # compiles and prepares too
        raw_bytes = sum(array.nbytes for pair in self._arrays for array in pair)
        segments = self._segments(encoded)
        self._decode(codec, segments, 1)
        relative_error = self._relative_error()
        encode, decode = {}, {}
        for cores in options.cores:
            with on_cores(cores):
                encode[cores] = self._timed(partial(self._encoded, codec, cores), ENCODE_SAMPLES)
                decode[cores] = self._timed(partial(self._decode, codec, segments, cores))
        most = max(options.cores)
        loads = self._loads(codec, encoded, partial(self._decode, codec, segments, most))
        return {
            "codec": self._config,
            "label": codec_label(self._config),
            "raw_bytes": raw_bytes,
            "encoded_bytes": sum(len(data) for data in encoded.values()),
            "relative_error": relative_error,
            "encode": {str(cores): _figures(samples, raw_bytes) for cores, samples in encode.items()},
            "decode": {str(cores): _figures(samples, raw_bytes) for cores, samples in decode.items()},
            "load_average": load_average(),
            **loads,
        }

    def _relative_error(self) -> float:
        """Length of what decoding gets wrong over the length of the keys and values, all layers."""
        dtype = self._chunks.state.tail.keys[0].dtype
        wrong = whole = 0.0
        for pairs in zip(self._arrays, self._buffers, strict=True):
            for exact, decoded in zip(*pairs, strict=True):
                numbers = torch.from_numpy(exact).view(dtype).float()
                wrong += float((torch.from_numpy(decoded).view(dtype).float() - numbers).square().sum())
                whole += float(numbers.square().sum())
        return math.sqrt(wrong / whole) if whole else 0.0

    def _timed(self, work: Callable[[], object], most: int | None = None) -> list[float]:
        return [_seconds(work) for _ in range(min(self._options.num_samples, most or self._options.num_samples))]

    def _spans(self) -> Iterator[tuple[int, int]]:
        size, total = self._context.chunk_tokens, self._chunks.num_tokens
        return ((start, min(start + size, total)) for start in range(0, total, size))

    def _encoded(self, codec: Codec, num_threads: int) -> dict[tuple[int, int, int], bytes]:
        """Segments by first token, first layer and side."""

        def encode(start: int, end: int, first: int, last: int, side: int) -> bytes:
            arrays = [self._arrays[layer][side][:, start:end] for layer in range(first, last)]
            return codec.encode_layers(arrays, self._context.dtype, SIDES[side], first, start)

        groups = layer_groups(len(self._arrays), codec.joint_layers)
        places = [(*span, *group, side) for span in self._spans() for group in groups for side in range(self._sides)]
        with ThreadPoolExecutor(num_threads) as pool:
            found = pool.map(lambda place: encode(*place), places)
            return {(place[0], place[2], place[4]): data for place, data in zip(places, found, strict=True)}

    def _segments(self, encoded: dict[tuple[int, int, int], bytes]) -> list[list[EncodedSegment]]:
        """Of each chunk, with where they are decoded to."""
        joint = self._store.codec(self._config).joint_layers
        return [
            [
                EncodedSegment(memoryview(data), self._outs(start, end, first, joint, side), SIDES[side], first, start)
                for (at, first, side), data in encoded.items()
                if at == start
            ]
            for start, end in self._spans()
        ]

    def _outs(self, start: int, end: int, first: int, joint: int, side: int) -> tuple[NDArray[Any], ...]:
        return tuple(pair[side][:, start:end] for pair in self._buffers[first : first + joint])

    def _decode(self, codec: Codec, segments: list[list[EncodedSegment]], num_threads: int) -> None:
        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(codec.decode_segments, segments):
                pass

    def _loads(self, codec: Codec, encoded: Encoded, decode: Callable[[], None]) -> dict[str, Any]:
        """Loads through the store, reading alone and decoding alone, in an order drawn for each sample; and, where the
        engine keeps codes, loads that keep them, and keeping alone."""
        entries: list[ChunkEntry] = []
        for start, _ in self._spans():
            entries.append(self._chunks.put(self._context, entries[-1].key if entries else ROOT, start))
        self._store.forget_codec(self._config)
        decode()
        expected: Buffers = [tuple(side.copy() for side in sides) for sides in self._buffers]
        first_s = _seconds(partial(self._load, entries))
        self._check(expected)
        kept = self._kept_codes(codec, encoded, entries)
        dropped: list[bool] = []
        clocks = self._clocks(entries, decode, kept, dropped)
        taken: dict[str, list[float]] = {name: [] for name in clocks}
        order = random.Random(self._options.seed)
        for _ in range(self._options.num_samples):
            for name in order.sample(list(clocks), len(clocks)):
                taken[name].append(clocks[name]())
        ratios = {}
        for name, read in (("longer", "read_cold"), ("longer_of_files", "read_files_cold")):
            ratios[f"cold_over_{name}"] = self._over_longer(taken, "load_cold", read, "decode")
            if kept is not None:
                ratios[f"codes_over_{name}"] = self._over_longer(taken, "load_cold_codes", read, "keep")
        return {
            "stored_bytes": sum(entry.stored_bytes for entry in entries),
            "page_cache_dropped": all(dropped),
            "first_load_s": first_s,
            "seconds": {name: {**(percentiles(v) or {}), "samples": v} for name, v in taken.items()},
            **ratios,
        }

    def _clocks(
        self, entries: Sequence[ChunkEntry], decode: Callable[[], None], kept: KeptCodes | None, dropped: list[bool]
    ) -> dict[str, Callable[[], float]]:
        """What is timed, each to be called for its seconds. `dropped` gets whether pages were, before each cold one."""
        paths = [chunk_path(entry.key) for entry in entries]
        load = partial(_seconds, partial(self._load, entries))

        def cold(clock: Callable[[], float]) -> float:
            dropped.append(self._dropped(paths))
            return clock()

        def warm() -> float:
            self._bring_into_memory(paths)  # a cold load leaves nothing in the page cache
            return load()

        found: dict[str, Callable[[], float]] = {
            "read_cold": partial(cold, partial(self._reader.seconds, paths)),
            "read_files_cold": partial(cold, partial(self._reader.seconds, paths, None)),
            "load_cold": partial(cold, load),
            "load_warm": warm,
            "decode": partial(_seconds, decode),
        }
        if kept is not None:
            found["load_cold_codes"] = partial(cold, partial(_seconds, partial(self._load, entries, kept.buffers)))
            found["keep"] = partial(_seconds, partial(kept.keep, max(self._options.cores)))
        return found

    def _over_longer(self, taken: dict[str, list[float]], load: str, read: str, work: str) -> dict[str, object] | None:
        """A load over the longer of `read` and `work`, sample by sample."""
        longer = [max(pair) for pair in zip(taken[read], taken[work], strict=True)]
        return paired_ratio(list(zip(taken[load], longer, strict=True)))

    def _kept_codes(self, codec: Codec, encoded: Encoded, entries: Sequence[ChunkEntry]) -> KeptCodes | None:
        """None where the engine keeps no codes: of other codecs, and of other types than bfloat16. Raises:
        `WrongValues` unless the store gives back what is kept from memory."""
        with self._store.chunk_reader(entries, self._context) as reader:
            shapes = reader.coded_shapes()
        if shapes is None or self._context.dtype != "bfloat16":
            return None
        kept = KeptCodes(codec, shapes, encoded, self._context.chunk_tokens)
        kept.keep(max(self._options.cores))
        expected = kept.copies()
        self._load(entries, kept.buffers)
        if not all(map(np.array_equal, expected, kept.copies())):
            label = codec_label(self._config)
            raise WrongValues(f"{label}: the store gave back other codes than were kept from memory.", codec=label)
        return kept

    def _dropped(self, paths: Sequence[str]) -> bool:
        dropped = [self._store.backend.drop_page_cache(path) for path in paths]  # of all, whatever the first says
        return all(dropped)

    def _load(self, entries: Sequence[ChunkEntry], codes: Sequence[tuple[CodedSide, CodedSide]] | None = None) -> None:
        with self._store.chunk_reader(entries, self._context) as reader:
            reader.load(codes or self._buffers, first_layer_soon=False)  # nobody waits for it

    def _check(self, expected: Buffers) -> None:
        """Raises: `WrongValues` unless the store gave back what was decoded from memory."""
        for layer, pairs in enumerate(zip(expected, self._buffers, strict=True)):
            if not all(np.array_equal(*sides) for sides in zip(*pairs, strict=True)):
                label = codec_label(self._config)
                raise WrongValues(
                    f"{label}: the store gave back other numbers of layer {layer} than were decoded from memory.",
                    hint="The run was stopped: its times would not be those of a cache.",
                    codec=label,
                    layer=layer,
                )

    def _bring_into_memory(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._store.backend.get_range(path, 0, self._store.backend.stat(path).size_bytes)


def _figures(samples: list[float], raw_bytes: int) -> dict[str, Any]:
    found = percentiles(samples) or {}
    return {**found, "raw_gb_per_s": raw_bytes / found["p50"] / 1e9, "samples": samples}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
