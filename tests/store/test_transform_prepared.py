"""What the codec `transform` prepares of a basis: the solver, the costs of shifts, and that nothing keeps it alive."""

import gc
import hashlib
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cag_store.codecs import blas, codec_from_config
from cag_store.codecs.transform import loops, prepared, rans, shifts, symbols
from cag_store.codecs.transform.prepared import PreparedBasis
from cag_store.codecs.transform.solving import solve_positive
from cag_store.testing import sample_array
from cag_store.testing.bases import sample_basis

HEADS, DIMS = (2, 1, 2), (8, 16, 4)


@pytest.fixture(scope="module")
def basis():
    return sample_basis(HEADS, DIMS, 2)


def transform(basis):
    data = basis.to_bytes()
    digest = hashlib.sha256(data).hexdigest()
    config = {"id": "transform", "basis": digest, "joint_layers": basis.joint_layers, "step": -256}
    return codec_from_config(config, lambda _: data)


def test_the_solver_in_float32_agrees_with_numpy():
    generator = np.random.default_rng(0)
    for size, width in ((1, 3), (256, 40), (700, 300)):
        rows = generator.normal(size=(size, size + 50))
        matrix, right = rows @ rows.T / size + np.eye(size), generator.normal(size=(size, width))
        expected = np.linalg.solve(matrix, right)
        found = right.astype(np.float32)
        solve_positive(matrix.astype(np.float32), found)
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    with pytest.raises(np.linalg.LinAlgError):
        solve_positive(-np.eye(300, dtype=np.float32), np.ones((300, 1), np.float32))


def test_components_that_depend_on_each_other_are_solved_in_float64(monkeypatch):
    side = PreparedBasis(sample_basis(HEADS, DIMS, 2), -256).side(0, 0)
    expected = side.forward

    def fails(*_):
        raise np.linalg.LinAlgError

    monkeypatch.setattr(prepared, "solve_positive", fails)
    found = PreparedBasis(sample_basis(HEADS, DIMS, 2), -256).side(0, 0).forward
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_costs_of_shifts_are_those_of_the_reference(basis):
    generator = np.random.default_rng(1)
    tables = rans.Tables.of(basis.frequencies)
    kinds = generator.integers(0, symbols.NUM_SYMBOLS, (37, 501)).astype(np.uint8)
    across = generator.integers(0, len(basis.frequencies), 501).astype(np.int32)
    own = generator.integers(symbols.LEAST_SHIFT, symbols.SHIFTS + symbols.LEAST_SHIFT, 37).astype(np.int32)
    expected = shifts.costs_reference(kinds, across, own, tables.costs)
    fast = loops.compiled()
    if fast is None:
        pytest.skip("numba is not here")
    assert np.array_equal(fast.shift_costs(kinds, across, own, tables.costs), expected)
    few = np.ascontiguousarray(kinds[:, :1])
    assert np.array_equal(
        fast.shift_costs(few, across[:1], own, tables.costs),
        shifts.costs_reference(few, across[:1], own, tables.costs),
    )


def test_a_codec_that_goes_frees_what_it_prepared(basis):
    """Without waiting for the collector of cycles: a basis may be larger than a cache."""
    codec = transform(basis)
    codec.encode_layers([sample_array((HEADS[i], 70, DIMS[i]), "bfloat16", i) for i in range(2)], "bfloat16", "keys", 0)
    kept = weakref.ref(codec._prepared)
    gc.disable()
    try:
        del codec
        assert kept() is None
    finally:
        gc.enable()


def test_products_have_one_thread_while_something_is_encoded():
    threads = blas._threads()
    if threads is None:
        pytest.skip("numpy has no OpenBLAS here")
    before = threads.get()
    try:
        threads.set(2)
        with blas.one_thread_a_product():
            with ThreadPoolExecutor(1) as pool, blas.one_thread_a_product():
                assert pool.submit(threads.get).result() == 1
            assert threads.get() == 1
        assert threads.get() == 2
        with pytest.raises(ValueError, match="left"), blas.one_thread_a_product():
            raise ValueError("left")
        assert threads.get() == 2
    finally:
        threads.set(before)


def test_without_openblas_nothing_is_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(blas, "_MAPS", tmp_path / "none")
    monkeypatch.setattr(blas, "_threads", blas._threads.__wrapped__)
    with blas.one_thread_a_product():
        assert np.array_equal(np.eye(3) @ np.eye(3), np.eye(3))
