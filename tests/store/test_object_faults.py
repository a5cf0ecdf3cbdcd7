"""What networks and servers do to loads and writes: a success after retries or a typed error, never wrong bytes."""

import time
from dataclasses import replace

import numpy as np
import pytest

from cag_store import Store
from cag_store.backends.object import ObjectBackend
from cag_store.errors import BackendUnavailable, CorruptEntry, EntryChanged, StoreError, StoreFull
from object_server import IMPATIENT, QUICK, Response

SECRETS = ("a-very-secret-word", "Signature", "Credential", "127.0.0.1")


class Faults:
    """A plan: the first `times` requests that `select` names meet `fault`."""

    def __init__(self, fault, times, select=lambda request: True):
        self.fault, self.left, self.select, self.met = fault, times, select, 0

    def __call__(self, request, ask):
        if self.left > 0 and self.select(request):
            self.left -= 1
            self.met += 1
            return self.fault(request, ask)
        return ask(request)


def unavailable(request, ask):
    return Response(503, {}, b"<Error><Code>SlowDown</Code></Error>", 36)


def broken(request, ask):
    return Response(500, {}, b"", 0)


def stalled(request, ask):
    time.sleep(5)  # nobody waits for it
    return Response(500, {}, b"", 0)


def reset(request, ask):
    return replace(ask(request), reset=True)


def cut(request, ask):
    response = ask(request)
    return response if request.method != "GET" else replace(response, cut=True)


def short(request, ask):
    """Fewer bytes, and headers that agree with them."""
    response = ask(request)
    if request.method != "GET" or response.status not in (200, 206):
        return response
    body = response.body[: len(response.body) // 2]
    return replace(response, body=body, length=len(body))


def whole(request, ask):
    """The server ignores the range."""
    request.headers = {name: value for name, value in request.headers.items() if name.lower() != "range"}
    return ask(request)


def flipped(request, ask):
    response = ask(request)
    body = bytearray(response.body)
    body[len(body) // 2] ^= 0x10
    return replace(response, body=bytes(body))


SLOW_STALL = pytest.param(stalled, marks=pytest.mark.slow)


def is_chunk(request):
    return request.method in ("GET", "HEAD") and "/chunks/" in request.path


def opened(url, options=QUICK):
    return Store(ObjectBackend(url, options))


def patience(fault):
    return IMPATIENT if fault is stalled else QUICK


def load(store, cache):
    _, _, reader = store.open_reader("small")
    with reader:
        buffers = cache.buffers()
        reader.load(buffers)
    return buffers


@pytest.fixture
def built(s3_url, proxy, small):
    cache = small(num_tokens=24)
    cache.build(opened(s3_url))
    return cache


@pytest.mark.parametrize("fault", [unavailable, broken, SLOW_STALL, reset, cut, short])
def test_a_fault_that_passes_does_not_show(s3_url, proxy, built, fault):
    proxy.plan = faults = Faults(fault, 2, is_chunk)
    built.check(load(opened(s3_url, patience(fault)), built))
    assert faults.met == 2


@pytest.mark.parametrize("fault", [unavailable, broken, SLOW_STALL, reset, cut, short, whole])
def test_a_fault_that_stays_is_a_typed_error_that_tells_no_secret(s3_url, proxy, built, fault):
    store = opened(s3_url, replace(patience(fault), max_retries=1))
    proxy.plan = faults = Faults(fault, 10**9, is_chunk)
    with pytest.raises(BackendUnavailable) as caught:
        load(store, built)
    assert faults.met > 1
    assert not any(secret in f"{caught.value} {caught.value.facts}" for secret in SECRETS)
    assert caught.value.__cause__ is None
    proxy.plan = Faults(fault, 0)
    built.check(load(store, built))


@pytest.mark.parametrize("nth", range(8))
def test_a_flipped_bit_is_never_an_answer(s3_url, proxy, built, nth):
    store = opened(s3_url)
    seen = []

    def flip_nth(request, ask):
        if request.method != "GET" or "/leases/" in request.path or "/locks/" in request.path:
            return ask(request)
        seen.append(request.path)
        return flipped(request, ask) if len(seen) == nth + 1 else ask(request)

    proxy.plan = flip_nth
    with pytest.raises(CorruptEntry):
        load(store, built)
    built.check(load(store, built))


def test_a_cache_that_is_replaced_while_it_is_read(s3_url, proxy, built, small):
    """Between two ranges of one chunk another object takes its place."""
    store = opened(s3_url)
    other = small(num_tokens=24, seed=3)
    manifest = other.put(Store.in_memory())
    path = f"/chunks/{store.resolve('small')[1].chunks[0].key[:2]}/"
    replacement = bytes(manifest.chunks[0].stored_bytes)
    seen = []

    def replace_after_the_header(request, ask):
        if request.method == "GET" and path in request.path:
            seen.append(request)
            if len(seen) == 2:
                store.backend.replace(request.path.split("/", 3)[3], replacement)
        return ask(request)

    proxy.plan = replace_after_the_header
    with pytest.raises(EntryChanged):
        load(store, built)
    with pytest.raises(CorruptEntry):
        load(store, built)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [unavailable, reset, stalled])
def test_a_write_that_fails_for_a_while_is_made_once(s3_url, proxy, small, fault):
    faults = Faults(fault, 1 if fault is stalled else 3, lambda request: request.method == "PUT")
    store = opened(s3_url, patience(fault))
    proxy.plan = faults
    cache = small(num_tokens=24)
    for _ in range(4):  # what may not be repeated unasked is an error, and the build is asked for again
        try:
            cache.build(store)
            break
        except StoreError as error:
            assert isinstance(error, BackendUnavailable)
    assert faults.left == 0
    assert store.verify("small").ok
    built = load(store, cache)
    cache.check(built)


def denied(request, ask):
    return Response(403, {}, b"<Error><Code>AccessDenied</Code><Message>Signature</Message></Error>", 67)


def test_a_store_that_may_only_be_read_is_read_without_leases(s3_url, proxy, built):
    proxy.plan = Faults(denied, 10**9, lambda request: request.method in ("PUT", "DELETE", "POST"))
    store = opened(s3_url)
    built.check(load(store, built))
    with pytest.raises(StoreFull, match="no permission") as caught:
        store.pin("small")
    assert "Signature" not in str(caught.value)


def test_reading_without_permission_is_said(s3_url, proxy):
    proxy.plan = Faults(denied, 10**9)
    with pytest.raises(BackendUnavailable, match=r"access denied.*403"):
        opened(s3_url)


def test_what_a_server_does_not_give_is_not_called_damaged(s3_url, proxy, built):
    store = opened(s3_url)
    proxy.plan = Faults(denied, 10**9, lambda request: request.method == "GET" and "/chunks/" in request.path)
    with pytest.raises(BackendUnavailable):
        store.verify("small")
    proxy.plan = Faults(denied, 0)
    assert store.verify("small").ok


def test_the_arrays_of_a_failed_load_are_not_taken_for_whole(s3_url, proxy, built):
    _, _, reader = opened(s3_url).open_reader("small")
    proxy.plan = Faults(unavailable, 10**9, lambda request: request.method == "GET")
    arrived = []
    with reader, pytest.raises(BackendUnavailable):
        reader.load(built.buffers(), arrived.append)
    assert arrived == []
    assert np.array_equal(reader.token_ids(), built.token_ids)
