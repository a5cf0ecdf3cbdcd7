"""`export`, `import`, and every command straight from a URL."""

import pytest


@pytest.fixture
def exported(cag, book, s3_url):
    """The cache `book` on an S3 server."""
    report = cag("export", "book", s3_url, "--store", book, "--json").json
    assert report["copied_bytes"] > 0
    assert report["bytes_per_s"] > 0
    return s3_url


def test_a_cache_goes_to_a_folder_and_comes_back_the_same(cag, book, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    out = cag("export", "book", there, "--name", "carried", "--store", book)
    assert out.exit_code == 0
    assert "carried is in" in out.stdout
    assert "copying" in out.stderr
    report = cag("import", there, "--name", "again", "--store", here, "--json").json
    assert report["reused_bytes"] == 0
    shown = [
        cag("show", name, "--store", store, "--json").json
        for name, store in (("book", book), ("carried", there), ("again", here))
    ]
    assert len({row["digest"] for row in shown}) == 1
    assert cag("verify", "again", "--store", here).exit_code == 0
    again = cag("import", there, "--name", "again", "--store", here, "--json").json
    assert (again["copied_bytes"], again["reused_bytes"]) == (0, report["copied_bytes"])


def test_what_cannot_be_copied_is_said(cag, book, tmp_path):
    assert cag("export", "nix", tmp_path / "x", "--store", book, "--json").error["code"] == "cache_not_found"
    assert cag("import", tmp_path / "empty", "--store", book, "--json").error["code"] == "cache_not_found"
    assert cag("import", "ftp://host/x", "--store", book, "--json").error["code"] == "unsupported_backend"
    cag("export", "book", tmp_path / "two", "--store", book)
    cag("export", "book", tmp_path / "two", "--name", "other", "--store", book)
    several = cag("import", tmp_path / "two", "--store", tmp_path / "here", "--json").error
    assert "book, other" in several["message"]
    assert (several["code"], several["hint"]) == ("invalid_request", "Say which with --cache NAME.")
    chosen = cag("import", tmp_path / "two", "--cache", "other", "--store", tmp_path / "here", "--json").json
    assert chosen["name"] == "other"


def test_a_cache_is_asked_and_listed_where_it_lies(cag, book, exported, proxy):
    question = ("When does the alpha gate open?", "--max-tokens", 1, "--json")
    first = cag("ask", "book", *question, "--store", exported).json
    proxy.requests.clear()
    again = cag("ask", "book", *question, "--store", exported).json
    assert (first["cache"]["tier"], again["cache"]["tier"]) == ("object-store", "disk")
    assert again["answer"] == first["answer"]
    assert not [request for request in proxy.requests if "/chunks/" in request.path]
    (listed,) = cag("ls", "--store", exported, "--json").json["caches"]
    assert (listed["name"], listed["digest"]) == ("book", first["cache"]["digest"])
    assert listed["last_used_at"] >= listed["created_at"]


@pytest.mark.slow
def test_every_command_works_from_a_url(cag, book, exported, proxy, shared_home):
    question = ("When does the alpha gate open?", "--max-tokens", 4, "--json")
    local = cag("ask", "book", *question, "--store", book).json
    remote = cag("ask", "book", *question, "--store", exported).json
    assert remote["answer"] == local["answer"]
    assert (local["cache"]["tier"], remote["cache"]["tier"]) == ("disk", "object-store")
    proxy.requests.clear()
    again = cag("ask", "book", *question, "--store", exported).json
    assert (again["answer"], again["cache"]["tier"]) == (local["answer"], "disk")
    assert not [request for request in proxy.requests if "/chunks/" in request.path]
    uncached = cag("ask", "book", *question, "--store", exported, "--cache-bytes", 0).json
    assert uncached["cache"]["tier"] == "object-store"
    assert (shared_home / "objects" / "total").is_file()
    listed = cag("ls", "--store", exported, "--json").json
    assert [row["name"] for row in listed["caches"]] == ["book"]
    assert listed["store"] == exported
    assert cag("show", "book", "--store", exported, "--json").json["digest"] == local["cache"]["digest"]
    assert cag("verify", "book", "--store", exported).exit_code == 0
    assert cag("pin", "book", "--store", exported).exit_code == 0
    assert cag("doctor", "--store", exported, "--json").json["store"]["num_caches"] == 1


def test_a_server_that_is_away_is_one_line_and_its_exit_code(cag, monkeypatch, s3_environment):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    away = cag("ls", "--store", "s3://shelf/x")
    assert away.exit_code == 60
    assert "no connection" in away.stderr
    assert "geheim" not in away.stderr + away.stdout


def test_the_engine_copies_too(tiny_model_dir, book, tmp_path):
    from cag.engine import Engine
    from cag.errors import CacheNotFound

    engine = Engine.load(str(tiny_model_dir), store=book)
    engine.export_cache("book", tmp_path / "there", new_name="carried")
    report = engine.import_cache(tmp_path / "there", "home")
    assert report.copied_bytes == 0
    assert engine.find("home")[1] == engine.find("book")[1]
    with pytest.raises(CacheNotFound):
        engine.export_cache("nix", tmp_path / "there")
