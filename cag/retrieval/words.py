"""Text to words for BM25, and to estimated word pieces for the length of a passage. Knows no tokenizer and no language.

Ideographs and syllabic scripts are written without spaces; each of their characters counts as a word of its own.
"""

from __future__ import annotations

import re
import unicodedata

from cag.words import EAST_ASIAN as UNSPACED
from cag.words import MARKS

WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:[{MARKS}]+[^\W{UNSPACED}]*)*")
# A common word is one piece, a long or rare one several; numbers and identifiers break up further.
PIECE = re.compile(rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]{{1,7}}|\d{{1,2}}|[^\w\s]|_")


def split_words(text: str) -> list[str]:
    """The words of `text` in lower case, in order; punctuation is dropped, one-letter words and digits stay."""
    return WORD.findall(unicodedata.normalize("NFC", text.lower()))


def estimated_piece_spans(text: str) -> list[tuple[int, int]]:
    """The character span of each estimated word piece of `text`.

    Measured against WordPiece of MiniLM: 3 % too few on technical documentation, 8 % too many on encyclopedic prose.
    """
    return [match.span() for match in PIECE.finditer(text)]
