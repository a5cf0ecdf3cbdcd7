"""100,000 hostile inputs: a typed error or the right answer, within bounds of memory and processor time."""

import hashlib
import os
import random

import numpy as np
import pytest

from cag_store import Store, codec_ids
from cag_store.codecs import warm_up
from cag_store.dtypes import STORAGE_DTYPES
from cag_store.testing import sample_array
from cag_store.testing.bases import sample_basis
from fuzzing import (
    ALLOWED_OF_STORES,
    Target,
    basis_target,
    damaged_store,
    limits,
    parser_targets,
    run,
    segment_target,
    store_target,
)
from torture import in_child, outcome

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def transform(basis, joint_layers):
    """The configuration of the codec with this basis."""
    digest = hashlib.sha256(basis).hexdigest()
    return {"id": "transform", "basis": digest, "joint_layers": joint_layers, "step": -256}


BASIS = sample_basis((2, 1, 2), (8, 16, 4), 2).to_bytes()  # the geometry of `small_class`
BASIS_OF_A_SEGMENT = sample_basis((2,), (4,), 1, pairing="adjacent").to_bytes()
WITHOUT_BASIS = [codec for codec in codec_ids() if codec != "transform"]
CONFIGURATIONS = [
    *WITHOUT_BASIS,
    transform(BASIS_OF_A_SEGMENT, 1),
    {"id": "lossless", "packers": []},
    {"id": "int8", "packer": {"id": "zstd"}, "group_tokens": 3},
    {"id": "int4", "packer": {"id": "zstd"}, "group_tokens": 3, "recent_tokens": 2},
]
FAST, SLOW = 1, 50  # 2,000 inputs in the fast suite, 100,000 in the slow one


def whole_store(small_class, codec):
    """A store, and what reading it must give: the right arrays, as many as the manifest says there are."""
    cache = small_class(codec, num_tokens=12, chunk_tokens=5)
    expected = cache.buffers()
    store = Store.in_memory(workers=1)
    if cache.codec.resource_digests():
        store.put_blob(BASIS)
    with store.reader(cache.build(store)) as reader:
        reader.load(expected)

    def read_all(store):
        _, manifest, reader = store.open_reader("small")
        with reader:
            ids = reader.token_ids()
            assert np.array_equal(ids, cache.token_ids[: len(ids)])
            buffers = cache.buffers()
            reader.load(buffers)
        for pair, right in zip(buffers, expected, strict=True):
            for side in (0, 1):
                assert np.array_equal(pair[side][:, : len(ids)], right[side][:, : len(ids)])
        for document in manifest.documents:
            assert store.get_blob(document.sha256) in cache.texts
        store.verify("small").raise_first()

    seed, read = store_target(cache, store, read_all)
    return Target(f"store {codec}", [seed], read, ALLOWED_OF_STORES, damaged_store, only_mended=True)


def all_targets(small_class):
    """(target, inputs of it in the fast suite)."""
    store, cache = Store.in_memory(workers=1), small_class(num_tokens=12)
    parsers = parser_targets(cache, store, cache.build(store))
    segments = [
        segment_target(configuration, dtype, side, sample_array((2, 9, 4), dtype), BASIS_OF_A_SEGMENT)
        for configuration in CONFIGURATIONS
        for dtype in STORAGE_DTYPES
        for side in ("keys", "values")
    ]
    stores = [whole_store(small_class, codec) for codec in (*WITHOUT_BASIS, transform(BASIS, 2))]
    return [
        *((target, 120) for target in (*parsers, basis_target(BASIS))),
        *((target, -(-800 // len(segments))) for target in segments),
        *((target, -(-360 // len(stores))) for target in stores),
    ]


def fuzz(targets, factor, seed):
    """All of it in a child, whose memory is limited; returns the number of inputs."""

    def work():
        warm_up()
        with limits():
            for target, count in targets:
                run(target, factor * count, seed)

    assert outcome(in_child(work)) == 0
    return sum(factor * count for _, count in targets)


def test_a_few_hostile_inputs(small_class):
    assert fuzz(all_targets(small_class), FAST, seed=random.randrange(1 << 30)) >= 2000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_hostile_inputs(small_class):
    assert fuzz(all_targets(small_class), SLOW, seed=20260101) >= 100_000
