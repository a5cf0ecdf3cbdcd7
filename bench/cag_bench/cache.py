"""The cache of a run: built into the store at hand, or taken from it where the same chunks lie there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cag.building.builder import build_cache
from cag.building.options import BuildOptions, BuildProgress
from cag.engine import Engine
from cag.prompt import PrefixLayout
from cag_bench.corpus import BenchCorpus

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchCache:
    """A built cache. `build_s` (prefill, encoding, writing, measuring) is None when chunks of an earlier build were
    reused: then the time was not that of a build."""

    name: str
    digest: str
    codec: dict[str, Any]
    num_tokens: int
    reused_tokens: int
    raw_bytes: int
    stored_bytes: int
    build_s: float | None
    build_prefill_s: float | None
    build_encode_s: float | None
    fidelity: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What rows and summary say of it."""
        return {**asdict(self), "build": "computed" if self.build_s is not None else "reused"}


def build_bench_cache(
    engine: Engine, corpus: BenchCorpus, layout: PrefixLayout, codec: str, progress: Progress
) -> BenchCache:
    """Build the corpus into the engine's store as `bench-<digest>`. Raises as `cag.building.builder.build_cache`, among
    them `CorpusTooLarge`."""

    def on_progress(build: BuildProgress) -> None:
        progress(f"build: {build.stage}, tokens", build.done_tokens, build.total_tokens)

    name = cache_name(engine, layout, codec)
    report = build_cache(engine.model, engine.store, name, corpus.documents, BuildOptions(codec=codec), on_progress)
    is_whole = report.reused_tokens == 0
    return BenchCache(
        name=name,
        digest=report.digest,
        codec=dict(engine.find(name)[1].codec),
        num_tokens=report.num_tokens,
        reused_tokens=report.reused_tokens,
        raw_bytes=report.raw_bytes,
        stored_bytes=report.stored_bytes,
        build_s=report.total_s if is_whole else None,
        build_prefill_s=report.prefill_s if is_whole else None,
        build_encode_s=report.encode_s if is_whole else None,
        fidelity=report.fidelity.to_json(),
    )


def cache_name(engine: Engine, layout: PrefixLayout, codec: str) -> str:
    """`bench-` and a digest of prompt, model and codec, so that no two different caches share a name."""
    model = engine.model
    identity = [asdict(model.fingerprints), str(model.compute_dtype), str(model.kv_dtype), codec]
    digest = hashlib.sha256(json.dumps(identity).encode() + layout.token_ids.tobytes())
    return f"bench-{digest.hexdigest()[:16]}"
