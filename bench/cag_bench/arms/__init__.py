"""The arms of the first-token benchmark, made from their names over one engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from cag_bench.arm_names import DISK, FULL_PREFILL, HOT, ArmSpec
from cag_bench.arms.base import ArmAnswer, ArmContext, BenchArm
from cag_bench.arms.cached import HotArm, StoredArm
from cag_bench.arms.full_prefill import FullPrefillArm
from cag_bench.arms.rag import RagArm

__all__ = ["ArmAnswer", "ArmContext", "BenchArm", "make_arm", "open_arms"]


def make_arm(spec: ArmSpec, context: ArmContext) -> BenchArm:
    """The arm of `spec`. A cached one needs `context.cache_name`, a RAG one its retriever in `context.retrievers`."""
    if spec.retriever is not None:
        return RagArm(spec.name, context.engine.model, context.retrievers[spec.retriever], spec.k)
    if spec.name == FULL_PREFILL:
        return FullPrefillArm(spec.name, context.engine.model, context.layout)
    assert context.cache_name is not None, "cached arms come with a built cache"
    if spec.name == HOT:
        return HotArm(spec.name, context.engine, context.cache_name)
    return StoredArm(spec.name, context.engine, context.cache_name, from_disk=spec.name == DISK)


@contextmanager
def open_arms(specs: Sequence[ArmSpec], context: ArmContext) -> Iterator[list[BenchArm]]:
    """The arms of `specs`, closed at the end."""
    with ExitStack() as stack:
        arms = []
        for spec in specs:
            arm = make_arm(spec, context)
            stack.callback(arm.close)
            arms.append(arm)
        yield arms
