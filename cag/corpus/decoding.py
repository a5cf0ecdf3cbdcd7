"""Bytes of a text file to characters, without guessing.

Order: a byte order mark (UTF-8, UTF-16, UTF-32); then strict UTF-8; then the encoding that the file itself declares
(HTML, XML, Python). Anything else is refused: a guessed 8-bit encoding never fails, so a wrong guess would be silent
mojibake.
"""

from __future__ import annotations

import codecs
import re

_SIGNATURES = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a zip archive or an office document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old office document (.doc, .xls, .ppt)"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program"),
)
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECLARATION = re.compile(rb"(?:charset|encoding|coding)[ \t]*[=:][ \t]*[\"']?([A-Za-z0-9._-]{2,32})")
_DECLARABLE = re.compile(r"(iso8859|cp125|cp874|ascii|utf-?8|shift_jis|cp932|euc|gb|big5|koi8|mac-roman).*")
# The WHATWG encoding standard reads these labels as Windows-1252, which is what such pages hold.
_READ_AS_CP1252 = {"iso8859-1", "ascii"}
_NAME_IT = "Give it the extension of its real type, or save it as text."
_CONVERT_IT = "Convert it to UTF-8 (iconv -f WINDOWS-1252 -t UTF-8)."
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


class NotTextError(ValueError):
    """The bytes are not text in an encoding that is known for certain. For a user: the message is the reason, `hint`
    what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def decode_text(content: bytes, *, allow_declared: bool = False) -> str:
    """The characters of a text file, without a byte order mark.

    allow_declared: accept the 8-bit or East Asian encoding that the first 2,048 bytes declare.

    Raises: NotTextError for binary data, for bytes that are not what their mark says, and for unknown encodings.
    """
    for signature, kind in _SIGNATURES:
        if content.startswith(signature):
            raise NotTextError(f"its content is {kind}, not text", _NAME_IT)
    text = _decode(content, allow_declared)
    num_controls = sum(1 for _ in _CONTROL.finditer(text))
    if "\x00" in text or num_controls > 8 + len(text) // 100:
        raise NotTextError("its content is binary, not text", _NAME_IT)
    return text


def _decode(content: bytes, allow_declared: bool) -> str:
    try:
        for mark, encoding in _BYTE_ORDER_MARKS:
            if content.startswith(mark):
                return content.decode(encoding)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        declared = _declared_encoding(content) if allow_declared else None
        if declared is None:
            raise NotTextError(f"byte {error.start} is not valid {error.encoding.upper()}", _CONVERT_IT) from error
    try:
        return content.decode(declared)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not valid {declared}, the encoding it declares"
        raise NotTextError(reason, _CONVERT_IT) from error


def _declared_encoding(content: bytes) -> str | None:
    found = _DECLARATION.search(content[:2048])
    if found is None:
        return None
    try:
        name = codecs.lookup(found.group(1).decode("ascii")).name
    except LookupError:
        return None
    if name in _READ_AS_CP1252:
        return "cp1252"
    return name if _DECLARABLE.fullmatch(name) else None
