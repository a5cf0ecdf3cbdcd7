"""The rates that the codecs promise, on the real SmolLM2 and texts that nothing was chosen on. `make test-slow`.

Losses are those of the text that follows each corpus, as rates are usually published; the probes of a build, which ask
for the corpus word by word, lose more, and are pinned too. Makes the model's basis where the user has none yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import rich

from cag.engine import Engine
from cag.home import cag_home as user_home
from cag_bench.codec_list import parse_codecs
from cag_bench.corpus import read_corpus
from cag_bench.quality import QualityOptions, run_quality
from cag_bench.quality_table import corpus_names

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
USER_HOME = user_home()
# raw bytes over stored ones with the basis apart and with it counted, mean KL (nats) of the following text, and of the
# probes of a build
BARS = {
    "lossless": (1.48, 1.48, 0.0, 0.0),
    "transform@-580": (6.5, 3.6, 0.001, 0.004),
    "transform@-515": (10.0, 4.4, 0.004, 0.015),
    "transform@-445": (17.0, 5.4, 0.02, 0.06),
}
CODE_OVER_PROSE = 1.15  # bytes of source code at the same KL


@pytest.fixture(scope="module")
def rows(shared_data, tmp_path_factory):
    """By corpus and codec."""
    home = pytest.MonkeyPatch()
    home.setenv("CAG_HOME", str(USER_HOME))
    folder = tmp_path_factory.mktemp("bars")
    paths = {
        "prose": shared_data / "dev" / "squad" / "small" / "documents.jsonl.gz",
        "documentation": shared_data / "docs_corpus" / "documents.jsonl.gz",
        "code": Path(rich.__file__).parent,
    }
    try:
        engine = Engine.load("smollm2-135m-instruct", store=folder / "store")
        corpora = {name: read_corpus([str(path)]) for name, path in paths.items()}
        options = QualityOptions(parse_codecs(list(BARS)))
        summary = run_quality(engine, list(corpora.values()), options, folder / "out", lambda *_: None)
    finally:
        home.undo()
    names = dict(zip(corpus_names([corpus.paths for corpus in corpora.values()]), corpora, strict=True))
    return {(names[row["corpus"]["name"]], row["label"]): row for row in summary["rows"]}


@pytest.mark.parametrize("codec", BARS)
@pytest.mark.parametrize("corpus", ["prose", "documentation", "code"])
def test_rates_at_their_losses(rows, corpus, codec):
    row, (apart, counted, following, probes) = rows[corpus, codec], BARS[codec]
    assert row["corpus"]["num_tokens"] >= 6000
    assert row["raw_over_stored"]["without_basis"] >= apart
    assert row["raw_over_stored"]["with_basis"] >= counted
    assert row["fidelity"]["following"]["num_probes"] == 1024
    assert row["fidelity"]["following"]["mean_kl"] <= following
    assert row["fidelity"]["corpus"]["num_probes"] >= 256
    assert row["fidelity"]["corpus"]["mean_kl"] <= probes


@pytest.mark.parametrize("codec", list(BARS)[1:])
def test_source_code_takes_hardly_more_bytes_than_prose(rows, codec):
    """At a step, code loses no more than prose within the bar, so its bytes are those at that loss or a smaller one."""
    prose, code = rows["prose", codec], rows["code", codec]
    assert code["fidelity"]["following"]["mean_kl"] <= BARS[codec][2]
    assert prose["raw_over_stored"]["without_basis"] / code["raw_over_stored"]["without_basis"] <= CODE_OVER_PROSE
