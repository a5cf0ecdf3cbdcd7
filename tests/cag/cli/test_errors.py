"""Exit codes and how errors are said: each class of the table, and real command lines that end in them."""

import json

import pytest

from cag.cli.commands import app
from cag.cli.output import report_error
from cag.errors import ERROR_TABLE, CagError
from tiny import write_tiny_model


@pytest.mark.parametrize("kind", ERROR_TABLE, ids=lambda kind: kind.__name__)
def test_each_error_of_the_table_has_its_exit_code_and_word(kind, capsys):
    row = ERROR_TABLE[kind]
    hint = {"hint": "Do that."} if issubclass(kind, CagError) else {}
    error = kind("This went wrong.", **hint)
    assert report_error(error, as_json=True, verbose=False) == row.exit_code
    assert json.loads(capsys.readouterr().out)["error"] == {
        "code": row.code, "message": "This went wrong.", "hint": hint.get("hint", ""), "exit_code": row.exit_code,
    }  # fmt: skip
    report_error(error, as_json=False, verbose=False)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["error: This went wrong.", *(f"hint: {text}" for text in hint.values())]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["show", "nix"], 31, "cache_not_found"),
        (["verify", "nix"], 31, "cache_not_found"),
        (["rm", "nix"], 31, "cache_not_found"),
        (["pin", "nix"], 31, "cache_not_found"),
        (["unpin", "nix"], 31, "cache_not_found"),
        (["expire", "nix", "7d"], 31, "cache_not_found"),
        (["expire", "nix", "soon"], 2, "invalid_request"),
        (["ask", "nix", "Why?"], 31, "cache_not_found"),
        (["chat", "nix"], 31, "cache_not_found"),
        (["update", "nix", "."], 31, "cache_not_found"),
        (["show", "../book"], 57, "invalid_name"),
        (["ask", "book", " "], 2, "invalid_request"),
        (["ask", "book", "Why?", "--top-p", "2"], 2, "invalid_request"),
        (["ask", "book", "Why?", "--temperature", "inf"], 2, "invalid_request"),
        (["ask", "book", "Why?", "--seed", "1" + 20 * "0"], 2, "invalid_request"),
        (["ask", "book", "Why \udcff?"], 2, "invalid_request"),
        (["ask", "book", "Why?", "--device", "abacus"], 2, "invalid_request"),
        (["ask", "book", "Why?", "--dtype", "abacus"], 2, "invalid_request"),
        (["build", "", "--name", "b"], 2, "invalid_request"),
        (["export", "book", ""], 2, "invalid_request"),
        (["pull", ""], 11, "model_not_found"),
        (["ask", "book", "why " * 2500], 41, "context_length_exceeded"),
        (["gc", "--grace-seconds", "-1"], 2, "invalid_request"),
        (["show"], 2, "invalid_request"),
        (["show", "book", "--nix"], 2, "invalid_request"),
    ],
    ids=lambda value: " ".join(value)[:32] if isinstance(value, list) else None,
)
def test_command_lines_that_fail(cag, book, arguments, exit_code, code):
    where = [] if arguments[0] == "pull" else ["--store", book]
    failed = cag(*arguments, *where, "--json")
    assert (failed.exit_code, failed.error["exit_code"], failed.error["code"]) == (exit_code, exit_code, code)
    plain = cag(*arguments, *where)
    assert (plain.exit_code, plain.stdout) == (exit_code, "")
    assert "rror: " in plain.stderr
    assert "Traceback" not in plain.stderr


@pytest.mark.parametrize(
    ("model", "exit_code"), [("nix", 11), ("nobody/nothing", 12), ("corpus", 14)], ids=["unknown", "hub", "no model"]
)
def test_models_that_cannot_be_had(cag, corpus, monkeypatch, model, exit_code):
    monkeypatch.chdir(corpus.parent)
    assert cag("pull", model, "--json").error["exit_code"] == exit_code
    assert cag("build", corpus, "--name", "b", "--model", model, "--json").error["exit_code"] == exit_code


def test_a_corpus_without_text(cag, tiny_model_dir, tmp_path):
    (tmp_path / "void").mkdir()
    failed = cag(
        "build", tmp_path / "void", "--name", "b", "--model", tiny_model_dir, "--store", tmp_path / "s", "--json"
    )
    assert failed.error["exit_code"] == 21


def test_a_corpus_beyond_the_window_says_by_how_much(cag, tiny_model_dir, tmp_path):
    (tmp_path / "long.txt").write_text("All work and no play. " * 500)
    failed = cag(
        "build", tmp_path / "long.txt", "--name", "b", "--model", tiny_model_dir, "--store", tmp_path / "s", "--json"
    )
    assert failed.error["exit_code"] == 23
    assert "more than fit" in failed.error["message"]


def test_a_cache_of_another_model(cag, book, tmp_path):
    other = write_tiny_model(tmp_path / "other", seed=1)
    failed = cag("ask", "book", "Why?", "--model", other, "--store", book, "--json")
    assert (failed.exit_code, failed.error["code"]) == (32, "cache_mismatch")


def test_a_model_that_has_moved_is_asked_for(cag, corpus, tmp_path):
    model, options = write_tiny_model(tmp_path / "model"), ("--store", tmp_path / "s", "--json")
    cag("build", corpus, "--name", "book", "--model", model, *options)
    model.rename(tmp_path / "elsewhere")
    failed = cag("ask", "book", "Why?", *options)
    assert (failed.exit_code, failed.error["hint"]) == (11, "Say with --model where it is now.")
    asked = cag("ask", "book", "Why?", "--model", tmp_path / "elsewhere", "--max-tokens", 1, *options)
    assert asked.exit_code == 0


@pytest.mark.parametrize("folder", ["chunks", "manifests", "refs"])
def test_a_damaged_cache_is_not_answered_from(cag, book, damage, folder):
    damage(folder)
    failed = cag("ask", "book", "Why?", "--store", book, "--json")
    assert (failed.exit_code, failed.error["code"]) == (52, "corrupt_entry")


@pytest.mark.parametrize("folder", ["chunks", "manifests", "blobs"])
def test_a_cache_of_which_a_part_has_gone_is_not_called_missing(cag, book, tmp_path, folder):
    for path in (book / folder).rglob("*"):
        if path.is_file():
            path.unlink()
    asked = cag("ask", "book", "Why?", "--store", book, "--json")
    copied = cag("export", "book", tmp_path / "copy", "--store", book, "--json")
    for failed in (asked, copied):
        assert (failed.exit_code, failed.error["code"]) == (52, "corrupt_entry")


def test_a_folder_that_is_no_store(cag, corpus):
    assert cag("ls", "--store", corpus, "--json").error["code"] == "unsupported_format"


def test_usage_errors_say_how_the_command_is_called(cag):
    failed = cag("show")
    assert failed.stderr.startswith("Usage: cag show")
    assert failed.stdout == ""


def test_an_unforeseen_error_shows_its_traceback_only_when_verbose(capsys):
    def said(**how):
        try:
            raise RuntimeError("the moon\nis full")
        except RuntimeError as error:
            assert report_error(error, **how) == 1
        return capsys.readouterr()

    short, long = said(as_json=False, verbose=False), said(as_json=False, verbose=True)
    assert short.err.startswith("error: RuntimeError: the moon is full\nhint: ")
    assert "--verbose" in short.err
    assert "Traceback" not in short.err
    assert "Traceback" in long.err
    assert json.loads(said(as_json=True, verbose=False).out)["error"]["code"] == "internal_error"


def test_words_behind_two_dashes_are_no_options(cag, book):
    failed = cag("ask", "--store", book, "nix", "--", "--json")
    assert (failed.exit_code, failed.stdout) == (31, "")


def test_every_command_has_json_and_says_what_it_does():
    from typer.main import get_command

    commands = get_command(app).commands
    assert set(commands) == {
        "pull", "build", "update", "ask", "chat", "ls", "show", "verify", "rm", "gc", "pin", "unpin", "expire", "serve",
        "bench", "doctor", "export", "import",
    }  # fmt: skip
    for name, command in commands.items():
        assert command.get_short_help_str(60)
        if name != "bench":
            assert "--json" in {text for parameter in command.params for text in parameter.opts}


def test_without_arguments_the_commands_are_listed(cag):
    assert cag().stdout == cag("--help").stdout
    assert cag("--version").stdout.startswith("cag ")
    assert cag("bench", "ttft", "--help").exit_code == 0
