"""Plain text, Markdown and source code: encodings, front matter, titles."""

import pytest

from cag.errors import UnreadableDocument


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_encodings(load_one, encoding):
    assert load_one("a.txt", "Grüße, 世界".encode(encoding)).text == "Grüße, 世界"


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_utf16_of_either_byte_order(load_one, mark):
    encoding = "utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"
    assert load_one("a.md", mark + "# Ä\n".encode(encoding)).text == "# Ä"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Größe".encode("cp1252"), "not valid UTF-8"),
        ("plain".encode("utf-16-le"), "binary"),
        (b"\xff\xfea\x00b", "not valid UTF-16"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"PK\x03\x04....", "zip"),
        (b"\x1f\x8b\x08....", "gzip"),
        (b"text\x00more", "binary"),
        (bytes(range(1, 32)) * 4, "binary"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.html", "a.py", "a.csv"])
def test_what_is_not_certainly_text_is_refused(load_one, name, content, reason):
    with pytest.raises(UnreadableDocument, match=reason):
        load_one(name, content)


def test_a_declared_encoding_is_believed_where_the_format_has_one(load_one):
    assert load_one("a.py", b"# -*- coding: latin-1 -*-\nname = '\xe9'\n").text.endswith("'é'")
    assert "é" in load_one("a.xml", b"<?xml version='1.0' encoding='iso-8859-1'?><a>\xe9</a>").text
    with pytest.raises(UnreadableDocument):
        load_one("b.py", b"# -*- coding: rot13 -*-\nname = '\xe9'\n")


def test_markdown_is_kept_and_its_front_matter_taken_off(load_one):
    document = load_one("a.md", '---\ntitle: "The guide"\ntags:\n- a\n---\n\n# Other\n\n*text*  \n- [x](y)\n')
    assert (document.title, document.text) == ("The guide", "# Other\n\n*text*\n- [x](y)")


@pytest.mark.parametrize(
    "between",
    [
        "\nWords between rules, kept.\n",
        "- first rule: wash hands\n- second rule",
        "-first: wash hands",
        "\n# Rules\n\nFirst: wash hands.\n",
        "  indented: words",
    ],
)
def test_a_rule_at_the_top_is_no_front_matter(load_one, between):
    text = f"---\n{between}\n---\n\nmore"
    assert load_one("a.md", text).text == text


@pytest.mark.parametrize(
    "matter", ["title: T", "# made by hand\ntitle: T", "title: T\n\n# comment\ntags:\n- a\n- b: c"]
)
def test_front_matter_is_taken_off(load_one, matter):
    document = load_one("a.md", f"---\n{matter}\n---\nmore")
    assert (document.title, document.text) == ("T", "more")


@pytest.mark.parametrize(
    ("name", "content", "title"),
    [
        ("a.md", "intro\n\n## Use `cag` *now*\n", "Use cag now"),
        ("a.md", "```\n# comment\n```\n\nHeading\n=======\n", "Heading"),
        ("getting-started_now.md", "no heading", "Getting started now"),
        ("README.md", "no heading", "README"),
        ("a.txt", "TEMPLATES\n\nA template is text.\n", "TEMPLATES"),
        ("a.txt", "# Marked\nmore", "A"),
        ("a.txt", "Underlined\n==========\nmore", "Underlined"),
        ("release-notes.txt", "A first sentence.\n\nAnother.\n", "Release notes"),
        ("main.py", "# comment\nprint(1)\n", "main.py"),
        ("pyproject.toml", "[project]\n", "pyproject.toml"),
    ],
)
def test_titles(load_one, name, content, title):
    assert load_one(name, content).title == title


def test_code_keeps_its_indentation(load_one):
    code = "def f():\n\treturn 1\n\n\nclass A:\n    pass"
    assert load_one("a.py", code + "\n").text == code


def test_a_makefile_has_no_extension_and_is_known(tree):
    from cag.corpus import load_documents

    root = tree({"Makefile": "all:\n\techo", "LICENSE": "free"})
    assert [document.doc_id for document in load_documents([root])] == ["LICENSE", "Makefile"]
