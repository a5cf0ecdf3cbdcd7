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


def index_of(*texts: str) -> CitationIndex:
    return CitationIndex([Doc(str(number), "", text) for number, text in enumerate(texts)], [""] * len(texts))


@pytest.mark.parametrize(
    "text, question, answer, quote",
    [
        ("密封件每十四天更换一次。夜班由张伟负责。", "谁负责夜班", "张伟", "夜班由张伟负责。"),
        ("水泵每分钟输送30升水。阀门有九个。", "多少升?", "30升", "水泵每分钟输送30升水。"),
        ("電話番号は内線4711です。住所は一丁目です。", "電話番号は?", "4711", "電話番号は内線4711です。"),
        (
            "야간 근무는 김민수가 담당한다. 밸브를 점검한다.",
            "야간 근무는 누가?",
            "김민수",
            "야간 근무는 김민수가 담당한다.",
        ),
        ("पंप हर मिनट तीस लीटर देता है। वाल्व बंद है।", "कितना?", "तीस लीटर", "पंप हर मिनट तीस लीटर देता है।"),
        (
            "Насосы стоят внизу. Ночная смена звонит Ивану.",
            "Кому?",
            "Ивану",
            "Ночная смена звонит Ивану.",
        ),
    ],
)
def test_answers_in_any_script_are_cited(text, question, answer, quote):
    cited = index_of("Nothing of it is here.", text).cite(question, answer)
    assert [citation.quote for citation in cited] == [quote]


def test_initials_end_no_sentence():
    index = index_of("It grew fast. After the war, President Charles W. Eliot changed it. Plan B. was dropped.")
    assert index.cite("Who changed it?", "Charles W. Eliot")[0].quote == (
        "After the war, President Charles W. Eliot changed it."
    )


def test_the_quote_of_a_long_sentence_holds_the_answer():
    text = (
        "name, " + ", ".join(f"item{number} costs {number} euro" for number in range(60)) + ", gadget costs 4711 euro"
    )
    quote = index_of(text + ", " + text.replace("4711", "12")).cite("What does the gadget cost?", "4711 euro")[0].quote
    assert "gadget costs 4711 euro" in quote
    assert len(quote) <= citations.MAX_QUOTE_CHARS
    assert quote.split()[0] in text.split() and quote.split()[-1].strip(",") in text.replace(",", "").split()


FACTS = [
    "The alpha gate opens at seven in the morning.",
    "Beta pumps move thirty litres every minute.",
    "Gamma valves hold twelve bar under load.",
    "Delta crews replace filters each Tuesday.",
    "Epsilon tanks store nine tons of diesel.",
]


def test_an_answer_of_many_sentences_is_cited_by_each():
    cited = index_of(*FACTS).cite("Summarize the plant.", " ".join(FACTS))
    assert len(cited) == citations.MAX_CITATIONS
    assert {citation.quote for citation in cited} < set(FACTS)
    assert [citation.score for citation in cited] == sorted((citation.score for citation in cited), reverse=True)


def test_what_the_documents_do_not_say_takes_no_citation_from_the_rest():
    hedged = "Thirty litres every minute; the text does not say how they are driven."
    assert [citation.quote for citation in index_of(*FACTS).cite("How much?", hedged)] == [FACTS[1]]


def test_marks_may_be_composed_or_not():
    index = index_of("The caf\u00e9 closes at nine.", "The pump stands still.")
    assert index.cite("When?", "cafe\u0301 at nine")[0].doc_id == "0"


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
