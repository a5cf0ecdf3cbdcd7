"""A tiny engine, a small corpus with questions, and samples made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cag_bench.measure import Sample
from tiny import write_tiny_model

TEXTS = {
    "alpha.md": "# Alpha\n\nThe alpha gate opens at seven in the morning. Its code is 4711.\n",
    "beta.txt": "The beta pump moves 30 litres a minute and is painted green.\n",
    "delta.md": "# Delta\n\nDelta valves are checked every 14 days by the night crew.\n",
    "omega.txt": "Nobody has seen the omega key since Tuesday.\n",
}
QUESTIONS = [
    {"qid": "q1", "question": "What is the code of the alpha gate?", "answers": ["4711"], "doc_ids": ["alpha.md"]},
    {"qid": "q2", "question": "What colour is the beta pump?", "answers": ["green"], "doc_ids": ["beta.txt"]},
    {"qid": "q3", "question": "Who owns the omega key?", "answers": [], "doc_ids": []},
]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def bench_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache home, and one thread."""
    monkeypatch.setenv("CAG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CAG_THREADS", "1")
    return tmp_path / "home"


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


@pytest.fixture
def tiny_engine(tiny_model_dir: Path, bench_home: Path, tmp_path: Path):
    from cag.engine import Engine

    return Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cpu")


@pytest.fixture
def make_sample():
    def make(arm: str, question_index: int, ttft_s: float, **changes: object) -> Sample:
        fields = {
            "position": 0,
            "qid": f"q{question_index}",
            "question": "?",
            "answer": "!",
            "finish_reason": "stop",
            "retrieve_s": 0.0,
            "load_s": 0.0,
            "prefill_s": ttft_s,
            "tpot_s": 0.01,
            "total_s": ttft_s + 0.05,
            "prompt_tokens": 110,
            "cached_tokens": 100,
            "computed_tokens": 10,
            "completion_tokens": 6,
            "em": 1.0,
            "f1": 1.0,
            "rouge_l": 1.0,
            "containment": 1.0,
            "answers": ("!",),
            "retrieved_doc_ids": None,
            "retrieved_passage_ids": None,
            "gold_retrieved": None,
            "page_cache_dropped": None,
            "read_s": None,
            "load_average": (0.0, 0.0, 0.0),
            "measured_at": 0.0,
        }
        return Sample(arm=arm, question_index=question_index, ttft_s=ttft_s, **fields | changes)

    return make
