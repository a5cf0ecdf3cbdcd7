"""What is no file in the place of an object: nobody waits for it, and no error of the system comes through."""

import base64
import errno
import json
import os
import signal
from pathlib import Path

import pytest

from cag_store import Store
from cag_store.errors import EntryNotFound, StoreError, StoreFull
from cag_store.paths import blob_path

GOLDEN = json.loads((Path(__file__).parent / "golden" / "store-1.json").read_text())
KINDS = {
    "pipe": os.mkfifo,
    "device without end": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "folder": Path.mkdir,
}
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")


@pytest.fixture
def root(tmp_path):
    """A store in a folder; a test that waits for ever fails."""

    def too_long(_signal, _frame):
        raise AssertionError("it waits")

    store = Store.open(tmp_path / "store")
    for path, data in GOLDEN["objects"].items():
        store.backend.replace(path, base64.b64decode(data))
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield tmp_path / "store"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def use(root):
    """Read all of the cache."""
    store = Store.open(root)
    _, manifest, reader = store.open_reader("golden")
    with reader:
        reader.token_ids()
    for document in manifest.documents:
        store.get_blob(document.sha256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", GOLDEN["objects"])
def test_an_object_that_is_no_file(root, path, kind):
    use(root)
    (root / path).unlink()
    KINDS[kind](root / path)
    with pytest.raises(StoreError):
        use(root)
    assert kind == "folder" or Store.open(root).names() == ["golden"]
    with pytest.raises(StoreError):
        Store.open(root).verify("golden").raise_first()


@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_that_is_no_file(root, kind):
    (root / "format").unlink()
    KINDS[kind](root / "format")
    with pytest.raises(StoreError):
        Store.open(root)


@pytest.mark.parametrize("kind", ["pipe", "device without end"])
def test_a_lease_that_is_no_file_is_nobodys(root, kind):
    (root / "leases").mkdir(exist_ok=True)
    KINDS[kind](root / "leases" / "x.json")
    assert not Store.open(root).gc(grace_s=0).build_running
    use(root)


def test_what_others_put_into_a_store_stops_nothing_and_stays(root):
    address, digest = "ab" + "c" * 62, Store.open(root).ref("golden").manifest
    foreign = [
        ".DS_Store",
        "lost+found/#12",
        "refs/._golden.json",
        "refs/golden.json~",
        "refs/-golden.json",
        "refs/golden copy.json",
        "blobs/.DS_Store",
        f"blobs/ab/.{address}.Xy12ab",
        "chunks/lost+found/#12",
        f"chunks/ab/{address}.orig",
        f"manifests/{digest[:2]}/{digest}.json.bak",
        "leases/._x.json",
        "leases/folder.json/note",
        "tmp/.DS_Store",
        "tmp/folder/note",
    ]
    loose = [f"chunks/ab/{address}", "tmp/left.json"]
    for path in foreign + loose:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"\0")
    store = Store.open(root)
    assert store.names() == [ref.name for ref in store.refs()] == list(store.usage().caches) == ["golden"]
    assert store.verify("golden").ok
    report = store.gc(grace_s=0)
    assert (list(report.removed), report.live_leases, report.kept_unreferenced) == (loose, 0, 0)
    assert all((root / path).exists() for path in foreign)
    use(root)


def test_a_link_to_nothing_is_nothing(root):
    """As one to a disk that is not mounted: what is written takes its place."""
    store = Store.open(root)
    sha256 = store.resolve("golden")[1].documents[0].sha256
    text, path = store.get_blob(sha256), root / blob_path(sha256)
    path.unlink()
    path.symlink_to(root / "gone")
    with pytest.raises(EntryNotFound):
        store.get_blob(sha256)
    assert store.put_blob(text) == sha256
    assert (store.get_blob(sha256), path.is_symlink()) == (text, False)
    assert store.verify("golden").ok


@pytest.mark.parametrize("folder", ["chunks", "blobs", "manifests", "refs"])
def test_what_may_not_be_read_is_not_called_damaged(root, monkeypatch, folder):
    refused, original = str(root / folder), os.open

    def opened(path, *rest):
        if str(path).startswith(refused):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *rest)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(StoreFull, match="no permission"):
        Store.open(root).verify("golden")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no folder that takes no other")
def test_a_place_that_takes_no_folder_is_not_a_part_that_has_gone():
    with pytest.raises(StoreFull, match=r"/proc/none: .*put the store elsewhere"):
        Store.open("/proc/none").put_blob(b"a text")


@pytest.fixture
def unlisted(root, monkeypatch):
    """Names a folder of the store that the system does not list from then on."""

    def refuse(folder):
        for function in ("scandir", "listdir"):
            monkeypatch.setattr(os, function, refusing(getattr(os, function), root / folder))

    def refusing(listed, refused):
        def listing(path="."):
            if Path(path) == refused:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return listed(path)

        return listing

    return refuse


@pytest.mark.parametrize("folder", ["refs", "leases", "chunks", "blobs", "manifests"])
def test_gc_removes_nothing_while_a_folder_cannot_be_listed(root, unlisted, folder):
    store = Store.open(root)
    lease = store.lease(store.ref("golden").manifest)
    if folder == "leases":
        store.remove("golden")
    before = {path for path in root.rglob("*") if path.is_file()}
    unlisted(folder)
    with pytest.raises(StoreError, match=f"{folder}: Permission denied"):
        store.gc(grace_s=0)
    assert all(path.exists() for path in before)
    lease.release()


def test_a_folder_of_names_that_cannot_be_listed_is_not_an_empty_store(root, unlisted):
    unlisted("refs")
    with pytest.raises(StoreError, match="refs: Permission denied"):
        Store.open(root).names()
    with pytest.raises(StoreError, match="refs: Permission denied"):
        Store.open(root).usage()
    use(root)


def test_a_foreign_folder_that_cannot_be_listed_stops_nothing(root, unlisted):
    (root / "chunks" / "lost+found").mkdir()
    unlisted("chunks/lost+found")
    assert not Store.open(root).gc(grace_s=0).removed
