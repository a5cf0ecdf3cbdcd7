"""Where the end of a text was seen before: in a text that never changes, and in one that grows.

Token ids in, a place to copy from out. The longest match wins, of up to `REACH` tokens. Knows no model: what is found
is a guess about what follows, for whoever can check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

REACH = 32  # tokens of a match that are counted; longer ones are all the same
KEY_TOKENS = 3  # of a key of the index
ID_BITS = 20  # of a token in a key: larger ids may be taken for each other, which makes a guess worse and nothing else
MOST_PLACES = 1024  # that are compared, the latest ones
MOST_OWN_PLACES = 8  # the same in a text that grows, in interpreted code

_MASK = (1 << ID_BITS) - 1
_BEFORE_ALL, _NEVER = -1, -2  # stand for tokens before a text, and for what equals nothing


class Match(NamedTuple):
    """`length` tokens at the end of a text stand somewhere else too, and token `place` follows them there."""

    length: int
    place: int


NO_MATCH = Match(0, 0)


class NgramIndex:
    """All places of a text, sorted by the three tokens that end there: 16 bytes a token, made by one sort.

    token_ids: `[num_tokens]` integers, kept as int32.
    """

    def __init__(self, token_ids: NDArray[Any]) -> None:
        self._padded = np.concatenate((np.full(REACH, _BEFORE_ALL, np.int32), token_ids.astype(np.int32)))
        self.token_ids = self._padded[REACH:]
        ids = self._padded[REACH - KEY_TOKENS + 1 :].astype(np.int64) + 1 & _MASK
        keys = ids[2:] << 2 * ID_BITS | ids[1:-1] << ID_BITS | ids[:-2]
        keys = keys[:-1]  # nothing follows the last token
        order = np.argsort(keys)
        self._ends, self._keys = order.astype(np.int32), keys[order]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in (self._padded, self._ends, self._keys))

    def find(self, text: Sequence[int]) -> Match:
        """The longest match of the end of `text`; of equally long ones the commonest token that follows, and the latest
        place of that."""
        recent = np.full(REACH + 1, _NEVER, np.int32)  # the latest token first, and what ends every comparison
        last = text[-REACH:]
        recent[: len(last)] = last[::-1]
        num_equal, ends = self._ends_of_key(recent)
        if not len(ends):
            return NO_MATCH
        if num_equal == KEY_TOKENS:
            seen = self._padded[ends[:, None] + (REACH - np.arange(REACH + 1))]
            seen[:, REACH] = _BEFORE_ALL
            lengths = (seen != recent).argmax(axis=1)
            num_equal = int(lengths.max())
            ends = ends[lengths == num_equal]
        return Match(num_equal, self._commonest(ends + 1))

    def _ends_of_key(self, recent: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """The latest places where the last three tokens end, or else the last two, or the last; and which it was."""
        one, two, three = (int(token) + 1 & _MASK for token in recent[:KEY_TOKENS])
        key = one << 2 * ID_BITS | two << ID_BITS | three
        bounds = [key, key + 1]
        for bits in (ID_BITS, 2 * ID_BITS):
            bounds += [key >> bits << bits, (key >> bits) + 1 << bits]
        found = np.searchsorted(self._keys, bounds).tolist()
        for num_equal, first, last in zip((3, 2, 1), found[::2], found[1::2], strict=True):
            if first < last:
                return num_equal, np.sort(self._ends[first:last])[-MOST_PLACES:]
        return 0, self._ends[:0]

    def _commonest(self, places: NDArray[Any]) -> int:
        """Of places in the order of the text, the last one with the commonest token."""
        if len(places) == 1:
            return int(places[0])
        _, kinds, counts = np.unique(self.token_ids[places], return_inverse=True, return_counts=True)
        often = counts[kinds]
        return int(places[np.flatnonzero(often == often.max())[-1]])


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
            length = self._length(place)
            if length > best.length:
                best = Match(length, place)
            if length == REACH:
                break
        return best

    def _length(self, place: int) -> int:
        """How many tokens before `place` are the last ones of the text."""
        ids, length = self.token_ids, KEY_TOKENS
        most = min(place, REACH)
        while length < most and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        return length
