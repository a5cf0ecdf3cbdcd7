"""Which documents an answer rests on, found from words alone: the model is not asked to print markers.

Method. Documents are cut into sentences (literal spans). A sentence is scored by how much of the answer's and of the
question's informative words it holds (inverse document frequency over sentences, Porter stems); the question's words
also count, at half weight, when they stand in the neighbouring sentences, heading or title. A sentence that holds the
answer as a phrase gets a bonus, since answers are short quotes. Sentences are then taken greedily while they cover
words of the answer that no earlier one covered. An answer whose words no document holds gets no citation.
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import Stemmer

from cag.generation.answer import Citation
from cag.prompt import TextDocument

ANSWER_WEIGHT, QUESTION_WEIGHT, PHRASE_BONUS = 1.0, 1.0, 0.6
CONTEXT_FACTOR = 0.5
MIN_ANSWER_COVERAGE = 0.34
MIN_NEW_COVERAGE = 0.25
MAX_CITATIONS = 3
MAX_QUOTE_CHARS = 400

_WORD = re.compile(r"\w+(?:[.,:/'-]\w+)*", re.UNICODE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[A-Z0-9`*_])|\n+")
_REFUSAL = re.compile(
    r"\b(documents?|text|context) (do|does|did)(n't| not) (say|contain|mention|state|provide|hold)", re.I
)


class _Stemmers(threading.local):
    """A stemmer for each thread: such an object is not safe to share, and a server cites in many."""

    def __init__(self) -> None:
        self.own = Stemmer.Stemmer("english")


_STEMMERS = _Stemmers()


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return str(_STEMMERS.own.stemWord(word))


def terms(text: str) -> list[str]:
    """Lower-case stems of the words of `text`; compounds such as `10.4` or `run-time` also give their parts."""
    found = []
    for match in _WORD.finditer(text.lower()):
        word = match.group()
        found.append(_stem(word))
        parts = re.split(r"[.,:/'-]", word)
        if len(parts) > 1:
            found.extend(_stem(part) for part in parts)
    return found


@dataclass(frozen=True)
class Sentence:
    """A literal span `[start, end)` of a document's text with its terms and those of its surroundings."""

    document: int
    start: int
    end: int
    terms: frozenset[str]
    context: frozenset[str]


class CitationIndex:
    """Sentences of a corpus, ready to be scored against answers."""

    def __init__(self, documents: Sequence[TextDocument], paths: Sequence[str]) -> None:
        self.documents = documents
        self.paths = paths
        self.sentences = [s for number, document in enumerate(documents) for s in _sentences(number, document)]
        counts = Counter(term for sentence in self.sentences for term in sentence.terms)
        total = len(self.sentences)
        self.idf = {term: math.log(1 + total / count) for term, count in counts.items()}
        self.unseen_idf = math.log(1 + total)

    def cite(self, question: str, answer: str) -> tuple[Citation, ...]:
        """Citations for an answer, best first; at most `MAX_CITATIONS`."""
        wanted = self._wanted(answer)
        if not wanted or _REFUSAL.search(answer):
            return ()
        asked = set(terms(question))
        phrase = _normalized(answer)
        ranked = sorted(
            ((self._score(s, wanted, asked, phrase), -number, s) for number, s in enumerate(self.sentences)),
            key=lambda item: item[:2],
            reverse=True,
        )
        return self._cover(wanted, [(score, sentence) for score, _, sentence in ranked[:64]])

    def _wanted(self, answer: str) -> set[str]:
        """Words of the answer: compounds as a whole where the corpus has them so, in parts where it does not."""
        found: set[str] = set()
        for match in _WORD.finditer(answer.lower()):
            whole, *parts = terms(match.group())
            found.update([whole] if whole in self.idf or not parts else parts)
        return found

    def _weight(self, group: Iterable[str]) -> float:
        return sum(self.idf.get(term, self.unseen_idf) for term in group)

    def _coverage(self, wanted: set[str], held: frozenset[str] | set[str]) -> float:
        return self._weight(wanted & held) / self._weight(wanted) if wanted else 0.0

    def _score(self, sentence: Sentence, wanted: set[str], asked: set[str], phrase: str) -> float:
        """In [0, 1]: weighted share of the answer and of the question that the sentence holds."""
        answered = self._coverage(wanted, sentence.terms)
        if answered == 0:
            return 0.0
        beside = self._coverage(asked, sentence.context - sentence.terms)
        question = self._coverage(asked, sentence.terms) + CONTEXT_FACTOR * beside
        text = self.documents[sentence.document].text[sentence.start : sentence.end]
        bonus = PHRASE_BONUS if phrase and f" {phrase} " in f" {_normalized(text)} " else 0.0
        total = ANSWER_WEIGHT * answered + QUESTION_WEIGHT * min(question, 1.0) + bonus
        return total / (ANSWER_WEIGHT + QUESTION_WEIGHT + PHRASE_BONUS)

    def _cover(self, wanted: set[str], ranked: list[tuple[float, Sentence]]) -> tuple[Citation, ...]:
        chosen: list[tuple[float, Sentence]] = []
        covered: set[str] = set()
        for score, sentence in ranked:
            known = wanted if not chosen else wanted & self.idf.keys()
            gain = self._coverage(known, (sentence.terms & wanted) - covered)
            needed = MIN_NEW_COVERAGE if chosen else MIN_ANSWER_COVERAGE
            if gain >= needed and len(chosen) < MAX_CITATIONS:
                chosen.append((score, sentence))
                covered |= sentence.terms & wanted
        return tuple(self._citation(score, sentence) for score, sentence in chosen)

    def _citation(self, score: float, sentence: Sentence) -> Citation:
        document = self.documents[sentence.document]
        quote = document.text[sentence.start : sentence.end][:MAX_QUOTE_CHARS]
        return Citation(document.doc_id, document.title, self.paths[sentence.document], quote, round(score, 4))


def _normalized(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _sentences(number: int, document: TextDocument) -> Iterable[Sentence]:
    """Spans between sentence ends and line breaks, each with the terms of its neighbours, heading and title."""
    spans = list(_spans(document.text))
    held = [frozenset(terms(document.text[start:end])) for start, end in spans]
    heading: frozenset[str] = frozenset()
    title = frozenset(terms(document.title))
    for index, (start, end) in enumerate(spans):
        if document.text.startswith("#", start):
            heading = held[index]
        around = [held[near] for near in (index - 1, index + 1) if 0 <= near < len(spans)]
        yield Sentence(number, start, end, held[index], title.union(heading, *around))


def _spans(text: str) -> Iterable[tuple[int, int]]:
    at = 0
    for match in [*_SENTENCE_END.finditer(text), None]:
        end = match.start() if match else len(text)
        stripped = text[at:end].strip()
        if stripped:
            start = text.index(stripped, at)
            yield start, start + len(stripped)
        at = match.end() if match else end
