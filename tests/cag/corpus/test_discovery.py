"""Which files an argument names, and in which order."""

import os
import random
import tempfile
from pathlib import Path, PurePath

import pytest

from cag.corpus import load_corpus
from cag.corpus.folders import natural_key
from cag.errors import EmptyCorpus, UnreadableDocument


def ids(report):
    return [document.doc_id for document in report.documents]


def test_natural_order_is_that_of_the_names_and_not_of_the_file_system(tree):
    names = ["a/10.md", "a/2.md", "a.md", "B.md", "c/x/1.txt", "c/y.txt", "chapter 9.md", "chapter 10.md"]
    expected = ["a/2.md", "a/10.md", "a.md", "B.md", "c/x/1.txt", "c/y.txt", "chapter 9.md", "chapter 10.md"]
    shuffled = random.Random(7).sample(names, len(names))
    root = tree({name: f"text of {name}" for name in shuffled})
    assert ids(load_corpus([root])) == expected


def test_order_does_not_depend_on_the_listing(tree, monkeypatch):
    root = tree({f"{folder}/{number}.md": f"{folder} {number}" for folder in "abc" for number in range(12)})
    expected = ids(load_corpus([root]))
    iterdir = Path.iterdir
    for seed in range(5):
        monkeypatch.setattr(
            Path,
            "iterdir",
            lambda self, seed=seed: iter(random.Random(seed).sample(found := list(iterdir(self)), len(found))),
        )
        assert ids(load_corpus([root])) == expected


def test_an_added_document_leaves_the_order_and_ids_of_the_others_alone(tree):
    root = tree({f"{number}.md": f"text {number}" for number in range(5)})
    before = ids(load_corpus([root]))
    tree({"3b.md": "new"})
    after = ids(load_corpus([root]))
    assert [doc_id for doc_id in after if doc_id != "3b.md"] == before


def test_keys_differ_for_names_that_differ_only_in_case():
    assert natural_key(PurePath("a.md")) != natural_key(PurePath("A.md"))


def test_arguments_keep_the_order_in_which_they_are_given(tree):
    root = tree({"a.md": "a", "b/c.md": "c"})
    assert ids(load_corpus([root / "b", root / "a.md"])) == ["c.md", "a.md"]


def test_hidden_version_control_and_environment_folders_are_left_out(tree):
    excluded = [
        ".git/x.md",
        ".hidden.md",
        "~$kept.docx",
        "node_modules/x.md",
        "__pycache__/x.py",
        "CVS/x.md",
        "env/lib/x.py",
    ]
    root = tree({"kept.md": "kept", "env/pyvenv.cfg": "", **{name: name for name in excluded}})
    assert ids(load_corpus([root])) == ["kept.md"]


def test_a_store_among_the_documents_is_passed_over_and_said(tree):
    stores = {"caches/format": "cag-store 1\n", "caches/refs/book.json": "{}", "v2/later/format": "cag-store 27\n"}
    root = tree({**stores, "v2/later/a.md": "none of ours", "v2/b.md": "b", "notes/format": "A4", "notes/a.md": "a"})
    report = load_corpus([root])
    assert ids(report) == ["notes/a.md", "v2/b.md"]
    said = {(str(root / folder), "a store of caches") for folder in ("caches", "v2/later")}
    assert said == set(report.skipped) - {(str(root / "notes/format"), "unknown type")}


def test_a_hidden_folder_given_by_itself_is_read(tree):
    assert ids(load_corpus([tree({".notes/a.md": "a"}) / ".notes"])) == ["a.md"]


def test_unknown_types_in_folders_are_listed_not_read(tree):
    root = tree({"a.md": "a", "picture.xyz": b"\x00\x01"})
    report = load_corpus([root])
    assert report.skipped == (((root / "picture.xyz").as_posix(), "unknown type"),)


def test_a_file_of_unknown_type_given_by_itself_is_read_as_text(tree):
    root = tree({"notes.xyz": "plain words", "data.xyz": b"\x00\x01\x02"})
    assert load_corpus([root / "notes.xyz"]).documents[0].text == "plain words"
    with pytest.raises(UnreadableDocument, match="binary"):
        load_corpus([root / "data.xyz"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.md", ["1.md", "2.md"]),
        ("**/*.md", ["1.md", "2.md", "d/3.md", "d/e/4.md"]),
        ("d/**", ["3.md", "e/4.md", "n.txt"]),
        ("[13].md", ["1.md"]),
        ("?.md", ["1.md", "2.md"]),
        ("*/e/*.md", ["d/e/4.md"]),
        ("**/e/*", ["d/e/4.md"]),
        ("*", ["1.md", "2.md"]),
    ],
)
def test_globs(tree, pattern, expected):
    root = tree({"1.md": "1", "2.md": "2", "d/3.md": "3", "d/e/4.md": "4", "d/n.txt": "n", ".h/5.md": "5"})
    assert ids(load_corpus([f"{root}/{pattern}"])) == expected


def test_a_glob_that_asks_for_an_unknown_type_reads_it(tree):
    root = tree({"a.notes": "a", "b.notes": "b", "c.md": "c"})
    assert ids(load_corpus([f"{root}/*.notes"])) == ["a.notes", "b.notes"]


def test_an_existing_name_with_brackets_is_no_glob(tree):
    root = tree({"[1].md": "bracketed", "1.md": "other"})
    assert ids(load_corpus([f"{root}/[1].md"])) == ["[1].md"]


@pytest.mark.parametrize("argument", ["absent", "absent.md", "*.absent", "absent/*.md"])
def test_what_names_nothing_is_an_error_that_names_it(tree, argument):
    root = tree({"a.md": "a"})
    with pytest.raises(UnreadableDocument) as caught:
        load_corpus([root / "a.md", f"{root}/{argument}"])
    assert caught.value.facts["path"] == f"{root}/{argument}"
    report = load_corpus([root / "a.md", f"{root}/{argument}"], skip_errors=True)
    assert ids(report) == ["a.md"]
    assert report.skipped[0][0] == f"{root}/{argument}"


def test_a_relative_path_and_a_single_string(tree, monkeypatch):
    root = tree({"a.md": "a"})
    monkeypatch.chdir(root)
    (document,) = load_corpus("a.md").documents
    assert (document.doc_id, document.path) == ("a.md", f"{root}/a.md")
    assert ids(load_corpus(".")) == ["a.md"]


def test_links_in_loops_end(tree):
    root = tree({"a.md": "a", "d/b.md": "b"})
    (root / "d" / "up").symlink_to(root)
    (root / "d" / "self").symlink_to(root / "d")
    (root / "d" / "above").symlink_to(root.parent)
    report = load_corpus([root])
    assert ids(report) == ["a.md", "d/b.md"]
    assert len(report.skipped) == 3


def test_links_to_files_and_to_folders_outside_are_followed_once(tree, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "o.md").write_text("outside")
    (outside / "back").symlink_to(tmp_path / "root")
    root = tree({"a.md": "a"})
    (root / "file.md").symlink_to(outside / "o.md")
    (root / "first").symlink_to(outside)
    (root / "second").symlink_to(outside)
    report = load_corpus([root])
    assert ids(report) == ["a.md", "file.md"]
    assert report.duplicates == ((f"{root}/first/o.md", f"{root}/file.md"),)
    assert [path for path, _ in report.skipped] == [f"{root}/first/back", f"{root}/second"]


def test_broken_links_and_pipes_are_listed(tree):
    root = tree({"a.md": "a"})
    (root / "gone.md").symlink_to(root / "nowhere.md")
    os.mkfifo(root / "pipe.md")
    reasons = dict(load_corpus([root]).skipped)
    assert reasons == {f"{root}/gone.md": "broken link", f"{root}/pipe.md": "not a regular file"}
    with pytest.raises(UnreadableDocument, match="neither a file nor a folder"):
        load_corpus([root / "pipe.md"])


def test_a_file_name_that_is_not_utf8(tree):
    root = tree({"a.md": "a"})
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.md")).write_text("coffee")
    report = load_corpus([root])
    assert ids(report) == ["a.md", "caf\ufffd.md"]
    report.documents[1].path.encode("utf-8")


@pytest.fixture
def private_tree(request):
    """A folder with a file and a folder of the mode that is asked for, seen by a user whom modes bind."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "private").mkdir()
        for name in ("a.md", "private/b.md"):
            (root / name).write_text(name)
            (root / name).chmod(0o644)
        (root / "private").chmod(request.param)
        user = os.geteuid()
        os.seteuid(user or 65534)  # modes do not bind root
        yield root
        os.seteuid(user)
        (root / "private").chmod(0o755)


@pytest.mark.parametrize(
    ("private_tree", "refused"), [(0, "private"), (0o444, "private/b.md")], indirect=["private_tree"]
)
def test_a_folder_without_rights_is_an_error_that_names_it(private_tree, refused):
    with pytest.raises(UnreadableDocument, match="Permission denied") as caught:
        load_corpus([private_tree])
    assert caught.value.facts["path"] == f"{private_tree}/{refused}"
    report = load_corpus([private_tree], skip_errors=True)
    assert ids(report) == ["a.md"]
    assert [path for path, _ in report.skipped] == [f"{private_tree}/{refused}"]
    with pytest.raises(UnreadableDocument, match="Permission denied"):
        load_corpus([private_tree / "private" / "b.md"])


@pytest.mark.parametrize("argument", ["x" * 300 + ".md", "~no-such-user/docs", "nul\0byte"])
def test_odd_paths_are_errors_that_name_them(tree, argument):
    report = load_corpus([tree({"a.md": "a"}), argument], skip_errors=True)
    assert ids(report) == ["a.md"]
    assert report.skipped[0][0].endswith(argument)


def test_no_argument_is_an_empty_corpus():
    with pytest.raises(EmptyCorpus):
        load_corpus([])
