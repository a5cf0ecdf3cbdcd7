"""Word documents, made with python-docx and, where it writes no such thing, by changing the XML it wrote."""

import io
import re
import zipfile

import docx
import pytest
from docx.enum.style import WD_STYLE_TYPE
from docx.oxml import parse_xml

from cag.corpus import CorpusLimits, load_corpus
from cag.errors import UnreadableDocument

NAMESPACE = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def word_file(build) -> bytes:
    document = docx.Document()
    build(document)
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def with_body(xml: str) -> bytes:
    """A Word file whose body is `xml`."""
    return rewritten(
        word_file(lambda document: None),
        lambda body: re.sub(r"<w:body>.*(?=<w:sectPr)", f"<w:body>{xml}", body, flags=re.DOTALL),
    )


def rewritten(content: bytes, change) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, change(data.decode()).encode() if entry.filename == "word/document.xml" else data)
    return buffer.getvalue()


def build_page(document):
    document.add_heading("Handbook", 0)
    document.add_paragraph("First paragraph\nwith a break.")
    document.add_heading("Holidays", 1)
    document.add_paragraph("thirty days", style="List Bullet")
    document.add_paragraph("no more", style="List Bullet")
    document.add_paragraph("ask", style="List Number")
    document.add_paragraph("go", style="List Number")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(table._cells, ["Name", "Days", "Ada", "30"], strict=True):
        cell.text = text
    document.add_paragraph("After the table.")


def test_headings_lists_and_tables_in_order(load_one):
    document = load_one("a.docx", word_file(build_page))
    assert document.text == (
        "# Handbook\n\nFirst paragraph\nwith a break.\n\n# Holidays\n\n- thirty days\n- no more\n1. ask\n2. go\n\n"
        "| Name | Days |\n| --- | --- |\n| Ada | 30 |\n\nAfter the table."
    )
    assert document.title == "Handbook"


def item(text: str, list_id: int, level: int = 0) -> str:
    numbers = f"<w:numPr><w:ilvl w:val='{level}'/><w:numId w:val='{list_id}'/></w:numPr>"
    return f"<w:p><w:pPr>{numbers}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def with_lists(body: str) -> bytes:
    """A Word file of `body` with the lists 91 to 93, of one definition with three levels; 92 begins at 7, 93 at 0."""
    levels = (("decimal", "%1."), ("lowerLetter", "(%2)"), ("bullet", "o"))
    numbering = "".join(
        f"<w:lvl w:ilvl='{level}'><w:start w:val='1'/><w:numFmt w:val='{kind}'/><w:lvlText w:val='{text}'/></w:lvl>"
        for level, (kind, text) in enumerate(levels)
    )
    override = "<w:lvlOverride w:ilvl='0'><w:startOverride w:val='{}'/></w:lvlOverride>"

    def build(document):
        root = document.part.numbering_part.element
        space = f"xmlns:w='{NAMESPACE}'"
        root.insert(0, parse_xml(f"<w:abstractNum {space} w:abstractNumId='90'>{numbering}</w:abstractNum>"))
        for list_id, more in ((91, ""), (92, override.format(7)), (93, override.format(0))):
            list_of_levels = f"<w:abstractNumId w:val='90'/>{more}"
            root.append(parse_xml(f"<w:num {space} w:numId='{list_id}'>{list_of_levels}</w:num>"))

    return rewritten(
        word_file(build), lambda old: re.sub(r"<w:body>.*(?=<w:sectPr)", f"<w:body>{body}", old, flags=re.DOTALL)
    )


def test_items_have_the_numbers_that_a_reader_sees(load_one):
    plain = "<w:p><w:r><w:t>between</w:t></w:r></w:p>"
    first = item("one", 91) + item("a", 91, 1) + item("b", 91, 1) + item("dot", 91, 2)
    body = first + plain + item("two", 91) + item("a", 91, 1) + item("new", 92) + item("next", 92)
    body += item("zero", 93) + item("first", 93)
    text = "1. one\n(a) a\n(b) b\n- dot\n\nbetween\n\n2. two\n(a) a\n7. new\n8. next\n0. zero\n1. first"
    assert load_one("a.docx", with_lists(body + item("none", 0))).text == f"{text}\n\nnone"


def test_styles_that_stand_on_each_other_in_a_circle(load_one):
    def build(document):
        document.styles["List Number"].base_style = document.styles["Normal"]
        document.styles["Normal"].base_style = document.styles["List Number"]
        document.add_paragraph("words")

    assert load_one("a.docx", word_file(build)).text.endswith("words")


def test_a_cell_over_several_rows_or_columns_is_repeated_in_each(load_one):
    def build(document):
        table = document.add_table(rows=4, cols=3)
        table.cell(0, 1).merge(table.cell(0, 2))
        table.cell(1, 0).merge(table.cell(2, 0))
        for row, column, text in (
            *((0, 0, "Region"), (0, 1, "Price"), (1, 0, "Europe"), (1, 1, "10"), (1, 2, "12")),
            *((2, 1, "30"), (2, 2, "36"), (3, 0, "Asia"), (3, 1, "8"), (3, 2, "9")),
        ):
            table.cell(row, column).text = text

    assert load_one("a.docx", word_file(build)).text == (
        "| Region | Price | Price |\n| --- | --- | --- |\n| Europe | 10 | 12 |\n| Europe | 30 | 36 |\n| Asia | 8 | 9 |"
    )


def test_a_row_that_begins_in_a_later_column(load_one):
    cell = "<w:tc><w:p><w:r><w:t>{}</w:t></w:r></w:p></w:tc>"
    rows = (
        f"<w:tr>{cell.format('a')}{cell.format('b')}</w:tr>"
        f"<w:tr><w:trPr><w:gridBefore w:val='1'/></w:trPr>{cell.format('c')}</w:tr>"
    )
    assert load_one("a.docx", with_body(f"<w:tbl>{rows}</w:tbl>")).text == "| a | b |\n| --- | --- |\n|  | c |"


def test_raised_text_is_no_part_of_the_number_before_it(load_one):
    def build(document):
        document.styles.add_style("Exponent", WD_STYLE_TYPE.CHARACTER).font.superscript = True
        paragraph = document.add_paragraph("about 10")
        for part in ("-", "6"):  # Word cuts runs anywhere
            paragraph.add_run(part).font.superscript = True
        paragraph.add_run(", 10")
        paragraph.add_run("9", style="Exponent")
        paragraph.add_run(", 1")
        paragraph.add_run("st").font.superscript = True

    assert load_one("a.docx", word_file(build)).text == "about 10^-6, 10^9, 1st"


@pytest.mark.parametrize(
    ("formula", "text"),
    [
        ("<m:sSup><m:e>10</m:e><m:sup>6</m:sup></m:sSup>", "10^6"),
        ("3<m:f><m:num>1</m:num><m:den>2</m:den></m:f>", "3 1/2"),
        ("<m:f><m:num>a+b</m:num><m:den>2</m:den></m:f>", "(a+b)/2"),
        ("2<m:d><m:e>3+4</m:e></m:d>", "2(3+4)"),
        ("<m:d><m:dPr><m:begChr m:val='['/><m:endChr m:val=''/></m:dPr><m:e>a</m:e><m:e>b</m:e></m:d>", "[a|b"),
        ("<m:rad><m:deg/><m:e>4</m:e></m:rad>", "√(4)"),
        ("<m:rad><m:deg>3</m:deg><m:e>x+1</m:e></m:rad>", "(x+1)^(1/3)"),
        (
            "<m:nary><m:naryPr><m:chr m:val='∑'/></m:naryPr><m:sub>i=1</m:sub><m:sup>n</m:sup><m:e>i</m:e></m:nary>",
            "∑_(i=1)^n i",
        ),
        ("<m:m><m:mr><m:e>1</m:e><m:e>2</m:e></m:mr><m:mr><m:e>3</m:e><m:e>4</m:e></m:mr></m:m>", "1, 2; 3, 4"),
        ("<m:func><m:fName>log</m:fName><m:e>x</m:e></m:func><w:del>y</w:del>", "log x"),
    ],
)
def test_formulas(load_one, formula, text):
    runs = re.sub(r"(?<=>)([^<>]+)(?=<)", r"<m:r><m:t>\1</m:t></m:r>", f">{formula}<")[1:-1]
    math = "http://schemas.openxmlformats.org/officeDocument/2006/math"
    assert load_one("a.docx", with_body(f"<w:p><m:oMath xmlns:m='{math}'>{runs}</m:oMath></w:p>")).text == text


def test_the_title_of_the_properties_comes_first(load_one):
    def build(document):
        document.core_properties.title = "Official title"
        document.add_heading("Heading", 1)

    assert load_one("a.docx", word_file(build)).title == "Official title"


def test_what_python_docx_passes_over_is_read(load_one):
    run = "<w:r><w:t>{}</w:t></w:r>"
    text = load_one(
        "a.docx",
        with_body(
            f"<w:sdt><w:sdtContent><w:p>{run.format('controlled')}</w:p></w:sdtContent></w:sdt>"
            f"<w:p>{run.format('kept ')}<w:ins>{run.format('inserted')}</w:ins>"
            "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del></w:p>"
            f"<w:p>{run.format('outside')}<w:r><w:pict><w:txbxContent><w:p>{run.format('in a box')}</w:p>"
            "</w:txbxContent></w:pict></w:r></w:p>"
        ),
    ).text
    assert text == "controlled\n\nkept inserted\n\noutside\n\nin a box"


def test_an_empty_document_is_reported(tree):
    root = tree({"empty.docx": word_file(lambda document: None), "a.md": "a"})
    assert load_corpus([root]).empty == (f"{root}/empty.docx",)


@pytest.mark.parametrize("kind", ["text", "cut", "other zip", "bad xml", "empty"])
def test_corrupt_files(load_one, kind):
    good = word_file(build_page)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a.txt", "a")
    contents = {
        "text": b"plain words",
        "cut": good[: len(good) // 2],
        "other zip": other.getvalue(),
        "bad xml": rewritten(good, lambda xml: xml[: len(xml) // 2]),
        "empty": b"",
    }
    with pytest.raises(UnreadableDocument):
        load_one("a.docx", contents[kind])


def test_entities_are_refused(load_one, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("TOPSECRET")
    doctype = f'<!DOCTYPE x [<!ENTITY leak SYSTEM "file://{secret}"><!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    content = rewritten(
        word_file(build_page),
        lambda xml: xml.replace("<w:document", f"{doctype}<w:document", 1).replace("thirty", "&leak;&b;"),
    )
    with pytest.raises(UnreadableDocument, match="document type"):
        load_one("a.docx", content)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tree):
    bomb = rewritten(word_file(build_page), lambda xml: xml.replace("thirty", "a" * 5_000_000))
    assert len(bomb) < 100_000
    root = tree({"bomb.docx": bomb})
    with pytest.raises(UnreadableDocument, match="more than 1000000 bytes of text"):
        load_corpus([root], limits=CorpusLimits(max_text_bytes=1_000_000))


def test_an_archive_that_lies_about_its_sizes_is_refused(tree):
    """The central directory says 100 bytes where 5 MB follow: zipfile reads no more, and checks the sum."""
    bomb = bytearray(rewritten(word_file(build_page), lambda xml: xml.replace("thirty", "a" * 5_000_000)))
    with zipfile.ZipFile(io.BytesIO(bytes(bomb))) as archive:
        true_size = archive.getinfo("word/document.xml").file_size
    found = bomb.rfind(true_size.to_bytes(4, "little"))
    bomb[found : found + 4] = (100).to_bytes(4, "little")
    root = tree({"bomb.docx": bytes(bomb)})
    with pytest.raises(UnreadableDocument):
        load_corpus([root], limits=CorpusLimits(max_text_bytes=1_000_000))
