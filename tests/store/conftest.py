from typing import Any

import numpy as np
import pytest

from cag_store import (
    ROOT,
    ChunkContext,
    ChunkEntry,
    ChunkHeader,
    DocumentEntry,
    KVGeometry,
    Manifest,
    ModelIdentity,
    Store,
    chunk_key,
    codec_from_config,
)
from cag_store.testing import sample_array

HEADS, DIMS = (2, 1, 2), (8, 16, 4)


class SmallCache:
    """A cache of three layers of different shapes: arrays of a seed, cut into chunks of `chunk_tokens`. With one of
    `sides` they have keys that are values as well."""

    def __init__(
        self,
        codec: Any = "lossless",
        num_tokens: int = 20,
        chunk_tokens: int = 8,
        dtype: str = "bfloat16",
        seed: int = 0,
        sides: int = 2,
    ):
        self.codec = codec_from_config(codec)
        self.num_tokens, self.chunk_tokens, self.dtype = num_tokens, chunk_tokens, dtype
        self.token_ids = np.random.default_rng(seed).integers(0, 50_000, num_tokens)
        self.layers = [
            tuple(sample_array((heads, num_tokens, dim), dtype, 10 * seed + 2 * layer + side) for side in range(sides))
            for layer, (heads, dim) in enumerate(zip(HEADS, DIMS, strict=True))
        ]
        self.kv = KVGeometry(HEADS, DIMS, dtype, "float32", {"theta": 10000.0}, chunk_tokens, sides)
        self.model = ModelIdentity("tiny", "model-fp", "tokenizer-fp", "template-fp")
        self.texts = [b"the first text", b"the second text, of course longer"]
        config = self.codec.config()
        self.context = ChunkContext("model-fp", self.kv.rope, dtype, "float32", config, chunk_tokens, sides=sides)

    def header(self, parent: str, start: int) -> ChunkHeader:
        ids = self.ids(start)
        return ChunkHeader(chunk_key(parent, ids, self.context), parent, start, len(ids), HEADS, DIMS, self.context)

    def ids(self, start: int) -> np.ndarray:
        return self.token_ids[start : start + self.chunk_tokens]

    def arrays(self, start: int) -> list[tuple[np.ndarray, ...]]:
        end = start + self.chunk_tokens
        return [tuple(side[:, start:end] for side in layer) for layer in self.layers]

    def put_chunks(self, store: Store) -> list[ChunkEntry]:
        entries, parent = [], ROOT
        for start in range(0, self.num_tokens, self.chunk_tokens):
            header = self.header(parent, start)
            entries.append(store.put_chunk(header, self.arrays(start), self.ids(start)))
            parent = header.key
        return entries

    def put(self, store: Store, **changes: Any) -> Manifest:
        entries = self.put_chunks(store)
        shas = [store.put_blob(text) for text in self.texts]
        half = self.num_tokens // 2
        spans = [(1, half), (half, self.num_tokens - 1)]
        documents = tuple(
            DocumentEntry(f"d{i}", f"Titel {i} \u2013 \u00e9", f"a/{i}.md", sha, *spans[i])
            for i, sha in enumerate(shas)
        )
        fields = {
            "layout": {"marker": 1},
            "blob_bytes": store.blob_bytes([*shas, *self.codec.resource_digests()]),
            "created_at": "2026-01-02T03:04:05Z",
            **changes,
        }
        return Manifest(self.model, self.kv, self.codec.config(), tuple(entries), documents, **fields)

    def build(self, store: Store, name: str = "small", **changes: Any) -> Manifest:
        with store.build_lease():
            manifest = self.put(store, **changes)
            store.commit(name, manifest)
        return manifest

    def buffers(self, spare: int = 3) -> list[tuple[np.ndarray, ...]]:
        return [
            tuple(np.zeros((side.shape[0], side.shape[1] + spare, side.shape[2]), side.dtype) for side in pair)
            for pair in self.layers
        ]

    def check(self, buffers: Any) -> None:
        for layer, outs in zip(self.layers, buffers, strict=True):
            for side, out in zip(layer, outs, strict=True):
                assert np.array_equal(side, out[:, : self.num_tokens])


@pytest.fixture(scope="session")
def small_class() -> type[SmallCache]:
    return SmallCache


@pytest.fixture
def small(small_class) -> type[SmallCache]:
    return small_class


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "store")
