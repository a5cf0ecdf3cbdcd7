"""Which caches go when a store is larger than it may be: least worth first, and none in vain.

The worth of a byte is what it saves: seconds to rebuild its cache, over the cache's bytes, over the seconds since its
last use. So an expensive, small cache that was used a minute ago stays, and a cheap, large one that nobody has asked
for a month goes. What other caches hold as well stays with them, and is not counted as freed.
Source: cost over size as in GreedyDual-Size (Cao and Irani, USITS 1997), aged by the time since the last use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import median

from cag_store.backends import ObjectInfo
from cag_store.manifest import Manifest
from cag_store.usage import size_of

_SHORTEST_IDLE_S = 1.0
_MOST = 1e12  # seconds or tokens of a build: more is none


@dataclass(frozen=True)
class Tenant:
    """A cache that may be evicted: paths of all it holds, seconds since its last use, seconds to build it."""

    name: str
    paths: frozenset[str]
    total_bytes: int
    idle_s: float
    rebuild_s: float

    @property
    def worth(self) -> float:
        """Seconds of rebuilding that a byte saves, per second of its keep."""
        return self.rebuild_s / self.total_bytes / max(self.idle_s, _SHORTEST_IDLE_S)


@dataclass(frozen=True)
class Eviction:
    """A cache that goes, what that frees beyond those before it, and what spoke for and against it."""

    name: str
    freed_bytes: int
    total_bytes: int
    idle_s: float
    rebuild_s: float
    worth: float


def plan_evictions(
    tenants: Sequence[Tenant], infos: Mapping[str, ObjectInfo], fixed: Set[str], excess_bytes: int
) -> list[Eviction]:
    """The caches to evict so that `excess_bytes` become free, least worth first; as many as help when that is not
    enough. `fixed` are paths that something holds that stays."""
    order = sorted(tenants, key=lambda tenant: (tenant.worth, tenant.name))
    holders = Counter(path for tenant in order for path in tenant.paths - fixed)
    chosen: list[Tenant] = []
    freed = 0
    for tenant in order:
        if freed >= excess_bytes:
            break
        freed += _released(tenant, holders, infos, fixed)
        chosen.append(tenant)
    goal = min(freed, excess_bytes)
    for tenant in reversed(chosen):
        kept = size_of(infos, (path for path in tenant.paths - fixed if not holders[path]))
        if freed - kept >= goal:
            freed -= kept
            holders.update(tenant.paths - fixed)
            chosen.remove(tenant)
    return _described(chosen, order, infos, fixed)


def rebuild_seconds(manifests: Collection[Manifest]) -> dict[str, float]:
    """Seconds to build each cache from nothing, by digest: from its own build's clock where that computed anything,
    otherwise from the median rate of the others."""
    rates = {manifest.digest: _seconds_per_token(manifest) for manifest in manifests}
    typical = median([rate for rate in rates.values() if rate is not None] or [1.0])
    return {
        manifest.digest: manifest.num_tokens * (typical if (rate := rates[manifest.digest]) is None else rate)
        for manifest in manifests
    }


def _seconds_per_token(manifest: Manifest) -> float | None:
    """From the opaque `build` of the manifest, so nothing about it is taken for granted."""
    computed, *clocks = (_amount(manifest.build.get(key)) for key in ("computed_tokens", "prefill_s", "encode_s"))
    seconds = sum(clocks)
    return seconds / computed if computed >= 1 and seconds > 0 else None


def _amount(value: object) -> float:
    """A number of seconds or tokens; 0 for what is none."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= _MOST else 0.0


def _released(tenant: Tenant, holders: Counter[str], infos: Mapping[str, ObjectInfo], fixed: Set[str]) -> int:
    """Let `tenant` go of what it holds; the bytes that nobody holds then."""
    mine = tenant.paths - fixed
    holders.subtract(mine)
    return size_of(infos, (path for path in mine if not holders[path]))


def _described(
    chosen: Sequence[Tenant], everybody: Sequence[Tenant], infos: Mapping[str, ObjectInfo], fixed: Set[str]
) -> list[Eviction]:
    holders = Counter(path for tenant in everybody for path in tenant.paths - fixed)
    return [
        Eviction(
            tenant.name,
            _released(tenant, holders, infos, fixed),
            tenant.total_bytes,
            tenant.idle_s,
            tenant.rebuild_s,
            tenant.worth,
        )
        for tenant in chosen
    ]
