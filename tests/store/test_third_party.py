"""A codec of another distribution, as docs/codecs.md describes it: an entry point, and the shipped suite."""

import os
import subprocess
import sys

import pytest

from cag_store import Store, codec_from_config, codec_ids
from cag_store.errors import UnknownCodec

CODEC = '''
"""Bit patterns with a constant added: nothing to gain, but a codec."""

from cag_store.codecs import Codec
from cag_store.codecs.base import checked_array, checked_int, corrupt_segment, refuse_unknown_keys


class Shift(Codec):
    codec_id = "shift"
    lossless = True

    def __init__(self, by=1):
        self.by = by

    @classmethod
    def from_config(cls, config):
        refuse_unknown_keys(cls.codec_id, config, ("by",))
        return cls(checked_int(cls.codec_id, config, "by", 1, 0, 255))

    def config(self):
        return {"id": self.codec_id, "by": self.by}

    def encode(self, array, dtype, side="keys", start=0):
        return bytes((byte + self.by) % 256 for byte in checked_array(array, dtype).tobytes())

    def decode_into(self, data, out):
        if len(data) != out.nbytes:
            raise corrupt_segment("length", out.nbytes, len(data))
        import numpy as np

        out[...] = (np.frombuffer(data, np.uint8) - np.uint8(self.by)).view(out.dtype).reshape(out.shape)
'''
SUITE = """
from cag_store.testing import CodecConformance


class TestShift(CodecConformance):
    configs = [{"id": "shift"}, {"id": "shift", "by": 200}]

    def tolerance(self, array, dtype, side):
        return 0
"""


@pytest.fixture
def site(tmp_path):
    """A folder as installers leave it: the module, and the metadata of its distribution."""
    folder = tmp_path / "site"
    dist_info = folder / "shift_codec-1.0.dist-info"
    dist_info.mkdir(parents=True)
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: shift-codec\nVersion: 1.0\n")
    (dist_info / "entry_points.txt").write_text(
        "[cag.codecs]\nshift = shift_codec:Shift\nwrong = shift_codec:checked_array\n"
    )
    (folder / "shift_codec.py").write_text(CODEC)
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("shift_codec", None)


@pytest.mark.usefixtures("installed")
def test_caches_are_built_and_read_with_it(tmp_path, small):
    assert "shift" in codec_ids()
    assert codec_from_config("shift").config() == {"id": "shift", "by": 1}
    store, cache = Store.open(tmp_path / "store"), small({"id": "shift", "by": 3})
    with store.reader(cache.build(store)) as reader:
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)
    store.verify("small").raise_first()


def test_without_its_distribution_a_cache_is_refused_by_the_codecs_name(tmp_path, small, site):
    store = Store.open(tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        manifest = small("shift").build(store)
    sys.modules.pop("shift_codec")
    store = Store.open(tmp_path / "store")
    assert "shift" not in codec_ids()
    with pytest.raises(UnknownCodec, match=r"shift.*cag\.codecs"), store.reader(manifest) as reader:
        reader.load(small("lossless").buffers())
    with pytest.raises(UnknownCodec, match=r"shift.*cag\.codecs"):
        store.verify("small")  # which does not call it damaged


@pytest.mark.usefixtures("installed")
def test_an_entry_point_that_is_no_codec_is_refused():
    with pytest.raises(UnknownCodec, match="not a Codec"):
        codec_from_config("wrong")


def test_the_shipped_suite_runs_outside_of_this_repository(site, tmp_path):
    """What its author would run, and what catches a codec that is wrong."""
    suite = tmp_path / "test_shift.py"
    suite.write_text(SUITE)
    path = os.pathsep.join([str(site), *filter(None, sys.path)])

    def run():
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )

    passed = run()
    assert passed.returncode == 0, passed.stdout
    assert " passed" in passed.stdout
    (site / "shift_codec.py").write_text(CODEC.replace("- np.uint8(self.by)", "- np.uint8(1)"))
    failed = run()
    assert failed.returncode == 1
    assert "test_round_trip" in failed.stdout
