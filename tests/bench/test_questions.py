from __future__ import annotations

import gzip
import json

import pytest

from cag.errors import UsageError
from cag_bench.questions import Question, load_questions

ROWS = [
    {"qid": "a", "question": "Why?", "answers": ["so"], "doc_ids": ["d1"], "pids": ["d1#0"], "level": "hard"},
    {"question": "How?", "all_of": ["this", "that"]},
]
EXPECTED = [
    Question("a", "Why?", ("so",), ("d1",), ("d1#0",)),
    Question("2", "How?", (), (), (), ("this", "that")),
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, b"\xef\xbb\xbf".__add__])
def test_plain_and_gzip_files_give_the_same_questions(tmp_path, pack):
    path = tmp_path / "questions"
    path.write_bytes(pack(lines(ROWS)))
    assert load_questions(path) == EXPECTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no questions"),
        (b"\n \n", "holds no questions"),
        (b'{"question": "Why?"}\n{"question": ', "line 2 is not JSON"),
        (b'["Why?"]\n', 'line 1 has no "question"'),
        (b'{"question": "  "}\n', 'line 1 has no "question"'),
        (b'{"question": 3}\n', 'line 1 has no "question"'),
        (b'{"question": "Why?", "answers": "so"}\n', "line 1 has 'answers'"),
        (b'{"question": "Why?", "answers": [1]}\n', "line 1 has 'answers'"),
        (b'{"question": "Why?", "answers": ["a\\ud800"]}\n', "line 1 has half of a surrogate pair"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (gzip.compress(lines(ROWS), mtime=0)[:-12], "cannot be read"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_questions(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        load_questions(tmp_path / "nowhere.jsonl")


def test_shared_question_sets_can_be_read(shared_data):
    questions = load_questions(shared_data / "dev/squad/tiny4k/questions.jsonl")
    assert len(questions) == 85
    assert all(question.answers and question.doc_ids and question.passage_ids for question in questions)
    assert not any(question.answers for question in load_questions(shared_data / "docs_corpus/unanswerable.jsonl"))
