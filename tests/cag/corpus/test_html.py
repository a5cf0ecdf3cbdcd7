import pytest

from cag.corpus.loaders import html_page
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


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<section><h2>Quota</h2><p>500 requests.</p></section><p>See keys.", "## Quota\n\n500 requests.\n\nSee keys."),
        ("<header>Manual</header><main><h1>Keys</h1>Rotate.</main><footer>2024</footer>", "# Keys\n\nRotate."),
        ("<nav>Home</nav><article>words <p>more</article><footer>2024</footer>", "words\n\nmore"),
        ("<my-app>custom <p>words</my-app><figure><figcaption>Fig 1</figure>", "custom\n\nwords\n\nFig 1"),
    ],
)
def test_a_page_whose_head_and_body_are_not_written(load_one, body, text):
    document = load_one("a.html", f"<!DOCTYPE html><meta charset=utf-8><title>T</title><link rel=x href=y>{body}")
    assert (document.title, document.text) == ("T", text)


def test_all_mains_are_read_once(load_one):
    assert (
        load_one("a.html", "<main>one<div role=main>two</div></main>x<main>three</main>").text == "one\n\ntwo\n\nthree"
    )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<ul>free <i>text</i><li>a</li>tail <b>text</b></ul>", "free text\n\n- a\n  tail text"),
        ("<ul><b>bold</b> indented <i>it</i> more<p>para</ul>", "bold indented it more\n\npara"),
        ("<ol><li>a</li><ul><li>in a</li></ul><li>b</li></ol>", "1. a\n   - in a\n2. b"),
        ("<ul><app-item><li>a</li></app-item><app-item><li>b</li></app-item></ul>", "- a\n- b"),
        ("<ol><li>10</li><li>2.5</li></ol>", "1. 10\n2. 2.5"),
        ("<dl><dt>t<dd hidden>no<dd>d<dt hidden>no<dd hidden>no<dt>u<dd>e</dl>", "t\n  d\n\nu\n  e"),
        ("<dl>free<dt>t</dt><dd>d</dd>tail<div><dt>u</dt><dd>e</dd></div></dl>", "free\n\nt\n  d\n\ntail\n\nu\n  e"),
        ("<dir><li>a</dir><xmp>x <b></xmp>", "- a\n\n```\nx <b>\n```"),
        ("<table>free<caption>C</caption><tr>loose<td>a</td></tr></table>", "free\n\nC\n\nloose\n\n| a |\n| --- |"),
        ("<table><form><tr><td>a</td></tr></form></table>", "| a |\n| --- |"),
        ("<h2><div>One</div><div>two</div></h2>", "## One two"),
        ("<article>a</article><div><footer>Source: b</footer></div>", "a\n\nSource: b"),
        ("<div hidden>no</div><div role=tabpanel hidden>tab</div><p hidden=until-found>fold", "tab\n\nfold"),
        (
            "<h3><button>Why?</button></h3><p>Press <button>Go</button> now<div><button>Copy</button></div>",
            "### Why?\n\nPress Go now",
        ),
        ("<button aria-controls=a>More</button><p id=a hidden>fold<p hidden>no", "fold"),
        (
            "<div><button role=tab>npm</button><button role=tab>Yarn</button></div><label>a</label><label>b</label>",
            "npm Yarn\n\na b",
        ),
        ("<table><tr><th><button>Name</button><tr><td><button>92</button></table>", "| Name |\n| --- |\n| 92 |"),
        ("<pre><span class=linenos>1</span>x\n<span class=linenos>2</span>y</pre>", "```\nx\ny\n```"),
    ],
)
def test_text_is_kept_wherever_it_stands(load_one, body, text):
    assert load_one("a.html", f"<body>{body}</body>").text == text


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ("<ol><li>a<li value=7>b<li>c<li value=x>d</ol>", "1. a\n7. b\n8. c\n9. d"),
        ("<ol start=-1><li>a<li>b<li>c</ol>", "-1. a\n0. b\n1. c"),
        ("<ol reversed><li>a<li hidden>no<li>b</ol>", "2. a\n1. b"),
        ("<ol reversed start=9><li>a<li value=4>b<li>c</ol>", "9. a\n4. b\n3. c"),
        ("<ol type=a start=26><li>a<li>b<li type=1>c<ol type=I><li>d</ol></ol>", "z. a\naa. b\n28. c\n    I. d"),
        ("<ol type=i start=1994><li>a<li value=4000>b<li value=0>c</ol>", "mcmxciv. a\n4000. b\n0. c"),
    ],
)
def test_items_have_the_numbers_that_a_reader_sees(load_one, items, text):
    assert load_one("a.html", items).text == text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("<ruby>漢字<rp>(</rp><rt>かんじ</rt><rp>)</rp></ruby>です", "漢字(かんじ)です"),
        ("<ruby>漢<rt>かん</rt>字<rt>じ</rt></ruby>です", "漢字(かんじ)です"),
        ("<ruby>漢<rp>[<rt>かん<rp>]</ruby>と<ruby>字<rt></rt></ruby>", "漢(かん)と字"),
        ("<ruby>旧<b>金</b><rtc><rt>jiù<rt>jīn</rtc></ruby>山", "旧金(jiù jīn)山"),
        ("<ruby><ruby>東<rt>とう</ruby><rt>east</ruby>", "東(とう)(east)"),
    ],
)
def test_readings_stand_behind_words_that_stay_whole(load_one, words, text):
    assert load_one("a.html", f"<p>{words}").text == text


@pytest.mark.parametrize(
    ("heading", "text"),
    [
        ('<a class="anchor" href="#x">Install</a>', "Install"),
        ('Install<a class="headerlink" href="#x">¶</a>', "Install"),
        ('<a class="anchor" href="#x"><svg></svg></a>Install', "Install"),
        ('Install <a class="header-anchor" href="#x">\u200b</a>', "Install"),
        ('Install <a href="guide.html#x">#</a>', "Install"),
        ('<a href="#x">+=</a>', "+="),
    ],
)
def test_links_of_headings_to_themselves_say_nothing(load_one, heading, text):
    document = load_one("a.html", f"<h2>{heading}</h2>words")
    assert (document.title, document.text) == (text, f"## {text}\n\nwords")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<dl><dt>t" + "<dd>x" * 600 + "</dl>", "t" + "\n  x" * 600),
        ("<dl>" + "<dt>t<dt>u<dd><b>x<dd><p>y" * 300 + "</dl>", "\n\n".join(["t\n\nu\n  x\n  y"] * 300)),
        ("<ul>" + "<li><font>x" * 600 + "</ul>", "\n".join(["- x"] * 600)),
        ("<dl><dt>t<dd>x<dl><dt>u<dd>y<dd>z</dl>end<dd>w</dl>end", "t\n  x\n\n  u\n    y\n    z\n\n  end\n  w\n\nend"),
        ("<table><tr><td><i>a<td><div>b<tr><td>c</table>", "| a | b |\n| --- | --- |\n| c |  |"),
    ],
)
def test_end_tags_may_be_left_out(load_one, body, text):
    assert load_one("a.html", body).text == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("10<sup>6</sup> m<sup>2</sup>, 10<sup>-3</sup>, Ca<sup>2+</sup>", "10^6 m^2, 10^-3, Ca^2+"),
        ("x<sup>n + 1</sup>, 2<sup>3<sup>2</sup></sup>, H<sub>2</sub>O", "x^(n + 1), 2^(3^2), H2O"),
        ("1<sup>st</sup>, 9<sup>TH</sup>, Cag<sup>TM</sup>, 20<sup>°</sup>, 5<sup>*</sup>", "1st, 9TH, CagTM, 20°, 5*"),
        ("costs 10<sup><a href='#n1'>2</a></sup>, 5<a href='#n2'><sup>3,4</sup></a>", "costs 10[2], 5[3,4]"),
        ("costs 10<sup>[2]</sup>, 10<sup>[<a href='#n1'>3</a>]</sup>", "costs 10[2], 10[3]"),
        ("<a href=x>10<sup>6</sup></a>, 3<sup>1</sup>/<sub>2</sub> cups", "10^6, 3 1/2 cups"),
        ("<sup>A note in small print.</sup>", "A note in small print."),
        ("<math><msup><mn>10</mn><mn>6</mn></msup><mo>=</mo><mfrac><mn>1</mn><mi>n</mi></mfrac></math>", "10^6= 1/n"),
        (
            "<math><semantics><msup><mi>x</mi><mn>2</mn></msup>"
            "<annotation encoding=application/x-tex>x^2</annotation></semantics></math>",
            "x^2",
        ),
        ("<math alttext='{\\displaystyle a^{2}}'><mi>a</mi></math>", "a^{2}"),
        (
            "<math><munderover><mo>Σ</mo><mi>i=1</mi><mi>n</mi></munderover><msqrt><mn>4</mn></msqrt>"
            "<mroot><mn>8</mn><mn>3</mn></mroot></math>",
            "Σ_(i=1)^n √(4)(8)^(1/3)",
        ),
    ],
)
def test_powers_and_fractions_are_no_other_numbers(load_one, body, text):
    assert load_one("a.html", f"<p>{body}").text == text


def test_the_first_heading_is_the_title_of_a_page_without_one(load_one):
    assert load_one("a.html", "<h2>First</h2><p>x").title == "First"


def test_unclosed_tags(load_one):
    text = load_one("a.html", "<ul><li>a<li>b</ul><table><tr><td>1<td>2<tr><td>3</table><p>x<p>y").text
    assert text == "- a\n- b\n\n| 1 | 2 |\n| --- | --- |\n| 3 |  |\n\nx\n\ny"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            "<tr><th>Area<th>Plan<th>Price<tr><td rowspan=2>EU<td>Basic<td>10<tr><td>Pro<td>30<tr><td>US<td>Basic<td>8",
            "| Area | Plan | Price |\n| --- | --- | --- |\n| EU | Basic | 10 |\n| EU | Pro | 30 |\n| US | Basic | 8 |",
        ),
        (
            "<tr><th rowspan=2>Plan<th colspan=2>Latency<tr><th>p50<th>p99<tr><td>Pro<td>5<td>9",
            "| Plan | Latency | Latency |\n| --- | --- | --- |\n| Plan | p50 | p99 |\n| Pro | 5 | 9 |",
        ),
        (  # a row for one cell, with more columns than there are
            "<tr><th>Plan<th>Price<tr><td colspan=100%>Europe<tr><td>Pro<td>9",
            "| Plan | Price |\n| --- | --- |\n| Europe |  |\n| Pro | 9 |",
        ),
        (  # over no other part of the table, and 0 to its end
            "<thead><tr><th rowspan=9>A<th>B<tbody><tr><td rowspan=0>1<td>2<tr><td>3",
            "| A | B |\n| --- | --- |\n| 1 | 2 |\n| 1 | 3 |",
        ),
        ("<tr><td colspan=x rowspan=-1>a<td colspan=0>b<tr><td>c", "| a | b |\n| --- | --- |\n| c |  |"),
    ],
)
def test_a_cell_over_several_rows_or_columns_is_repeated_in_each(load_one, rows, text):
    assert load_one("a.html", f"<table>{rows}</table>").text == text


@pytest.mark.parametrize(
    "rows",
    [
        "<tr><td colspan=100000 rowspan=65534>" + "long " * 20_000 + "<td>end" + "<tr><td>x" * 1_000,
        "<tr>" + "<td>y" * 1_000 + "<tr><td>x" * 1_000 + "<td>end",
        "<tr><td colspan=1000 rowspan=1000>x<td>end" * 500,
    ],
)
def test_a_table_does_not_grow_beyond_measure(load_one, rows):
    text = load_one("a.html", f"<table>{rows}</table>").text
    assert "| end |" in text
    assert len(text) < 10 * len(rows) + 300_000


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

    class Counted(html_page._Page):
        def pushTag(self, tag):
            nonlocal num_opened
            num_opened += 1
            super().pushTag(tag)

    monkeypatch.setattr(html_page, "_Page", Counted)
    with pytest.raises(UnreadableDocument, match="nested too deeply"):
        load_one("a.html", tag * 20_000 + "deep")
    assert num_opened <= 2 * html_page._MAX_DEPTH


def test_reasonable_nesting_is_read(load_one):
    assert load_one("a.html", "<div>" * 150 + "deep").text == "deep"
