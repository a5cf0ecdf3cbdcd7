"""Where the end of a text was seen before: in a text that never changes, and in one that grows.

Token ids in, a place to copy from out. The longest match wins, of up to `REACH` tokens. Knows no model: what is found
is a guess about what follows, for whoever can check it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REACH = 32  # tokens of a match that are counted; longer ones are all the same
KEY_TOKENS = 3  # of a key of the index
ID_BITS = 20  # of a token in a key: larger ids may be taken for each other, which makes a guess worse and nothing else
MOST_PLACES, MOST_OWN_PLACES = 64, 8  # that are compared, the latest ones; the latter in a text that grows

_MASK = (1 << ID_BITS) - 1
_BEFORE_ALL = -1  # stands for tokens before a text


class Match(NamedTuple):
    """`length` tokens at the end of a text stand somewhere else too, and token `place` follows them there."""

    length: int
    place: int


NO_MATCH = Match(0, 0)


class NgramIndex:
    """All places of a text, sorted by the three tokens that end there: 16 bytes a token, made by one sort.

    Looked up in interpreted code over few places: between two forwards nothing is in the processor's caches, and a
    dozen calls of array code would take ten times as long. token_ids: `[num_tokens]` integers, kept as int32.
    """

    def __init__(self, token_ids: NDArray[Any]) -> None:
        self.token_ids = token_ids.astype(np.int32)
        before = np.full(KEY_TOKENS - 1, _BEFORE_ALL)
        padded = np.concatenate((before, token_ids)).astype(np.int64) + 1 & _MASK
        keys = padded[2:] << 2 * ID_BITS | padded[1:-1] << ID_BITS | padded[:-2]
        keys = keys[:-1]  # nothing follows the last token
        order = np.argsort(keys)
        self._keys, self._places = keys[order], order.astype(np.int32) + 1  # of the token that follows
        self._ids_view, self._keys_view = self.token_ids.data, self._keys.data

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.token_ids.nbytes + self._keys.nbytes + self._places.nbytes

    def find(self, text: Sequence[int]) -> Match:
        """The longest match of the end of `text`; of equally long ones the commonest token that follows, and the latest
        place of that."""
        num_equal, places = self._places_of_key(text)
        if num_equal == KEY_TOKENS:
            lengths = [_match_length(text, self._ids_view, place) for place in places]
            num_equal = max(lengths)
            places = [place for place, length in zip(places, lengths, strict=True) if length == num_equal]
        return Match(num_equal, self._commonest(places)) if places else NO_MATCH

    def _places_of_key(self, text: Sequence[int]) -> tuple[int, list[int]]:
        """The latest places behind the last three tokens, or else the last two, or the last; and which it was."""
        key = 0
        for token in [*text[: -KEY_TOKENS - 1 : -1], *[_BEFORE_ALL] * KEY_TOKENS][:KEY_TOKENS]:
            key = key << ID_BITS | (token + 1 & _MASK)
        for num_equal in range(min(KEY_TOKENS, len(text)), 0, -1):
            bits = (KEY_TOKENS - num_equal) * ID_BITS
            first = bisect_left(self._keys_view, key >> bits << bits)
            last = bisect_left(self._keys_view, (key >> bits) + 1 << bits, first)
            if first < last:
                return num_equal, np.sort(self._places[first:last])[-MOST_PLACES:].tolist()
        return 0, []

    def _commonest(self, places: list[int]) -> int:
        """Of places in the order of the text, the last one with the commonest token."""
        if len(places) == 1:
            return places[0]
        tokens = [self._ids_view[place] for place in places]
        counts = Counter(tokens)
        return max(zip((counts[token] for token in tokens), places, strict=True))[1]


class GrowingText:
    """A text that grows by single tokens, with all places of its runs of one to three.

    Attributes:
        token_ids: so far.
    """

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.token_ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        for token in token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """One token more; the runs that ended before it have a continuation now."""
        ids, place = self.token_ids, len(self.token_ids)
        for length in range(1, min(KEY_TOKENS, place) + 1):
            self._places.setdefault(tuple(ids[-length:]), []).append(place)
        ids.append(token)

    def find(self) -> Match:
        """The longest earlier match of the end; the latest of equally long ones."""
        for length in range(min(KEY_TOKENS, len(self.token_ids)), 0, -1):
            if places := self._places.get(tuple(self.token_ids[-length:])):
                return self._longest(places[-MOST_OWN_PLACES:]) if length == KEY_TOKENS else Match(length, places[-1])
        return NO_MATCH

    def copied(self, place: int, count: int) -> list[int]:
        """`count` tokens from `place` on; behind the end it goes on with what it copied: repetitions repeat."""
        copied = self.token_ids[place : place + count]
        period = len(copied)
        return [copied[index % period] for index in range(count)] if period else []

    def _longest(self, places: list[int]) -> Match:
        best = NO_MATCH
        for place in reversed(places):
            length = _match_length(self.token_ids, self.token_ids, place)
            if length > best.length:
                best = Match(length, place)
            if length == REACH:
                break
        return best


def _match_length(text: Sequence[int], other: Sequence[int] | memoryview, place: int) -> int:
    """How many tokens before `place` of `other` are the last ones of `text`, where three are known to be."""
    length, most = KEY_TOKENS, min(place, len(text), REACH)
    while length < most and other[place - 1 - length] == text[-1 - length]:
        length += 1
    return length
