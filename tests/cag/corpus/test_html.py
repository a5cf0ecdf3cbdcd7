import pytest

from cag.corpus.loaders import html
from cag.errors import UnreadableDocument

PAGE = """<!DOCTYPE html><html><head><title>Keys &mdash; Manual</title><style>p {color: red}</style>
<script>var hidden = 1;</script></head><body>
<nav><a href="/">Home</a> | <a href="/search">Search</a></nav>
<main><h1>Keys<a class="headerlink" href="#keys">¶</a></h1>
<p>Rotate   a <b>key</b> with <code>cag keys rotate</code>,<br>then wait.</p>
<ul><li>first</li><li><p>second</p><ul><li>inner</li></ul></li></ul>
<ol start="3"><li>third</li><li>fourth</li></ol>
<table><caption>Ages</caption><thead><tr><th>Name</th><th>Age</th></tr></thead>
<tr><td>Ada <b>L.</b></td><td>36</td></tr></table>
<pre><code class="language-bash">cag ls
  cag show &lt;name&gt;
</code></pre>
<dl><dt>term</dt><dd>what it means</dd></dl>
<blockquote><p>quoted</p></blockquote>
<!-- a comment --><img src="x.png" alt="A diagram"><div hidden>secret</div>
</main><footer>Copyright</footer></body></html>"""

TEXT = """# Keys

Rotate a key with cag keys rotate,
then wait.

- first
- second
  - inner

3. third
4. fourth

Ages

| Name | Age |
| --- | --- |
| Ada L. | 36 |

```bash
cag ls
  cag show <name>
```

term
  what it means

> quoted

A diagram"""


def test_structure_is_kept_and_navigation_is_not(load_one):
    document = load_one("a.html", PAGE)
    assert document.text == TEXT
    assert document.title == "Keys — Manual"


def test_without_main_the_body_is_read(load_one):
    text = load_one("a.htm", "<body><header><h1>T</h1></header><p>one<p>two<div role=navigation>x</div></body>").text
    assert text == "# T\n\none\n\ntwo"


def test_an_empty_main_does_not_hide_the_page(load_one):
    assert load_one("a.html", "<main></main><p>text</p>").text == "text"


def test_the_first_heading_is_the_title_of_a_page_without_one(load_one):
    assert load_one("a.html", "<h2>First</h2><p>x").title == "First"


def test_unclosed_tags(load_one):
    text = load_one("a.html", "<ul><li>a<li>b</ul><table><tr><td>1<td>2<tr><td>3</table><p>x<p>y").text
    assert text == "- a\n- b\n\n| 1 | 2 |\n| --- | --- |\n| 3 |  |\n\nx\n\ny"


def test_a_table_that_lays_out_a_page_is_no_table(load_one):
    assert (
        load_one("a.html", "<table><tr><td><h1>T</h1><pre>code</pre></td></tr></table>").text == "# T\n\n```\ncode\n```"
    )


def test_a_link_around_blocks(load_one):
    assert load_one("a.html", "<a href=x><div>one</div><div>two</div></a>").text == "one\n\ntwo"


@pytest.mark.parametrize(
    "content",
    [
        "just words.html",
        "http://example.org/a",
        "<?xml version='1.0'?><html><body>words</body></html>",
        "words & more < x",
    ],
)
def test_markup_that_looks_like_something_else_gives_no_warning(load_one, content):
    assert load_one("a.xhtml", content).text


def test_a_declared_encoding(load_one):
    assert load_one("a.html", b"<meta charset=iso-8859-1><p>\x93caf\xe9\x94").text == "\u201ccaf\xe9\u201d"
    with pytest.raises(UnreadableDocument, match="not valid UTF-8"):
        load_one("b.html", b"<p>caf\xe9")


@pytest.mark.parametrize("tag", ["<div>", "<b>", "<table><tr><td>", "<ul><li>"])
def test_huge_nesting_is_refused_while_it_is_read(load_one, monkeypatch, tag):
    num_opened = 0

    class Counted(html._Page):
        def pushTag(self, tag):
            nonlocal num_opened
            num_opened += 1
            super().pushTag(tag)

    monkeypatch.setattr(html, "_Page", Counted)
    with pytest.raises(UnreadableDocument, match="nested too deeply"):
        load_one("a.html", tag * 20_000 + "deep")
    assert num_opened <= 2 * html._MAX_DEPTH


def test_reasonable_nesting_is_read(load_one):
    assert load_one("a.html", "<div>" * 150 + "deep").text == "deep"
