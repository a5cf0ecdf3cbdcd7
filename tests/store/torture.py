"""What the tests with several processes share: children, being killed at a chosen point, and what must hold after."""

import copy
import os
import signal
import sys
import threading
import traceback

import numpy as np

from cag_store import Store
from cag_store.backends import Backend, LocalBackend
from cag_store.paths import ref_path
from cag_store.usage import objects, paths_of

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.utime", "fcntl.flock"}


def in_child(work):
    """Run `work()` in a forked process; returns its id. The child ends with 0, or with 1 and a traceback."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def outcome(child):
    """0, or the exit code or minus the signal that ended the child."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def value_of_child(work):
    """The integer that `work()` returns in a child."""
    reading, writing = os.pipe()
    child = in_child(lambda: os.write(writing, str(work()).encode()))
    os.close(writing)
    value = int(os.read(reading, 100))
    os.close(reading)
    assert outcome(child) == 0
    return value


class Countdown:
    """Counts steps, and kills this process just before step `last` (0: never)."""

    def __init__(self, last=0):
        self.last, self.count = last, 0
        self._guard = threading.Lock()

    def step(self):
        with self._guard:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def count_file_events(countdown):
    """Every operation on a file of this process is a step from now on, for ever."""
    sys.addaudithook(lambda event, arguments: event in FILE_EVENTS and countdown.step())


class CountedBackend(LocalBackend):
    """A local backend whose every public call is a step."""

    def __init__(self, root, countdown):
        self.countdown = countdown
        super().__init__(root)


def _counted(name):
    def call(self, *arguments, **options):
        self.countdown.step()
        return getattr(LocalBackend, name)(self, *arguments, **options)

    return call


for _name in vars(Backend):
    if not _name.startswith("_") and callable(getattr(Backend, _name)):
        setattr(CountedBackend, _name, _counted(_name))


def changed_from(cache, position):
    """The same cache up to `position`, other tokens and arrays from there on."""
    changed = copy.deepcopy(cache)
    changed.token_ids[position:] += 1
    for keys, values in changed.layers:
        for side in (keys, values):
            side[:, position:] = side[:, position:][:, ::-1].copy()
    return changed


def read_whole(store, name, caches):
    """Open, read and compare all of `name`; returns the one of `caches` that it is."""
    _, manifest, reader = store.open_reader(name)
    with reader:
        ids = reader.token_ids()
        (cache,) = [cache for cache in caches if np.array_equal(cache.token_ids, ids)]
        buffers = cache.buffers()
        reader.load(buffers)
        cache.check(buffers)
        assert [store.get_blob(document.sha256) for document in manifest.documents] == cache.texts
    return cache


def check_collected(store):
    """After `gc` without grace and with nobody else there: exactly what refs reach is left, and every name is whole."""
    reached = set().union(*(paths_of(store.manifest(ref.manifest)) for ref in store.refs()))
    assert set(objects(store.backend)) == reached
    assert {info.path for info in store.backend.list("refs")} == {ref_path(name) for name in store.names()}
    for folder in ("tmp", "leases"):
        assert not list((store.backend.root / folder).iterdir()), folder
    for name in store.names():
        store.verify(name).raise_first()


def open_store(root):
    """One worker, so that the order of operations is always the same."""
    return Store.open(root, workers=1)
