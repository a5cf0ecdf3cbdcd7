from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cag.retrieval
from cag.errors import EmptyCorpus, UsageError
from cag.retrieval import (
    Bm25Retriever,
    DenseRetriever,
    HybridRetriever,
    Passage,
    Retriever,
    ScoredPassage,
    available_retrievers,
    build_retriever,
)
from cag.retrieval.base import top_indices
from cag.retrieval.hybrid import min_max

KINDS = ("bm25", "dense", "hybrid")
QUERY = "At which pressure does the valve open?"


def names(found: list[ScoredPassage]) -> list[str]:
    return [scored.passage.title for scored in found]


class ConformanceOfRetriever:
    """What every retriever must do; a subclass gives `make`."""

    def make(self, passages, embedder) -> Retriever:
        raise NotImplementedError

    @pytest.fixture
    def retriever(self, passages, embedder) -> Retriever:
        return self.make(passages, embedder)

    def test_scores_fall_and_passages_differ(self, retriever, passages):
        found = retriever.retrieve(QUERY, 4)
        assert {scored.passage for scored in found} == set(passages)
        assert [scored.score for scored in found] == sorted((scored.score for scored in found), reverse=True)

    def test_a_smaller_k_is_a_prefix(self, retriever):
        everything = retriever.retrieve(QUERY, 100)
        assert len(everything) == 4
        assert all(retriever.retrieve(QUERY, k) == everything[:k] for k in (1, 2, 3))

    def test_the_same_query_gives_the_same_answer_from_many_threads(self, retriever):
        expected = {query: retriever.retrieve(query, 4) for query in (QUERY, "beeps", "lamps at night")}
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda query: (query, retriever.retrieve(query, 4)), list(expected) * 20)
            assert all(expected[query] == result for query, result in found)

    @pytest.mark.parametrize("query", ["", "   ", "?!", "zzzzz", "日本", "valve " * 400])
    def test_odd_queries_still_rank_every_passage(self, retriever, query):
        found = retriever.retrieve(query, 4)
        assert len(found) == 4
        assert all(math.isfinite(scored.score) for scored in found)

    def test_k_below_one_is_refused(self, retriever):
        with pytest.raises(UsageError):
            retriever.retrieve(QUERY, 0)

    def test_no_passages_are_refused(self, embedder):
        with pytest.raises(EmptyCorpus):
            self.make([], embedder)

    def test_one_passage_is_always_found(self, passages, embedder):
        assert names(self.make(passages[:1], embedder).retrieve(QUERY, 3)) == ["pump"]


class TestBm25(ConformanceOfRetriever):
    def make(self, passages, embedder):
        return build_retriever("bm25", passages)

    def test_words_are_stemmed_and_stop_words_kept(self, retriever):
        assert names(retriever.retrieve("opening valves", 1)) == ["valve"]
        assert retriever.scores("never the").argmax() == 3

    def test_the_title_is_indexed(self, retriever):
        assert names(retriever.retrieve("alarm", 1)) == ["alarm"]

    def test_a_score_is_the_formula_of_lucene(self):
        passages = [Passage(str(index), "d", "", text, 0, 1) for index, text in enumerate(["red red fox", "a dog"])]
        idf = math.log(1 + (2 - 1 + 0.5) / (1 + 0.5))
        expected = idf * 2 / (2 + 1.5 * (1 - 0.75 + 0.75 * 3 / 2.5))
        np.testing.assert_allclose(Bm25Retriever(passages).scores("red"), [expected, 0.0], rtol=1e-6)

    def test_scripts_without_spaces_match_by_character(self):
        passages = [Passage("0", "d", "", "猫が好き", 0, 4), Passage("1", "d", "", "犬が好き", 0, 4)]
        assert Bm25Retriever(passages).scores("犬").argmax() == 1

    def test_marks_are_parts_of_words_and_may_be_composed_or_not(self):
        texts = ["Le caf\u00e9 est ferm\u00e9", "The cafe is here", "हिन्दी पंप"]
        retriever = Bm25Retriever([Passage(str(n), "d", "", text, 0, 4) for n, text in enumerate(texts)])
        assert retriever.scores("cafe\u0301").nonzero()[0].tolist() == [0]
        assert retriever.scores("हिन्दी").nonzero()[0].tolist() == [2]
        assert not retriever.scores("ह न द").any()

    def test_passages_without_a_word_score_zero(self):
        assert Bm25Retriever([Passage("0", "d", "", "?!", 0, 2)]).scores("what").tolist() == [0.0]

    def test_nothing_is_printed(self, passages, capfd):
        Bm25Retriever(passages).retrieve(QUERY, 2)
        assert capfd.readouterr() == ("", "")


class TestDense(ConformanceOfRetriever):
    def make(self, passages, embedder):
        return build_retriever("dense", passages, embedder)

    def test_a_passage_is_nearest_to_its_own_text(self, retriever, passages):
        for passage in passages:
            (best,) = retriever.retrieve(passage.indexed_text, 1)
            assert best.passage == passage
            assert best.score == pytest.approx(1.0, abs=1e-5)

    def test_given_vectors_spare_the_embedding(self, retriever, passages, embedder):
        again = DenseRetriever(passages, embedder, vectors=retriever.vectors)
        np.testing.assert_array_equal(again.scores(QUERY), retriever.scores(QUERY))

    def test_vectors_of_another_shape_are_refused(self, passages, embedder):
        with pytest.raises(UsageError, match=r"\(3, 32\)"):
            DenseRetriever(passages, embedder, vectors=np.zeros((3, 32), dtype=np.float32))


class TestHybrid(ConformanceOfRetriever):
    def make(self, passages, embedder):
        return build_retriever("hybrid", passages, embedder)

    def test_scores_are_the_weighted_sum_of_scaled_scores(self, passages, embedder):
        bm25, dense = Bm25Retriever(passages), DenseRetriever(passages, embedder)
        fused = HybridRetriever(bm25, dense, weight=0.25).scores(QUERY)
        expected = 0.25 * min_max(dense.scores(QUERY)) + 0.75 * min_max(bm25.scores(QUERY))
        np.testing.assert_allclose(fused, expected, rtol=1e-6)

    @pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
    def test_a_weight_outside_the_unit_interval_is_refused(self, passages, embedder, weight):
        with pytest.raises(UsageError):
            HybridRetriever(Bm25Retriever(passages), DenseRetriever(passages, embedder), weight=weight)

    def test_other_passages_are_refused(self, passages, embedder):
        with pytest.raises(UsageError):
            HybridRetriever(Bm25Retriever(passages[:2]), DenseRetriever(passages, embedder))


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0])), st.integers(1, 45))
def test_the_top_is_a_full_stable_sort_cut_at_k(scores, k):
    expected = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:k]
    assert top_indices(scores, k).tolist() == expected


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=32)))
def test_min_max_scales_to_the_unit_interval_and_keeps_the_order(scores):
    scaled = min_max(scores)
    assert scaled.min() == 0.0
    assert scaled.max() == (1.0 if scores.max() > scores.min() else 0.0)
    assert (np.diff(scaled[np.argsort(scores)]) >= 0).all()


def test_unknown_kinds_are_refused_with_the_known_ones(passages):
    with pytest.raises(UsageError, match="bm25, dense, hybrid"):
        build_retriever("psychic", passages)


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_kinds_that_embed_need_an_embedder(kind, passages):
    with pytest.raises(UsageError, match="embedder"):
        build_retriever(kind, passages)


def test_other_distributions_plug_in_by_entry_point(tmp_path, monkeypatch, passages):
    dist_info = tmp_path / "plugged-1.0.dist-info"
    dist_info.mkdir()
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (dist_info / "entry_points.txt").write_text("[cag.retrievers]\nreversed = plugged_retriever:build\n")
    (tmp_path / "plugged_retriever.py").write_text(
        "from cag.retrieval import Bm25Retriever\n\ndef build(passages, embedder):\n"
        "    return Bm25Retriever(passages[::-1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert available_retrievers() == [*KINDS, "reversed"]
    assert build_retriever("reversed", passages).passages == tuple(passages[::-1])


def test_everything_public_is_exported_once():
    assert len(set(cag.retrieval.__all__)) == len(cag.retrieval.__all__)
    assert all(hasattr(cag.retrieval, name) for name in cag.retrieval.__all__)


def test_bm25_does_not_start_jax(tmp_path):
    """JAX takes most of a GPU's memory when it starts, which bm25s would make it do on import."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('JAX was started')\n")
    code = "import cag.retrieval.bm25, sys; assert 'jax' not in sys.modules; import jax"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == "JAX was started"
