"""reStructuredText, plain and Sphinx-flavoured. What docutils does not know must not be lost, printed or run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from docutils import frontend
from hypothesis import given
from hypothesis import strategies as st

from cag.corpus.loaders import CorpusLimits, Source, rst, rst_marks

PAGE = """
.. _top:

=======
The |x|
=======

.. |x| replace:: manual

:Author: Ada

Text with ``code``, *stress*, a `link <https://example.org>`_, :ref:`a label <top>`, :class:`~pkg.mod.Thing`,
:doc:`other` and [1]_.

.. [1] A note.

Section
-------

1. one
2. two

   * inner

term
    its meaning

-o FILE  where to write

.. note:: Take care.

   Twice.

====  =====
Name  Value
====  =====
a     1
====  =====

.. code-block:: python
   :linenos:
   :caption: Example

   print(1)

.. py:function:: run(*args, **options)
   :module: pkg

   Runs **it**.

   .. versionadded:: 1.2
      Also *async*.

.. tabs::

   .. tab:: Linux

      Use apt.

.. unknown-thing:: with an argument

   and a body

.. toctree::
   :maxdepth: 2

   installation

.. a comment
"""

TEXT = """# The manual

Author: Ada

Text with code, stress, a link, a label, Thing, other and [1].

[1] A note.

## Section

1. one
2. two
   - inner

term
  its meaning

-o FILE
  where to write

Note: Take care.

Twice.

| Name | Value |
| --- | --- |
| a | 1 |

Example

```python
print(1)
```

run(*args, **options)

Runs it.

Added in version 1.2 Also async.

Linux

Use apt.

with an argument

and a body"""


def test_the_whole_page(load_one, capfd):
    document = load_one("a.rst", PAGE)
    assert document.text == TEXT
    assert document.title == "The manual"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "directive",
    [
        ".. include:: {secret}",
        ".. literalinclude:: {secret}",
        ".. csv-table::\n   :file: {secret}",
        ".. raw:: html\n   :file: {secret}",
        ".. raw:: html\n\n   TOPSECRET",
        ".. figure:: {secret}\n   :figwidth: image",
    ],
)
def test_no_other_file_is_read_and_nothing_raw_passes(load_one, tmp_path, directive):
    secret = tmp_path / "secret.txt"
    secret.write_text("TOPSECRET")
    text = load_one("a.rst", f"before\n\n{directive.format(secret=secret)}\n\nafter\n").text
    assert "TOPSECRET" not in text
    assert text.startswith("before")
    assert text.endswith("after")


def test_a_table_that_docutils_refuses_keeps_its_text(load_one):
    text = load_one("a.rst", "x\n\n=== ===\nab  cdef\n=== ==\n\nend\n").text
    assert "cdef" in text


def test_a_line_over_the_limit_of_docutils(load_one):
    line = "word " * 5_000
    assert load_one("a.rst", line).text == line.strip()


def test_a_date_does_not_change_the_text_from_day_to_day(load_one):
    assert load_one("a.rst", "Built |date|.\n\n.. |date| date::\n").text == "Built |date|."


def test_variables_of_sphinx_vanish_and_other_unknown_ones_stay(load_one):
    assert load_one("a.rst", "Docs |version|\n==============\n\n|other|\n").text == "# Docs\n\n|other|"


def test_a_cell_over_several_rows_or_columns_is_repeated_in_each(load_one):
    page = """
+--------+-------+-------+
| Region | Plan  | Price |
+========+=======+=======+
| Europe | Basic | 10    |
|        +-------+-------+
|        | Pro   | 30    |
+--------+-------+-------+
| Asia           | 8     |
+----------------+-------+
"""
    rows = "| Europe | Basic | 10 |\n| Europe | Pro | 30 |\n| Asia | Asia | 8 |"
    assert load_one("a.rst", page).text == f"| Region | Plan | Price |\n| --- | --- | --- |\n{rows}"


def test_a_table_in_a_cell_is_read_once(load_one):
    page = "+---------+---+\n| == ==   | x |\n| a  b    |   |\n| c  d    |   |\n| == ==   |   |\n+---------+---+\n"
    assert load_one("a.rst", page).text.count("c | d") == 1


def test_powers_are_no_other_numbers(load_one):
    page = "10\\ :sup:`6`, x\\ :superscript:`n + 1`, 1\\ :sup:`st`, H\\ :sub:`2`\\ O\n"
    assert load_one("a.rst", page).text == "10^6, x^(n + 1), 1st, H2O"


def test_items_have_the_numbers_of_the_source(load_one):
    page = "(c) one\n(d) two\n\niv) three\nv) four\n\n#. five\n#. six\n\nA. seven\nB. eight\n"
    text = "(c) one\n(d) two\n\niv) three\nv) four\n\n1. five\n2. six\n\nA. seven\nB. eight"
    assert load_one("a.rst", page).text == text


@given(st.lists(st.sampled_from(["*", "**", "`", "``", "|", "_`", "_", "\\", " ", "a", "(", ":r:"]), max_size=60))
def test_marks_without_an_end_are_read_as_docutils_reads_them(parts):
    page = "x" + "".join(parts)
    source = Source("a.rst", page.encode(), CorpusLimits())
    read = rst.load(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rst, "mark_reader", lambda settings: None)
        assert rst.load(source) == read


@pytest.mark.parametrize("mark", ["*", "**", "`", "``", "|", "_`", ":ref:`"])
def test_an_end_that_is_not_there_is_looked_for_once(load_one, monkeypatch, mark):
    num_searches = 0
    search = rst_marks._End._search

    def counted(self, text):
        nonlocal num_searches
        num_searches += 1
        return search(self, text)

    monkeypatch.setattr(rst_marks._End, "_search", counted)
    page = f"{mark}word " * 50
    assert load_one("a.rst", page).text == page.strip()
    assert num_searches == 1


def test_line_blocks_keep_their_lines_and_indents(load_one):
    page = "| 12 High *Street*\n| Bath\n|\n|   England\n|     Europe\n| Post\n"
    assert load_one("a.rst", page).text == "12 High Street\nBath\n\n  England\n    Europe\nPost"


def test_a_role_that_a_document_defines_does_not_reach_the_next(load_one):
    page = "Returns a :cpp:`std::vector<int>`, :strongish:`word`.\n"
    alone = load_one("b.rst", page).text
    assert alone == "Returns a std::vector<int>, word."
    defined = load_one("a.rst", f".. role:: cpp(code)\n   :language: cpp\n.. role:: strongish(title)\n\n{page}").text
    assert defined.endswith("word.")
    assert load_one("b.rst", page).text == alone


def test_roles_of_documents_that_are_read_at_once_keep_apart(load_one):
    """Each defines the same role anew, as one that changes what is shown or not."""
    bases = ("emphasis", "pep-reference")
    pages = [f".. role:: mine({base})\n\n" + ":mine:`8` y\n" * 50 for base in bases * 4]
    sources = [Source(f"{number}.rst", page.encode(), CorpusLimits()) for number, page in enumerate(pages)]
    alone = [rst.load(source) for source in sources]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(rst.load, sources)) == alone


@pytest.mark.parametrize(
    ("role", "text"),
    [
        (":ref:`Install <install>`", "Install"),
        (":ref:`Install<install>`", "Install"),
        (":std:doc:`Install<install>`", "Install"),
        (":cpp:any:`std::map <map>`", "std::map"),
        (":cpp:type:`std::vector<int>`", "std::vector<int>"),
        (":cpp:type:`a vector <std::vector>`", "a vector"),
    ],
)
def test_the_target_of_a_role_is_left_out(load_one, role, text):
    assert load_one("a.rst", f"See {role}.\n").text == f"See {text}."


def test_a_default_role_does_not_reach_the_next_document(load_one):
    load_one("a.rst", ".. default-role:: literal\n.. role:: mine(emphasis)\n\n`x` :mine:`y`\n")
    assert load_one("b.rst", "`x` :mine:`y` :other:`z <t>`\n").text == "x y z"


def test_code_that_holds_a_fence(load_one):
    assert load_one("a.rst", "::\n\n    ```\n    x\n    ```\n").text == "````\n```\nx\n```\n````"


def test_settings_are_made_once_for_all_directives(load_one, monkeypatch):
    """docutils makes them in milliseconds, and each directive that it does not know is a parse of its own."""
    made = []
    make = frontend.get_default_settings
    monkeypatch.setattr(frontend, "get_default_settings", lambda *parts: made.append(1) or make(*parts))
    page = "".join(f".. py:function:: f{number}(x)\n\n   Adds {number}.\n\n" for number in range(20))
    assert load_one("a.rst", page).text.count("Adds") == 20
    assert len(made) <= 1


def test_deep_nesting_is_read_or_a_typed_error(load_one):
    from cag.errors import UnreadableDocument

    page = "".join("  " * depth + f"* level {depth}\n\n" for depth in range(300))
    with pytest.raises(UnreadableDocument):
        load_one("a.rst", page)
