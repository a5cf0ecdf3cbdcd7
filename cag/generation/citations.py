"""Which documents an answer rests on, found from words alone: the model is not asked to print markers.

Method. Documents are cut into sentences (literal spans). A sentence is scored by how much of the answer's and of the
question's informative words it holds (inverse document frequency over sentences, Porter stems; pairs of characters in
scripts that are written without spaces); the question's words also count, at half weight, when they stand in the
neighbouring sentences, heading or title. A sentence that holds the answer as a phrase gets a bonus, since answers are
short quotes. Sentences are then taken greedily while they cover words of the answer that no earlier one covered, and
behind them those that hold most of a sentence of the answer which these leave open. What an answer says the documents
do not hold is left out of it. An answer whose words no document holds gets no citation.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
import threading
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import Stemmer

from cag.generation.answer import Citation
from cag.generation.sentences import sentence_spans
from cag.prompt import TextDocument
from cag.words import EAST_ASIAN, MARKS, SOUTH_EAST_ASIAN

ANSWER_WEIGHT, QUESTION_WEIGHT, PHRASE_BONUS = 1.0, 1.0, 0.6
CONTEXT_FACTOR = 0.5
MIN_ANSWER_COVERAGE = 0.34
MIN_NEW_COVERAGE = 0.25
MIN_PART_COVERAGE = 0.6
MAX_CITATIONS = 3
MAX_QUOTE_CHARS = 400

_UNSPACED = EAST_ASIAN + SOUTH_EAST_ASIAN
_LETTERS = rf"[^\W{_UNSPACED}]+(?:[{MARKS}]+[^\W{_UNSPACED}]*)*"
_WORD = re.compile(rf"[{_UNSPACED}]+|{_LETTERS}(?:[.,:/'-]{_LETTERS})*")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_JOINT = re.compile(r"[.,:/'-]")
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
    """Lower-case stems of the words of `text`; compounds such as `10.4` or `run-time` also give their parts.

    What is written without spaces gives each pair of neighbouring characters and each character.
    """
    return [term for match in _WORD.finditer(text) for term in _terms_of(match[0].lower())]


def _terms_of(word: str) -> list[str]:
    if _UNSPACED_CHARACTER.match(word):
        return [*_pairs(word), *(word if len(word) > 1 else ())]
    parts = _JOINT.split(word)
    return [_stem(word), *(_stem(part) for part in parts if len(parts) > 1)]


def _pairs(word: str) -> list[str]:
    """What stands for a word in a script without spaces: its pairs of characters, or the only one."""
    return [word[at : at + 2] for at in range(max(1, len(word) - 1))]


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
        self._holders: dict[str, list[int]] = defaultdict(list)
        for number, sentence in enumerate(self.sentences):
            for term in sentence.terms:
                self._holders[term].append(number)

    def cite(self, question: str, answer: str) -> tuple[Citation, ...]:
        """Citations for an answer, best first; at most `MAX_CITATIONS`."""
        parts = _told(unicodedata.normalize("NFC", answer))
        answer, asked = " ".join(parts), set(terms(unicodedata.normalize("NFC", question)))
        chosen = self._cover(answer, asked, MIN_ANSWER_COVERAGE)
        for part in parts if len(parts) > 1 else ():
            held: set[str] = set().union(*(sentence.terms for _, sentence in chosen))
            if self._coverage(self._wanted(part), held) < MIN_ANSWER_COVERAGE:
                chosen += self._cover(part, asked, MIN_PART_COVERAGE)[:1]
        best, wanted = sorted(chosen[:MAX_CITATIONS], key=lambda item: -item[0]), self._wanted(answer)
        return tuple(self._citation(score, sentence, wanted) for score, sentence in best)

    def _wanted(self, answer: str) -> set[str]:
        """Words of the answer: compounds as a whole where the corpus has them so, in parts where it does not."""
        found: set[str] = set()
        for match in _WORD.finditer(answer):
            word = match[0].lower()
            whole, *parts = _terms_of(word)
            if _UNSPACED_CHARACTER.match(word):
                found.update(_pairs(word))
            else:
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

    def _cover(self, answer: str, asked: set[str], least: float) -> list[tuple[float, Sentence]]:
        """Scores and sentences that hold the answer together; the first holds at least the share `least` of it."""
        wanted, phrase = self._wanted(answer), _normalized(answer)
        chosen: list[tuple[float, Sentence]] = []
        covered: set[str] = set()
        for score, sentence in self._ranked(wanted, asked, phrase):
            known = wanted if not chosen else wanted & self.idf.keys()
            gain = self._coverage(known, (sentence.terms & wanted) - covered)
            if gain >= (MIN_NEW_COVERAGE if chosen else least) and len(chosen) < MAX_CITATIONS:
                chosen.append((score, sentence))
                covered |= sentence.terms & wanted
        return chosen

    def _ranked(self, wanted: set[str], asked: set[str], phrase: str) -> list[tuple[float, Sentence]]:
        """The best sentences that hold enough of the answer to be taken, best first."""
        held: dict[int, float] = defaultdict(float)
        for term in wanted & self.idf.keys():
            for number in self._holders[term]:
                held[number] += self.idf[term]
        enough = MIN_NEW_COVERAGE * self._weight(wanted & self.idf.keys()) * (1 - 1e-9)
        scored = (
            (self._score(self.sentences[number], wanted, asked, phrase), -number)
            for number, weight in held.items()
            if weight >= enough
        )
        return [(score, self.sentences[-number]) for score, number in heapq.nlargest(64, scored)]

    def _citation(self, score: float, sentence: Sentence, wanted: set[str]) -> Citation:
        document = self.documents[sentence.document]
        start, end = sentence.start, sentence.end
        if end - start > MAX_QUOTE_CHARS:
            start, end = self._window(document.text, start, end, wanted)
        quote = document.text[start:end]
        return Citation(document.doc_id, document.title, self.paths[sentence.document], quote, round(score, 4))

    def _window(self, text: str, start: int, end: int, wanted: set[str]) -> tuple[int, int]:
        """The part of a long sentence, `MAX_QUOTE_CHARS` at most, that holds most of the answer, from word to word."""
        words = [(start + match.start(), start + match.end(), match[0]) for match in _WORD.finditer(text[start:end])]
        held = [(first, last, wanted.intersection(_terms_of(word.lower()))) for first, last, word in words]
        held = [word for word in held if word[2]]
        best, place = (0.0, 0), (start, start)
        for index, (first, _, _) in enumerate(held):
            found: set[str] = set()
            behind = first
            for _, last, more in itertools.islice(held, index, None):
                if last - first > MAX_QUOTE_CHARS:
                    break
                behind = behind if more <= found else last
                found |= more
            best, place = max((best, place), ((self._weight(found), first - behind), (first, behind)))
        return _grown(place, [word[:2] for word in words], start, end)


def _told(answer: str) -> list[str]:
    """The sentences of an answer and their parts between semicolons, without those that say what no document says."""
    sentences = [answer[start:end] for start, end in sentence_spans(answer)]
    if not _REFUSAL.search(answer):
        return sentences
    return [part for sentence in sentences for part in sentence.split(";") if not _REFUSAL.search(part)]


def _normalized(text: str) -> str:
    """The words of a text, or pairs of characters, with one space between them: a phrase is a part of it."""
    words = (match[0].lower() for match in _WORD.finditer(text))
    return " ".join(" ".join(_pairs(word)) if _UNSPACED_CHARACTER.match(word) else word for word in words)


def _grown(place: tuple[int, int], words: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """`place` with what stands around it, whole words on both sides, up to `MAX_QUOTE_CHARS`."""
    room = (MAX_QUOTE_CHARS - (place[1] - place[0])) // 2
    from_, to = max(start, place[0] - room), min(end, place[1] + room)
    first = start if from_ == start else min((word[0] for word in words if word[0] >= from_), default=from_)
    last = end if to == end else max((word[1] for word in words if word[1] <= to), default=to)
    return min(first, place[0]), max(last, place[1])


def _sentences(number: int, document: TextDocument) -> Iterable[Sentence]:
    """Spans between sentence ends and line breaks, each with the terms of its neighbours, heading and title."""
    spans = list(sentence_spans(document.text))
    held = [frozenset(terms(document.text[start:end])) for start, end in spans]
    heading: frozenset[str] = frozenset()
    title = frozenset(terms(document.title))
    for index, (start, end) in enumerate(spans):
        if document.text.startswith("#", start):
            heading = held[index]
        around = [held[near] for near in (index - 1, index + 1) if 0 <= near < len(spans)]
        yield Sentence(number, start, end, held[index], title.union(heading, *around))
