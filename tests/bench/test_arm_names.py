from __future__ import annotations

import pytest

from cag.errors import UsageError
from cag_bench.arm_names import DEFAULT_ARMS, ArmSpec, all_arm_names, parse_arms


def test_names_are_parsed_in_their_order():
    assert parse_arms(" rag-dense@7, cag-hot,full-prefill ,rag-bm25@12") == (
        ArmSpec("rag-dense@7", "dense", 7),
        ArmSpec("cag-hot"),
        ArmSpec("full-prefill"),
        ArmSpec("rag-bm25@12", "bm25", 12),
    )


def test_default_arms_are_those_of_the_demo():
    names = [spec.name for spec in parse_arms(DEFAULT_ARMS)]
    assert names == ["cag-hot", "cag-disk", "full-prefill", "rag-bm25@3", "rag-hybrid@3"]


def test_all_is_every_arm_with_the_four_ks():
    specs = parse_arms("all")
    assert [spec.name for spec in specs] == all_arm_names()
    assert len(specs) == 16
    assert {(spec.retriever, spec.k) for spec in specs if spec.retriever} == {
        (kind, k) for kind in ("bm25", "dense", "hybrid") for k in (1, 3, 5, 10)
    }
    assert [spec.name for spec in specs if spec.is_cached] == ["cag-hot", "cag-ram", "cag-disk"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        "cag",
        "cag-hot@3",
        "rag-bm25",
        "rag-bm25@0",
        "rag-bm25@-1",
        "rag-bm25@03",
        "rag-colbert@3",
        "all,cag-hot",
    ],
)
def test_other_names_are_refused(text):
    with pytest.raises(UsageError, match="arm"):
        parse_arms(text)


def test_a_name_that_stands_twice_is_refused():
    with pytest.raises(UsageError, match="twice: cag-hot"):
        parse_arms("cag-hot,full-prefill,cag-hot")
