"""Peak memory of loading and building, measured in processes of their own. `make test-slow`."""

import json
import subprocess
import sys

import pytest

from cag.building.fidelity import GROUP_PROBES
from cag.home import cag_home as user_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
USER_HOME = user_home()
SLACK_BYTES = 120e6  # activations of a block, scratch of one layer, allocator
PREPARED_BYTES = 0.2e9  # what a trial of `transform` prepares from a basis, whatever the cache's size
PROBED_BYTES = 2 * GROUP_PROBES * 49152 * 4  # logits of one group of probes, and a copy on their way to the file

MEASURE = """
import json, resource, sys, threading, psutil
import cag
process = psutil.Process()
def rss():
    return process.memory_info().rss
class Peak:
    def __enter__(self):
        self.peak, self.done = rss(), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, rss())
    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
work, model, store, corpus, codec = sys.argv[1:]
engine = cag.Engine.load(model, store=store)
if codec == "auto":  # the basis is the model's, made once by the first build that wants one
    from cag.building.rungs import codec_of
    with engine.store.build_lease():
        codec_of("transform", engine.model, engine.store)
engine.model.forward(list(range(512)), engine.model.new_state())
for thread in threading.enumerate():
    if thread.name == "cag-warm-up":  # compiles loops, whatever is done later
        thread.join()
before = rss()
with Peak() as watched:
    if work == "build":
        report = engine.build([corpus], name="memory", codec=codec)
        raw = report.raw_bytes
    else:
        prefix = engine.open("memory")
        prefix.resident.wait()
        raw = prefix.resident.num_bytes
print(json.dumps({"raw": raw, "before": before, "peak": watched.peak}))
"""


@pytest.fixture
def cag_home(monkeypatch):
    """The user's own home: the model is there, or is pulled there."""
    monkeypatch.setenv("CAG_HOME", str(USER_HOME))


def measure(work, store, corpus, codec):
    command = [sys.executable, "-c", MEASURE, work, "smollm2-135m-instruct", str(store), str(corpus), codec]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("codec", ["lossless", "int8", "auto"])
def test_building_holds_one_copy_and_loading_at_most_one_more(codec, tmp_path, shared_data):
    corpus = shared_data / "dev" / "squad" / "tiny8k" / "documents.jsonl"
    built = measure("build", tmp_path / "store", corpus, codec)
    loaded = measure("open", tmp_path / "store", corpus, codec)
    for work, facts in (("build", built), ("open", loaded)):
        extra = facts["peak"] - facts["before"]
        print(f"{codec} {work}: cache {facts['raw'] / 1e6:.0f} MB, peak {extra / 1e6:.0f} MB above the model")
    prepared = PREPARED_BYTES if codec == "auto" else 0
    assert built["peak"] - built["before"] <= built["raw"] + SLACK_BYTES + PROBED_BYTES + prepared
    assert loaded["peak"] - loaded["before"] <= 2 * loaded["raw"] + SLACK_BYTES
