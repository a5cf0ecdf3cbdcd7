"""Matches of the end of a text, against a search that looks at every place."""

import random

import numpy as np
import pytest

from cag.ngrams import ID_BITS, MOST_PLACES, NO_MATCH, REACH, GrowingText, NgramIndex


def length_of(text, corpus, place):
    """Tokens before `place` of `corpus` that are the last of `text`, at most `REACH`."""
    length = 0
    while length < min(place, len(text), REACH) and corpus[place - 1 - length] == text[-1 - length]:
        length += 1
    return length


def places_of_longest(text, corpus):
    """The longest match's length, and where what follows it stands."""
    lengths = {place: length_of(text, corpus, place) for place in range(1, len(corpus))}
    longest = max(lengths.values(), default=0)
    return longest, [place for place, length in lengths.items() if longest and length == longest]


def random_text(chance, num_tokens, num_kinds):
    return [chance.randrange(num_kinds) for _ in range(num_tokens)]


@pytest.mark.parametrize("num_kinds", [1, 2, 5, 40])
def test_the_index_finds_the_longest_match_and_its_commonest_continuation(num_kinds):
    chance = random.Random(num_kinds)
    for _ in range(60):
        corpus = random_text(chance, chance.choice([1, 2, 3, 30, MOST_PLACES]), num_kinds)
        text = random_text(chance, chance.choice([1, 2, 3, 40]), num_kinds)
        if chance.random() < 0.5 and len(corpus) > 10:  # a quote
            text += corpus[3:9]
        found = NgramIndex(np.array(corpus)).find(text)
        longest, places = places_of_longest(text, corpus)
        assert found.length == longest
        if longest:
            follows = [corpus[place] for place in places]
            most = max(follows.count(token) for token in follows)
            assert found.place == [place for place in places if follows.count(corpus[place]) == most][-1]


@pytest.mark.parametrize("num_kinds", [2, 3, 40])
def test_of_many_places_the_latest_are_compared(num_kinds):
    """A match is what it says, and no key of three tokens is overlooked."""
    chance = random.Random(num_kinds)
    for _ in range(40):
        corpus, text = random_text(chance, 2000, num_kinds), random_text(chance, 40, num_kinds)
        found = NgramIndex(np.array(corpus)).find(text)
        longest, places = places_of_longest(text, corpus)
        assert found.length == length_of(text, corpus, found.place) or found.length < 3
        assert min(longest, 3) <= found.length <= longest
        if len(places) <= MOST_PLACES and num_kinds == 40:
            assert found.place in places


@pytest.mark.parametrize("num_kinds", [2, 5, 40])
def test_a_growing_text_finds_its_own_earlier_words(num_kinds):
    """Of three tokens and more only the latest eight places are compared: the texts here are too short for more."""
    chance = random.Random(num_kinds)
    for _ in range(60):
        ids = random_text(chance, chance.choice([1, 2, 3, 12]), num_kinds)
        found = GrowingText(ids).find()
        longest, places = places_of_longest(ids, ids)
        assert found.length == longest
        assert found.place == (places[-1] if longest else 0)


def test_a_text_that_nothing_is_like():
    assert NgramIndex(np.array([1, 2, 3])).find([7, 8, 9]) == NO_MATCH
    assert NgramIndex(np.array([5])).find([5]) == NO_MATCH  # nothing follows it there
    assert NgramIndex(np.array([], dtype=np.int64)).find([5]) == NO_MATCH
    assert NgramIndex(np.array([1, 2])).find([]) == NO_MATCH
    assert GrowingText().find() == GrowingText([4]).find() == NO_MATCH


def test_tokens_before_a_text_are_like_nothing():
    """A text that is shorter than a key does not match the beginning of another because both have nothing there."""
    assert NgramIndex(np.array([0, 1, 2, 9, 0, 1, 3])).find([0, 1]).length == 2
    assert NgramIndex(np.array([5, 6, 7])).find([5]) == (1, 1)


def test_ids_that_share_a_key_are_told_apart_or_harmless():
    far = 1 << ID_BITS
    found = NgramIndex(np.array([far + 3, 4, 5, 6, 3, 4, 5, 8])).find([1, 3, 4, 5])
    assert found.place == 7


def test_repetitions_repeat():
    text = GrowingText([9, 1, 2, 3, 1, 2, 3])
    found = text.find()
    assert (found.length, found.place) == (3, 4)
    assert text.copied(found.place, 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert text.copied(1, 2) == [1, 2]


def test_the_index_takes_sixteen_bytes_a_token():
    assert NgramIndex(np.arange(10_000)).num_bytes <= 16 * 10_000 + 4 * REACH
