from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cag_bench.text_metrics import containment, exact_match, normalize_answer, rouge_l, token_f1

METRICS = (exact_match, token_f1, containment, rouge_l)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat,  a dog & AN  owl!", "cat dog owl"),
        ("16,000 species", "16000 species"),
        ("U.S.-based", "usbased"),
        ("another theatre", "another theatre"),
        ("the", ""),
    ],
)
def test_normalization_is_that_of_squad(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0),
        ("Eiffel", ["eiffel tower"], 0.0),
        ("Paris", ["London", "paris!"], 1.0),
        ("", [], 1.0),
        ("something", [], 0.0),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("the cat sat", ["a cat sat down"], 0.8),
        ("cat cat cat", ["cat"], 0.5),
        ("cat", ["dog"], 0.0),
        ("in 1999", ["1998", "1999"], 2 / 3),
        ("", ["cat"], 0.0),
        ("the", ["a"], 1.0),
        ("", [], 1.0),
        ("cat", [], 0.0),
    ],
)
def test_token_f1(prediction, answers, expected):
    assert token_f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It was built by Gustave Eiffel, in 1889.", ["gustave eiffel"], 1.0),
        ("It expires after 120 minutes.", ["20 minutes"], 0.0),
        ("Gustave, not Eiffel", ["Gustave Eiffel"], 0.0),
        ("the key is rotated", ["never", "The key"], 1.0),
        ("nothing of the kind", ["the"], 0.0),
        ("", [], 1.0),
        ("I do not know", [], 0.0),
    ],
)
def test_containment_is_of_whole_words(prediction, answers, expected):
    assert containment(prediction, answers) == expected


def test_containment_of_several_wants_all_of_them_in_any_order():
    wanted = ("61117", "18877", "16533")
    assert containment("16533, 61117 and 18877.", ["61117, 18877, 16533"]) == 0.0
    assert containment("16533, 61117 and 18877.", ["61117, 18877, 16533"], wanted) == 1.0
    assert containment("61117, 18877", ["61117, 18877, 16533"], wanted) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # The example of Lin 2004, section 3.1: "police kill the gunman" keeps 3 of 4 words in order, the other 2.
        ("police kill the gunman", ["police killed the gunman"], 0.75),
        ("the gunman kill police", ["police killed the gunman"], 0.5),
        ("the quick brown fox", ["the fox is quick and brown"], 2 * 3 / 10),
        ("A-B", ["a b"], 1.0),
        ("cat", ["dog"], 0.0),
        ("?", ["dog"], 0.0),
        # No word of the package's alphabet on either side: equal texts agree, others do not.
        ("上海", ["北京"], 0.0),
        ("北京 ", ["上海", "北京"], 1.0),
        ("?", ["Ж"], 0.0),
        ("", [], 1.0),
    ],
)
def test_rouge_l(prediction, answers, expected):
    assert rouge_l(prediction, answers) == pytest.approx(expected)


@given(st.text(alphabet="ab12 the.,'", max_size=40), st.lists(st.text(alphabet="ab12 the.,'", max_size=20), max_size=3))
def test_values_stay_in_bounds_and_agree(prediction, answers):
    assert all(0.0 <= metric(prediction, answers) <= 1.0 for metric in METRICS)
    if exact_match(prediction, answers) == 1.0:
        assert token_f1(prediction, answers) == containment(prediction, answers) == 1.0


@given(st.text(alphabet="aZé日 0.-\n\u0130 the", max_size=60))
def test_every_metric_gives_a_text_full_marks_against_itself(text):
    assert all(metric(text, ["zzz", text]) == 1.0 for metric in METRICS)


WORDS = st.lists(
    st.sampled_from(["The", "an", "cat", "cat.", "DOG", "1,999", "U.S.", "Beyoncé", "x_y", "-"]), max_size=8
)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_exact_match_and_f1_are_those_of_squad_written_down_another_way(words, answers):
    """Characters and lists instead of patterns and counters, precision and recall instead of one fraction."""

    def kept(text):
        letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return [word for word in letters.split() if word not in ("a", "an", "the")]

    def f1(predicted, expected):
        rest, common = list(expected), 0
        for word in predicted:
            if word in rest:
                rest.remove(word)
                common += 1
        if not common:
            return float(predicted == expected)
        precision, recall = common / len(predicted), common / len(expected)
        return 2 * precision * recall / (precision + recall)

    prediction, accepted = " ".join(words), [" ".join(answer) for answer in answers]
    pairs = [(kept(prediction), kept(answer)) for answer in accepted]
    assert exact_match(prediction, accepted) == max(float(left == right) for left, right in pairs)
    assert token_f1(prediction, accepted) == pytest.approx(max(f1(*pair) for pair in pairs))
