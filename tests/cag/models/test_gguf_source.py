"""GGUF files that users have: found, converted once, named by what is in them."""

import shutil

import gguf
import pytest

from cag.errors import InsufficientResources, ModelError, ModelNotFound, UnsupportedModel
from cag.models import fetch_model, local_directory, model_directory, read_record, verify_record
from cag.models.gguf_file import GgufFile


@pytest.fixture
def path(tiny_gguf, tmp_path):
    return shutil.copy(tiny_gguf.path, tmp_path / "My Model.Q4_K_M.gguf")


def test_a_file_becomes_a_model_once(path, home):
    stages = []
    found = fetch_model(path, progress=lambda stage, *_: stages.append(stage))
    record = read_record(found.directory)
    assert list(dict.fromkeys(stages)) == ["convert", "record"]
    assert found.name == f"My-Model.Q4_K_M-{record['source']['sha256'][:12]}" and found.source == "gguf"
    assert found.directory == model_directory(found.name) == local_directory(str(path)) == local_directory(found.name)
    assert record["source"]["files"] == ["My Model.Q4_K_M.gguf"]
    verify_record(found.directory)
    assert [entry.name for entry in (home / "models").iterdir() if ".lock" not in entry.name] == [found.name]

    def never(*event):
        pytest.fail(f"worked again: {event}")

    assert fetch_model(str(path), progress=never) == found
    moved = path.rename(path.with_name("other")) and shutil.move(path.with_name("other"), path)
    assert fetch_model(moved, progress=never) == found, "the same bytes, with another time and place"
    path.unlink()
    assert fetch_model(found.name, progress=never) == found, "by its own name, when the file has gone"


def test_a_file_that_changed_is_another_model(path, tiny_gguf):
    first = fetch_model(path)
    tiny_gguf.rewrite(path, quantized=("model.layers.1.mlp.up_proj.weight",))
    second = fetch_model(path)
    assert second.name != first.name and second.directory != first.directory
    assert read_record(first.directory) is not None


def test_a_file_that_cannot_be_read_is_a_typed_error(path, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cag.models.gguf_source.file_sha256", unreadable)
    for use in (fetch_model, local_directory):
        with pytest.raises(ModelError, match=r"cannot read .*\.gguf"):
            use(str(path))


def test_a_name_without_its_model_is_not_found():
    with pytest.raises(ModelNotFound, match="converted from a GGUF file"):
        fetch_model("model-0123456789ab")


def test_a_folder_with_one_file_is_that_file_and_with_several_none(path):
    found = fetch_model(path.parent)
    assert found == fetch_model(path)
    shutil.copy(path, path.with_name("mmproj-F16.gguf"))
    assert fetch_model(path.parent) == found
    shutil.copy(path, path.with_name("b.gguf"))
    with pytest.raises(UnsupportedModel, match=r"2 GGUF files; there are: My Model\.Q4_K_M\.gguf, b\.gguf\..*its path"):
        fetch_model(path.parent)


def test_too_little_disk_is_said_before_the_work(path, monkeypatch):
    monkeypatch.setattr("cag.models.resources.free_disk_bytes", lambda folder: 1_000_000)
    with pytest.raises(InsufficientResources, match=r"Converting My Model\.Q4_K_M\.gguf"):
        fetch_model(path, progress=lambda *_: pytest.fail("work began"))


def test_a_conversion_that_is_broken_off_leaves_nothing(path, home, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cag.models.convert._bfloat16_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_model(path)
    assert not [entry.name for entry in (home / "models").iterdir() if ".lock" not in entry.name]


def cut(path, num_tensors):
    """The file at `path` in parts of `num_tensors`."""
    reader = gguf.GGUFReader(path)
    name = path.with_name("cut.gguf")
    writer = gguf.GGUFWriter(name, "llama", split_max_tensors=num_tensors)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob("cut-*.gguf"))


def test_parts_of_a_model_are_read_as_one(path):
    whole = fetch_model(path)
    first, second, *others = cut(path, 7)
    found = fetch_model(first)
    assert found == fetch_model(others[-1]), "whichever part is named"
    assert found.name.startswith("cut-") and len(read_record(found.directory)["source"]["files"]) == 2 + len(others)
    weights = "model.safetensors"
    assert (found.directory / weights).read_bytes() == (whole.directory / weights).read_bytes()
    content = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(UnsupportedModel, match="not the parts of one model"):
        GgufFile(first)
    second.unlink()
    with pytest.raises(UnsupportedModel, match=second.name):
        fetch_model(first)
    path.with_name("alone.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match="not the parts of one model"):
        GgufFile(path.with_name("alone.gguf"))
