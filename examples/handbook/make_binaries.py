"""Write the .pdf and .docx documents of the sample handbook from the text below.

In: nothing but this file. Out: four files under ``docs/``, the same bytes on every run with the same versions of
Python, zlib and python-docx. The PDFs are written by hand: one page, standard font, plain content stream.

Run ``python examples/handbook/make_binaries.py [DIRECTORY]``; without an argument it writes beside itself.
"""

from __future__ import annotations

import datetime
import io
import sys
import textwrap
import zipfile
from pathlib import Path

import docx

STAMP = datetime.datetime(2026, 2, 3, 12, 0, 0)
LINE_CHARS, FONT_SIZE, LEADING = 84, 11, 15  # characters, points, points

AMMONIA = """
Ammonia in the cellar

Ripening rinds give off ammonia. A little is normal; too much burns eyes and lungs. Every bay has an ammonia cell,
and the lamp above the door shows the highest reading.

At 18 ppm the hub raises an Amber alarm and the lamp turns yellow.

At 32 ppm it raises a Red alarm and opens the roof damper.

At 50 ppm everybody must leave the cellar at once.

Nobody goes back in before the reading is below 12 ppm.

Masks hang in the green box to the left of every cellar door. Put one on outside, never inside.

Never go in alone to help somebody. Ring the bell by the door and wait for a second person.

Rounds are not resumed by themselves after a Red alarm for ammonia. A Warden has to release the cellar.
"""

RAILS = """
Laying the rails of the turner

The two rails lie on the floor, 62 cm apart, and lead past every bay to the dock.

Begin at the dock. It needs 1.9 m of straight rail in front of it.

Tighten every rail bolt with 22 Nm, from the middle outwards.

At a joint, the gap may be 0.8 mm at most. Check it with the gauge from the crate.

A bend must have a radius of at least 2.2 m. If the turner squeals, the bend is too tight.

Screw an end stop to the floor 30 cm before the wall. Glue alone does not hold.

Last, let the turner make three trial runs with an empty fork. It measures the rails and draws the map that the Desk
shows under Works > Map. Whenever a rail has been moved, the map has to be drawn again.
"""

ESCALATION = """
# Who is called, and when

An alarm calls the Ripener on duty first. An Amber alarm goes no further than that.

If nobody acknowledges a Red alarm in time, the hub calls the Warden on call. If that does not help either, it calls
the neighbour 25 minutes later: somebody who has a key and need not know anything about cheese.

# Calling us

The day desk of Hask & Orrin has extension 7704. The night desk has extension 7731 and is open to sites with the
Watch plan. Say the site name, the code and the bay, in this order.

# The list

The list of people is kept under People > On Call. Duty changes hands on Fridays at noon. Whoever hands over leaves
the pager in the cradle and signs the book.
"""

SPARE_PARTS = """
# Spare parts

Order by part number. Orders that reach us before 11:00 leave the house on the same day. Postage is free from 250
euros upwards. We keep parts for 15 years after the last device of a kind was sold.
"""

PARTS = (
    ("Part number", "Part", "Price"),
    ("BH-2207", "brush head for the turner", "64 euros"),
    ("DB-118", "drive belt for the turner", "39 euros"),
    ("HB-912", "battery for the hub", "96 euros"),
    ("HP-51", "humidity probe", "145 euros"),
    ("AC-77", "ammonia cell", "188 euros"),
    ("NF-30", "fan for a bay node", "27 euros"),
)


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a text, each on one line; blank lines part them."""
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


def pdf_bytes(paragraphs: list[str]) -> bytes:
    """One A4 page: the first paragraph is the title, each other one starts on a line of its own."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 /MediaBox [0 0 595 842] >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        _page_content(paragraphs),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Title " + _literal(paragraphs[0]) + b" >>",
    ]
    body, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    xref_offset, num_entries = len(body), len(objects) + 1
    body += b"xref\n0 %d\n0000000000 65535 f \n" % num_entries
    body += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    body += b"trailer\n<< /Size %d /Root 1 0 R /Info 6 0 R >>\n" % num_entries
    return bytes(body + b"startxref\n%d\n%%%%EOF\n" % xref_offset)


def _page_content(paragraphs: list[str]) -> bytes:
    operators = [b"BT /F1 %d Tf %d TL 60 780 Td" % (FONT_SIZE, LEADING)]
    for paragraph in paragraphs:
        operators += [_literal(line) + b" Tj T*" for line in textwrap.wrap(paragraph, LINE_CHARS)]
        operators.append(b"T*")
    stream = b"\n".join([*operators, b"ET"])
    return b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream)


def _literal(text: str) -> bytes:
    encoded = text.encode("cp1252")
    for byte in (b"\\", b"(", b")"):
        encoded = encoded.replace(byte, b"\\" + byte)
    return b"(" + encoded + b")"


def docx_bytes(paragraphs: list[str], rows: tuple[tuple[str, ...], ...] = ()) -> bytes:
    """Paragraphs (those that begin with ``#`` are headings), then one table; the first heading is the title too."""
    document = docx.Document()
    document.core_properties.title = paragraphs[0].removeprefix("# ")
    document.core_properties.author = "Hask & Orrin"
    document.core_properties.created = document.core_properties.modified = STAMP
    for paragraph in paragraphs:
        if paragraph.startswith("# "):
            document.add_heading(paragraph.removeprefix("# "), level=1)
        else:
            document.add_paragraph(paragraph)
    if rows:
        table = document.add_table(rows=len(rows), cols=len(rows[0]))
        for cells, texts in zip(table.rows, rows, strict=True):
            for cell, text in zip(cells.cells, texts, strict=True):
                cell.text = text
    raw = io.BytesIO()
    document.save(raw)
    return _with_fixed_dates(raw)


def _with_fixed_dates(archive: io.BytesIO) -> bytes:
    """The same archive with all entries dated alike, so that two runs give the same bytes."""
    fixed = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(fixed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            entry = zipfile.ZipInfo(name, STAMP.timetuple()[:6])
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, source.read(name))
    return fixed.getvalue()


def binaries() -> dict[str, bytes]:
    """Path below ``docs/`` -> content, for the four generated documents."""
    return {
        "alarms/ammonia.pdf": pdf_bytes(paragraphs_of(AMMONIA)),
        "alarms/escalation.docx": docx_bytes(paragraphs_of(ESCALATION)),
        "install/turner-rails.pdf": pdf_bytes(paragraphs_of(RAILS)),
        "maintain/spare-parts.docx": docx_bytes(paragraphs_of(SPARE_PARTS), PARTS),
    }


def main(root: Path) -> None:
    """Write the documents below ``root/docs``."""
    for name, content in binaries().items():
        target = root / "docs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
