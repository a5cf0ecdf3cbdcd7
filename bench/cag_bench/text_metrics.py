"""Quality of an answer against the accepted ones: exact match, token F1, ROUGE-L, containment.

Each function takes a prediction and the list of accepted answers and gives the best value over them, in 0..1. An empty
list means that the question has no answer: then an empty prediction scores 1 and any other 0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ROUGE_TOKEN = re.compile(r"[a-z0-9]+")


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces.

    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, section 6.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the normalized prediction equals a normalized answer, else 0."""
    return _best(_equal, normalize_answer(prediction), [normalize_answer(answer) for answer in answers])


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of the normalized texts, counted with multiplicity."""
    return _best(_word_f1, normalize_answer(prediction), [normalize_answer(answer) for answer in answers])


def containment(prediction: str, answers: Sequence[str], all_of: Sequence[str] = ()) -> float:
    """1 when the words of a normalized answer stand, in order and without gap, in the normalized prediction, else 0.
    With `all_of`, when those of each of these do, wherever."""
    if all_of:
        return min(containment(prediction, [part]) for part in all_of)
    return _best(_contains, normalize_answer(prediction), [normalize_answer(answer) for answer in answers])


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words (lower case, letters a-z and digits, no stemming).

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3, with beta = 1.
    """
    return _best(_subsequence_f1, prediction.lower(), [answer.lower() for answer in answers])


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(score(prediction, answer) for answer in answers or [""])


def _equal(prediction: str, answer: str) -> float:
    return float(prediction == answer)


def _contains(prediction: str, answer: str) -> float:
    # An answer of articles or punctuation only would be in everything.
    return float(f" {answer} " in f" {prediction} ") if answer else _equal(prediction, answer)


def _word_f1(prediction: str, answer: str) -> float:
    predicted, expected = prediction.split(), answer.split()
    if not predicted or not expected:
        return float(predicted == expected)
    num_common = sum((Counter(predicted) & Counter(expected)).values())
    return _f1(num_common, len(predicted), len(expected))


def _subsequence_f1(prediction: str, answer: str) -> float:
    predicted, expected = ROUGE_TOKEN.findall(prediction), ROUGE_TOKEN.findall(answer)
    if not predicted or not expected:
        return _equal(prediction.strip(), answer.strip())  # other scripts have no such words, which makes none equal
    return _f1(_longest_common_subsequence(predicted, expected), len(predicted), len(expected))


def _f1(num_common: int, num_predicted: int, num_expected: int) -> float:
    return 2.0 * num_common / (num_predicted + num_expected)


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for left_word in left:
        diagonal = 0
        for column, right_word in enumerate(right, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if left_word == right_word else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]
