"""`doctor` and `pull`: what is here."""

import re
import shutil

import pytest
import torch

from cag.cli.doctor import print_report
from cag.cli.options import MaxTokensOption, TemperatureOption, TopPOption
from cag.cli.output import bytes_text
from cag.models import CATALOGUE
from cag.models.record import write_record
from cag.server import ServerSettings
from cag_kernels import has_compiler, has_dots, has_numba, has_tiles, prefix_paths
from cag_kernels import largest as largest_module
from cag_kernels.largest import choice_arithmetic
from cag_kernels.packed import PANEL, PackedWeight
from cag_store import DEFAULT_CACHE_BYTES


@pytest.fixture
def pulled_model(cag_home):
    """The smallest folder that counts as a pulled model of the catalogue."""
    directory = cag_home / "models" / "smollm2-135m-instruct"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    write_record(CATALOGUE[directory.name], {"type": "wheel"}, directory)
    yield directory
    shutil.rmtree(directory)


def test_doctor_says_what_is_used_and_why(cag, book, pulled_model, capsys):
    examined = cag("doctor", "--device", "cpu", "--store", book, "--json")
    found = examined.json
    assert "measuring" in examined.stderr
    assert set(found) == {
        "device", "attention", "kernels", "runtime", "memory", "store", "models", "versions", "unmet_requirements",
    }  # fmt: skip
    assert found["device"]["used"] == "cpu"
    assert {"cuda", "flash_attn", "triton"} <= set(found["device"])
    assert set(found["attention"]) == {"prefill", "question", "answer"}
    assert found["attention"]["prefill"].startswith(("fused: ", "blocks: "))
    if found["runtime"]["compute_dtype"] == "float32" and has_compiler():
        assert found["attention"]["question"].startswith("compiled: ")
    assert not any("Triton" in served or "flash-attn" in served for served in found["kernels"].values())  # on a CPU
    assert found["kernels"]["caches in the codec transform"] == "decoded by the store"
    if has_numba():
        assert found["kernels"]["layers of a Llama, few rows"] == "compiled, recorded once"
    assert found["kernels"]["greedy choice"] == choice_arithmetic()
    assert found["runtime"]["measured_ms"]
    products = {key.split("/")[0] for key in found["runtime"]["measured_ms"]}
    assert ("tiles" in products, "dots" in products) == (has_tiles(), has_dots() and not has_tiles())
    assert found["runtime"]["reason"] == "set by CAG_THREADS"
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    size = sum(path.stat().st_size for path in book.rglob("*") if path.is_file())
    assert found["store"]["num_caches"] == 1
    assert found["store"]["num_bytes"] == size
    assert found["versions"]["torch"]
    assert found["models"] == [{"name": pulled_model.name, "directory": str(pulled_model), "num_bytes": 2}]

    print_report(found)
    named = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"device", "CUDA", "flash-attn", "Triton", "compute", "threads", "memory", "store", "models"} <= named
    assert any(name.startswith("measured ") for name in named)
    for unmet, said in (
        (None, "not checked: cag-engine runs from a checkout"),
        ([], "all there"),
        (["numba>=0.62: not installed", "lxml>=6: 5.4"], "numba>=0.62: not installed; lxml>=6: 5.4"),
    ):
        print_report(found | {"unmet_requirements": unmet})
        assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == ["required", said]


@pytest.mark.parametrize(
    "numba, tiles, dots, pairs, expected",
    [
        (True, True, False, True, "from 8 bits of the output matrix where tiles multiply or it is packed"),
        (
            True,
            False,
            True,
            True,
            "from 8 bits of the output matrix where vectors multiply bfloat16 or it is packed",
        ),
        (True, False, False, True, "from 8 bits of the output matrix where it is packed"),
        (True, False, True, False, "from all logits"),
        (True, False, False, False, "from all logits"),
        (False, True, True, True, "from all logits"),
    ],
    ids=["tiles", "dots", "pairs", "dots without pairs", "none", "no numba"],
)
def test_doctor_says_how_greedy_choices_are_made(monkeypatch, numba, tiles, dots, pairs, expected):
    """And what it says is what serves a packed matrix."""
    monkeypatch.setattr(largest_module, "has_numba", lambda: numba)
    monkeypatch.setattr(largest_module, "has_byte_tiles", lambda: tiles)
    monkeypatch.setattr(largest_module, "prefers_dots", lambda: dots)
    monkeypatch.setattr(largest_module, "_has_pairs", lambda: pairs)
    said = prefix_paths(torch.device("cpu"))["greedy choice"]
    assert said.removesuffix(", half of its memory more") == expected
    packed = PackedWeight(torch.empty(largest_module._LEAST_FEATURES // PANEL, 16, PANEL, dtype=torch.bfloat16), 4096)
    assert largest_module.largest_output_serves(packed) is ("packed" in said)
    assert prefix_paths(torch.device("cuda"))["greedy choice"] == "from all logits"


def test_pull_of_a_directory_checks_it_and_says_where_it_is(cag, tiny_model_dir):
    pulled = cag("pull", tiny_model_dir, "--json").json
    size = sum(path.stat().st_size for path in tiny_model_dir.rglob("*") if path.is_file())
    assert pulled == {
        "name": str(tiny_model_dir), "directory": str(tiny_model_dir), "source": "local", "num_bytes": size,
    }  # fmt: skip
    assert str(tiny_model_dir) in cag("pull", tiny_model_dir).stdout


def test_pull_finds_a_catalogue_model_that_is_here(cag, pulled_model):
    pulled = cag("pull", pulled_model.name, "--json").json
    assert (pulled["source"], pulled["directory"]) == ("wheel", str(pulled_model))


def test_the_defaults_that_the_help_names_are_the_engines(cag):
    from inspect import signature
    from typing import get_args

    from cag.engine import Engine
    from cag.generation.generate import SamplingOptions
    from cag.models import DEFAULT_MODEL
    from cag_store import Store

    defaults = SamplingOptions()
    shown = {"max_tokens": MaxTokensOption, "temperature": TemperatureOption, "top_p": TopPOption}
    for name, option in shown.items():
        assert float(get_args(option)[1].show_default) == getattr(defaults, name)
    printed = " ".join(cag("build", "--help").stdout.split())
    codec = signature(Engine.build).parameters["codec"].default
    for default in (DEFAULT_MODEL, codec):
        assert f"[default: ({default})]" in printed
    grace_s = signature(Store.gc).parameters["grace_s"].default
    assert f"default: ({grace_s:.0f})" in " ".join(cag("gc", "--help").stdout.split())
    assert f"default: ({bytes_text(DEFAULT_CACHE_BYTES).replace('.0 ', '')})" in " ".join(
        cag("ask", "--help").stdout.split()
    )


def test_the_defaults_that_the_servers_help_names_are_its_settings(cag):
    printed, settings = cag("serve", "--help").stdout, ServerSettings()
    shown = {
        option: re.search(rf"--{option} .*?default: \((.*?)\)", " ".join(printed.split()))[1]
        for option in (
            "slots",
            "queue",
            "max-tokens",
            "session-ttl",
            "conversation-bytes",
            "max-sessions",
            "max-body-bytes",
        )
    }
    assert shown == {
        "slots": str(settings.num_slots),
        "queue": str(settings.max_waiting),
        "max-tokens": str(settings.default_max_tokens),
        "session-ttl": f"{settings.session_ttl_s / 60:.0f}m",
        "conversation-bytes": f"{settings.conversation_bytes >> 20}MiB",
        "max-sessions": str(settings.max_sessions),
        "max-body-bytes": f"{settings.max_body_bytes >> 20}MiB",
    }
