"""PDFs: real ones written by matplotlib and pypdf, and small ones by hand where every letter must be known."""

import io

import pytest
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from pypdf import PdfReader, PdfWriter

from cag.corpus import load_corpus
from cag.corpus.loaders.pdf_lines import join_pages
from cag.errors import UnreadableDocument


def pdf_of(pages: list[list[str]]) -> bytes:
    """A PDF of pages of lines, in Helvetica, written by hand."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", "", "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for lines in pages:
        shown = "".join(f"({line}) Tj T*\n" for line in lines)
        stream = f"BT /F1 10 Tf 12 TL 50 800 Td\n{shown}ET"
        objects.append(f"<</Length {len(stream)}>>\nstream\n{stream}\nendstream")
        resources = f"/Contents {len(objects)} 0 R/Resources<</Font<</F1 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]{resources}>>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(kids)}]>>"
    content, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    start = len(content)
    size = len(objects) + 1
    content += (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<</Size {size}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF\n"
    )
    return content.encode("latin-1")


def matplotlib_pdf(text: str, title: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with PdfPages(buffer, metadata={"Title": title} if title else None) as pdf:
        figure = Figure()
        figure.text(0.1, 0.5, text)
        pdf.savefig(figure)
    return buffer.getvalue()


def encrypted(content: bytes, password: str) -> bytes:
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(content)))
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def test_text_and_title_of_a_real_pdf(load_one):
    document = load_one("a.pdf", matplotlib_pdf("The pump runs at 40 bar.", "Pump manual"))
    assert document.text == "The pump runs at 40 bar."
    assert document.title == "Pump manual"


def test_the_first_line_is_the_title_of_a_pdf_without_one(load_one):
    document = load_one("a.pdf", pdf_of([["Pump manual", "It runs."]]))
    assert (document.title, document.text) == ("Pump manual", "Pump manual\nIt runs.")


def test_pages_stay_in_order(load_one):
    assert load_one("a.pdf", pdf_of([["One"], ["Two"], ["Three"]])).text == "One\nTwo\nThree"


def test_a_pdf_without_text_is_reported_as_empty(tree):
    root = tree({"scan.pdf": pdf_of([[]]), "a.md": "a"})
    assert load_corpus([root]).empty == (f"{root}/scan.pdf",)


def test_an_encrypted_pdf(load_one):
    good = pdf_of([["Secret text"]])
    assert load_one("open.pdf", encrypted(good, "")).text == "Secret text"
    with pytest.raises(UnreadableDocument, match="password"):
        load_one("closed.pdf", encrypted(good, "pass"))


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "cut before the table", "garbage", "no pages"])
def test_corrupt_pdfs(load_one, kind, capfd):
    good = pdf_of([["Text"] * 20])
    contents = {
        "text": b"plain words",
        "empty": b"",
        "cut": good[: len(good) // 2],
        "cut before the table": good[: good.index(b"xref")],
        "garbage": b"%PDF-1.4\n" + b"\xde\xad" * 300 + b"\n%%EOF\n",
        "no pages": good.replace(b"/Catalog", b"/Xatalog").replace(b"/Root", b"/Foot"),
    }
    with pytest.raises(UnreadableDocument, match=r"a\.pdf"):
        load_one("a.pdf", contents[kind])
    assert capfd.readouterr().err == ""


def test_damage_inside_a_compressed_page_is_no_silent_loss(load_one):
    content = bytearray(matplotlib_pdf("The pump runs at 40 bar. " * 20))
    start = content.index(b"stream\n", content.index(b"/Contents") if b"/Contents" in content else 0) + 30
    content[start : start + 12] = b"\xff" * 12
    with pytest.raises(UnreadableDocument):
        load_one("a.pdf", bytes(content))


FULL = "A long line of prose that reaches the margin of the page and goes on with"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([FULL, "the next line."], f"{FULL} the next line."),
        ([FULL, "Next sentence."], f"{FULL}\nNext sentence."),
        ([FULL, "short", "lower"], f"{FULL} short\nlower"),
        ([FULL, "- item"], f"{FULL}\n- item"),
        ([FULL + ":", "code here"], f"{FULL}:\ncode here"),
        (["    " + FULL, "code"], f"    {FULL}\ncode"),
        (["the infor-", "mation is here"], "the information is here"),
        (["is well-known, a well-", "known fact"], "is well-known, a well-known fact"),
        (["pass --no-", "detect to it"], "pass --no-\ndetect to it"),
        (["e\ufb03cient"], "efficient"),
    ],
)
def test_lines(lines, expected):
    assert join_pages(["\n".join([*lines, "", FULL])]).removesuffix(f"\n\n{FULL}") == expected


def test_running_heads_stay_once_and_page_numbers_go():
    pages = [
        f"Handbook\nText of page {word}\n{number}" for number, word in enumerate(["one", "two", "three", "four"], 1)
    ]
    assert join_pages(pages) == "Handbook\nText of page one\nText of page two\nText of page three\nText of page four"


def test_pages_that_only_begin_alike_by_chance_are_kept():
    assert join_pages(["Intro\na", "Intro\nb", "Other\nc", "More\nd"]).count("Intro") == 2
