"""Memory apart from the allocator: whose it is, how it lies, and that it comes back."""

import gc

import numpy as np
import psutil
import pytest

from cag_store.scratch import HUGE_PAGE_BYTES, Scratch, mapped_array

KINDS = ((3, 5), np.float32), ((7,), np.int8), ((2, 2), np.float64)


def test_arrays_of_a_scratch_are_aligned_and_apart():
    with Scratch().arrays(*KINDS) as arrays:
        assert [(array.shape, array.dtype) for array in arrays] == [(shape, np.dtype(kind)) for shape, kind in KINDS]
        for number, array in enumerate(arrays):
            assert array.ctypes.data % 64 == 0
            array[...] = number
        assert [np.unique(array).tolist() for array in arrays] == [[0], [1], [2]]


def test_memory_is_used_again_by_the_next_and_never_by_two_at_once():
    scratch = Scratch()
    with scratch.arrays(*KINDS) as first, scratch.arrays(*KINDS) as second:
        places = {first[0].ctypes.data, second[0].ctypes.data}
        assert len(places) == 2
    with scratch.arrays(*KINDS) as third, scratch.arrays(((1,), np.int8)) as fourth:
        assert {third[0].ctypes.data, fourth[0].ctypes.data} == places
    with scratch.arrays(((2 * HUGE_PAGE_BYTES,), np.int8)) as larger:
        larger[0][:] = 1
        assert larger[0].ctypes.data not in places


def test_no_more_is_kept_than_was_asked_for():
    scratch = Scratch(keep=1)
    with scratch.taken(10), scratch.taken(10):
        pass
    assert len(scratch._free) == 1


@pytest.mark.parametrize("huge", [True, False])
def test_a_mapped_array_is_zeros_and_goes_with_its_last_view(huge):
    array = mapped_array((3, 4 << 20), np.int16, huge=huge)
    assert not array.any()
    array[:] = 5
    part = array[1, 100:110]
    taken = psutil.Process().memory_info().rss
    del array
    gc.collect()
    assert part.tolist() == [5] * 10
    del part
    gc.collect()
    assert psutil.Process().memory_info().rss < taken - (20 << 20)


def test_an_empty_mapped_array():
    assert mapped_array((0, 4), np.float32).shape == (0, 4)
