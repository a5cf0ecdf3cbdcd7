"""A container's limit counts wherever memory is asked for: read off a folder like that of its cgroup."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from cag import engine, model_files
from cag.building import requirements
from cag.errors import InsufficientResources
from cag.forward import choices
from cag.machine import huge_pages, memory_limits
from cag.models import resources

MACHINE = SimpleNamespace(total=1_000_000, available=600_000)


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Writes the files of a container with a limit, 70 kB in use and 20 kB of them page cache."""
    monkeypatch.setattr(memory_limits, "CGROUP_FOLDER", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: MACHINE)

    def write(limit):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("70000\n")
        (tmp_path / "memory.stat").write_text("anon 40000\ninactive_file 20000\n")

    return write


def both():
    return memory_limits.total_memory_bytes(), memory_limits.available_memory_bytes()


def test_without_a_cgroup_the_machine_counts(cgroup):
    assert both() == (1_000_000, 600_000)


def test_without_a_limit_the_machine_counts(cgroup):
    cgroup("max")
    assert both() == (1_000_000, 600_000)


def test_a_limit_counts_and_page_cache_is_free(cgroup):
    cgroup(100_000)
    assert both() == (100_000, 50_000)


def test_a_limit_above_the_machine_does_not_count(cgroup):
    cgroup(1 << 40)
    assert both() == (1_000_000, 600_000)


def test_a_limit_that_is_used_up_leaves_nothing(cgroup):
    cgroup(30_000)
    assert both() == (30_000, 0)


def test_without_statistics_no_page_cache_is_free(cgroup, tmp_path):
    cgroup(100_000)
    (tmp_path / "memory.stat").unlink()
    assert both() == (100_000, 30_000)


def test_conversions_are_refused_above_the_limit(cgroup):
    cgroup(100_000)
    resources.require_memory(50_000, "x")
    with pytest.raises(InsufficientResources):
        resources.require_memory(50_001, "x")


def test_weights_are_refused_above_the_limit(cgroup):
    cgroup(100_000)
    arguments = torch.float32, torch.device("cpu")
    model_files.check_memory(12_500, *arguments)
    with pytest.raises(InsufficientResources):
        model_files.check_memory(12_501, *arguments)


def test_caches_are_refused_above_the_limit(cgroup):
    cgroup(100_000)
    model = SimpleNamespace(device=torch.device("cpu"), kv_bytes_per_token=1000, recurrent=None)
    requirements.check_memory(model, SimpleNamespace(token_ids=[0] * 50))
    with pytest.raises(InsufficientResources):
        requirements.check_memory(model, SimpleNamespace(token_ids=[0] * 51))


def test_weights_are_moved_only_within_the_limit(cgroup):
    network = torch.nn.Linear(256, 100, bias=False)
    cgroup(100_000)
    assert huge_pages.move_weights(network) == 0
    cgroup(152_400)
    assert huge_pages.move_weights(network) == (network.weight.nbytes if huge_pages.has_huge_pages() else 0)


def test_a_copy_for_choices_is_made_only_within_the_limit(cgroup, monkeypatch):
    made = []
    monkeypatch.setattr(choices, "largest_output", lambda weight, *_: made.append(weight))
    choice = choices.GreedyChoice.__new__(choices.GreedyChoice)
    choice._weight = torch.zeros(6251, 2, dtype=torch.bfloat16)
    cgroup(100_000)
    choice.prepare()  # 12,502 bytes of 50,000
    assert not made
    cgroup(150_032)
    choice.prepare()
    assert len(made) == 1


def test_copies_beside_a_gpu_take_a_share_of_the_limit(cgroup):
    cgroup(100_000)
    opened = engine.Engine(SimpleNamespace(device=SimpleNamespace(type="cuda")), store=None)
    assert opened.host_copies.limit_bytes == 25_000
