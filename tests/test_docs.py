"""What the documents say is what the code does."""

from pathlib import Path

from cag.errors import ERROR_TABLE
from cag.server.errors import HTTP_CODES

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_of_errors_is_complete():
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    expected = [
        f"| {row.exit_code} | {row.http_status} | `{row.code}` | `{cls.__module__}.{cls.__name__}` | "
        f"{(cls.__doc__ or '').splitlines()[0]} |"
        for cls, row in ERROR_TABLE.items()
    ]
    assert rows[: len(expected)] == expected
    assert [row.split(" | ")[:2] for row in rows[len(expected) :]] == [
        [f"| {status}", f"`{code}`"] for status, code in HTTP_CODES.items()
    ]


def test_design_notes_and_format_are_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in (*sorted((ROOT / "docs" / "design").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))):
        assert str(path.relative_to(ROOT)) in readme, f"{path.name} is not linked"
