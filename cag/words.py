"""Of which characters the words of a text are made, whatever its language. Knows no tokenizer."""

from __future__ import annotations

import unicodedata

_MARKS_END = 0x1E00  # behind it, marks stand in scripts that are out of use, or beside no letter
# Vowel signs, accents and tone marks that follow a letter: no word characters to `re`, and parts of words.
MARKS = "".join(chr(code) for code in range(0x300, _MARKS_END) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
# Kana, CJK ideographs, Hangul syllables.
EAST_ASIAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# Thai and Lao, Myanmar, Khmer with their vowel signs: written without spaces too, but not one word a character.
SOUTH_EAST_ASIAN = "\u0e00-\u0e3a\u0e40-\u0eff\u1000-\u109f\u1780-\u17ff"
