"""Blocks of the C library's allocator while a build tries codecs, in processes of their own: thresholds are the
process'."""

import ctypes
import os
import subprocess
import sys

import pytest

from cag.machine.allocator import large_blocks_apart, return_free_memory

HAS_GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallinfo2")

PROLOGUE = """
import ctypes, threading
from cag.machine.allocator import large_blocks_apart, return_free_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]

libc.mallinfo2.restype = Info

def is_apart(num_bytes):
    before = libc.mallinfo2().hblks
    block = libc.malloc(num_bytes)
    found = libc.mallinfo2().hblks - before
    libc.free(block)
    return found == 1

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

libc.free(libc.malloc(31 << 20))  # as a model's reader does: from here on blocks of 31 MB lie in heaps
"""


def run(code, **environment):
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    found = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code], capture_output=True, text=True, env={**outside, **environment}
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


@pytest.mark.skipif(not HAS_GLIBC, reason="another C library")
def test_large_blocks_lie_apart_until_the_last_one_leaves():
    found = run("""
print(is_apart(2 << 20))
with large_blocks_apart():
    print(is_apart(2 << 20), is_apart(1 << 19))
    with large_blocks_apart():
        print(is_apart(2 << 20))
    print(is_apart(2 << 20))
print(is_apart(2 << 20), is_apart(40 << 20))
with large_blocks_apart():
    print(is_apart(2 << 20))
""")
    assert found == ["False", "True", "False", "True", "True", "False", "True", "True"]


@pytest.mark.skipif(not HAS_GLIBC, reason="another C library")
def test_what_the_environment_says_is_left_as_it_is():
    code = "with large_blocks_apart():\n    print(is_apart(2 << 20))\n"
    assert run(code, MALLOC_MMAP_THRESHOLD_=str(4 << 20)) == ["False"]
    assert run(code, GLIBC_TUNABLES=f"glibc.malloc.mmap_threshold={4 << 20}") == ["False"]


@pytest.mark.skipif(not HAS_GLIBC, reason="another C library")
@pytest.mark.parametrize("apart", [False, True])
def test_threads_keep_no_free_memory_at_the_end_of_their_heaps(apart):
    """Each thread frees what it wrote but a little at the front; trimming alone leaves it with the heap."""
    found = run(f"""
import contextlib
def work(ready, done):
    kept = libc.malloc(1 << 16)
    blocks = [libc.malloc(3 << 20) for _ in range(10)]
    for block in blocks:
        ctypes.memset(block, 1, 3 << 20)
    for block in blocks:
        libc.free(block)
    ready.release()
    done.wait()
before, ready, done = resident(), threading.Semaphore(0), threading.Event()
with large_blocks_apart() if {apart} else contextlib.nullcontext():
    threads = [threading.Thread(target=work, args=(ready, done)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    return_free_memory()
    print(resident() - before)
    done.set()
""")
    assert (int(found[0]) < 16e6) is apart, found


def test_without_glibc_nothing_is_done(monkeypatch):
    asked, changed = [], []
    monkeypatch.setattr("cag.machine.allocator._user_decides", lambda: False)
    monkeypatch.setattr("cag.machine.allocator._function", asked.append)  # there is none
    monkeypatch.setattr("cag.machine.allocator._set_thresholds", lambda *values: changed.append(values))
    with large_blocks_apart():
        return_free_memory()
    assert (asked, changed) == (["mallopt", "malloc_trim"], [])
