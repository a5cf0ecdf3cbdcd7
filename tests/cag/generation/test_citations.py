"""Citations: the right document, and quotes that are literal spans of it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cag.generation import citations
from cag.generation.citations import CitationIndex, terms


@dataclass(frozen=True)
class Doc:
    doc_id: str
    title: str
    text: str


DOCS = [
    Doc(
        "pumps",
        "Pumps",
        "# Pumps\n\nThe beta pump moves 30 litres a minute. It is green.\n\nReplace seals every 14 days.",
    ),
    Doc(
        "valves", "Valves", "# Valves\n\nDelta valves are checked every 30 days by the night crew.\nThey hold 12.5 bar."
    ),
    Doc("gates", "Gates", "The alpha gate opens at seven. Its code is 4711. Call Mara Lind at night."),
]
INDEX = CitationIndex(DOCS, [f"{document.doc_id}.md" for document in DOCS])


@pytest.mark.parametrize(
    "question, answer, doc_id, part",
    [
        ("How much does the beta pump move?", "30 litres", "pumps", "30 litres a minute"),
        ("How often are delta valves checked?", "every 30 days", "valves", "30 days"),
        ("How often must seals be replaced?", "every 14 days", "pumps", "14 days"),
        ("What pressure do the valves hold?", "12.5 bar", "valves", "12.5 bar"),
        ("Who is called at night?", "Mara Lind", "gates", "Mara Lind"),
        ("What is the code of the gate?", "The code is 4711.", "gates", "4711"),
    ],
)
def test_cites_the_document_that_holds_the_answer(question, answer, doc_id, part):
    best = INDEX.cite(question, answer)[0]
    assert best.doc_id == doc_id
    assert part in best.quote
    assert best.path == f"{doc_id}.md"
    assert 0 < best.score <= 1


def test_an_answer_from_two_documents_cites_both():
    cited = INDEX.cite("What are the gate's code and the pressure of the valves?", "4711 and 12.5 bar")
    assert {citation.doc_id for citation in cited} == {"gates", "valves"}


@pytest.mark.parametrize("answer", ["", "The documents do not say.", "Zanzibar elephants", "..."])
def test_answers_that_rest_on_nothing_cite_nothing(answer):
    assert INDEX.cite("How often are delta valves checked?", answer) == ()


@given(st.lists(st.text(max_size=200), min_size=1, max_size=4), st.text(max_size=60), st.text(max_size=60))
def test_quotes_are_literal_spans_whatever_the_text(texts, question, answer):
    documents = [Doc(str(number), "", text) for number, text in enumerate(texts)]
    for citation in CitationIndex(documents, [""] * len(texts)).cite(question, answer):
        assert citation.quote
        assert citation.quote in texts[int(citation.doc_id)]


def test_each_thread_has_a_stemmer_of_its_own():
    both_there = threading.Barrier(2)

    def stemmer(_):
        both_there.wait(10)
        return citations._STEMMERS.own

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(stemmer, range(2))
    assert first is not second
    assert first.stemWord("running") == second.stemWord("running") == "run"


def test_terms_keep_compounds_and_their_parts():
    assert set(terms("Version 10.4 run-time")) >= {"10.4", "10", "4", "run-tim", "run", "time"}
