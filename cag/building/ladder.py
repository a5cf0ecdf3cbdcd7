"""The ladder of codecs, and the search for the smallest that stays within a bound of the mean KL divergence.

In: what the ladder holds for a model, and something that tries a configuration on the cache that is being built. Out: a
choice and everything that was tried on the way. Knows no buffers and no chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cag.building.fidelity import Fidelity
from cag.building.probes import NUM_PROBES
from cag_store import ChunkEntry

DEFAULT_MAX_KL = 0.005
MAX_STEP_TRIALS = 5
CLOSE_TO_BOUND = 0.9  # of the bound: a step that comes so near is not searched further
NARROW_STEPS = 4  # between a step within the bound and one over it: 2 % of the bytes, and KL is not that smooth
_AIM = 0.97  # of the bound
_OCTAVE = 64  # steps in which the width of a quantizer doubles
_SLOPE = 2 / _OCTAVE  # octaves of KL a step: errors grow with the width, KL with their square
_LEAST_KL = 1e-12
_SLOPES = (_SLOPE / 2, 2 * _SLOPE)  # believed of two measured steps


@dataclass(frozen=True)
class Rung:
    """A codec configuration; with `steps`, one for each value of its integer `step` in `[first, last]`: the larger the
    smaller the cache, and the worse. `codec["step"]` is where the search begins. With `refines`, the codec has finer
    configurations for a cache that it alone does not keep within the bound (`Refine`)."""

    codec: dict[str, Any]
    steps: tuple[int, int] | None = None
    refines: bool = False


@dataclass(frozen=True)
class Trial:
    """A configuration tried on the whole cache.

    Attributes:
        codec: its full configuration.
        stored_bytes: of the whole cache in it, texts and basis included; None when its encoding was broken off, because
            it was larger than the best so far or refused the values.
        basis_bytes: of that, what the codec shares with every cache of the model.
        fidelity: None when it was not measured.
        outcome: "within" or "over" the bound, "larger" than one within, or "refused" by the codec.
        entries: its chunks, when it was encoded to its end.
        encode_s, measure_s: seconds of encoding, and of loading back and running the probes.
    """

    codec: dict[str, Any]
    stored_bytes: int | None
    basis_bytes: int
    fidelity: Fidelity | None
    outcome: str
    entries: tuple[ChunkEntry, ...] = ()
    encode_s: float = 0.0
    measure_s: float = 0.0

    @property
    def mean_kl(self) -> float | None:
        """Nats; None when it is not known."""
        return None if self.fidelity is None else self.fidelity.mean_kl

    def to_json(self) -> dict[str, Any]:
        """As manifests and reports have it."""
        kept = ("codec", "stored_bytes", "basis_bytes", "mean_kl", "outcome")
        return {name: getattr(self, name) for name in kept} | {
            "top1": self.fidelity and self.fidelity.top1,
            "encode_s": round(self.encode_s, 4),
            "measure_s": round(self.measure_s, 4),
        }


TryCodec = Callable[[dict[str, Any], "int | None"], Trial]
"""Tries a configuration; breaks off when it becomes as large as the given number of bytes. Without one, the trial comes
to its end. Raises: UnencodableArray: the codec refuses the values, and there is no limit."""

Refine = Callable[[dict[str, Any]], "Sequence[dict[str, Any]]"]
"""Finer configurations of a codec for the cache at hand, the smallest and worst first."""


@dataclass(frozen=True)
class CodecChoice:
    """The smallest of `tried` that stays within `max_kl` nats.

    `kept`: it is the one of the cache before. `few_probes`: the text gives only so many, so no loss could be judged.
    """

    trial: Trial
    max_kl: float
    tried: tuple[Trial, ...]
    kept: bool = False
    few_probes: int | None = None

    @property
    def reason(self) -> str:
        """One line: what was chosen and why."""
        head = f"auto chose {describe_codec(self.trial.codec)}, {_amounts(self.trial)}"
        if self.few_probes is not None:
            return (
                f"{head}: a loss is judged at {NUM_PROBES} positions or more, and so short a text has {self.few_probes}"
            )
        if self.kept:
            return f"{head}: the codec of the cache before, still within {self.max_kl:g}"
        others = [trial for trial in self.tried if trial is not self.trial]
        head += f": the smallest of {len(self.tried)} tried that stays within {self.max_kl:g}"
        return "; ".join([head, *(f"{describe_codec(other.codec)} {_fate(other)}" for other in others)])

    def to_json(self) -> dict[str, Any]:
        """As manifests and reports have it."""
        return {
            "codec": self.trial.codec,
            "max_kl": self.max_kl,
            "reason": self.reason,
            "tried": [trial.to_json() for trial in self.tried],
        }


def describe_codec(codec: dict[str, Any]) -> str:
    """A configuration in a word or two."""
    label = f"{codec['id']} step {codec['step']}" if "step" in codec else str(codec["id"])
    wide = codec.get("wide_key_layers")
    return f"{label} with 8-bit keys in layers {', '.join(map(str, wide))}" if wide else label


def _amounts(trial: Trial) -> str:
    size = "" if trial.stored_bytes is None else f"{trial.stored_bytes / 1e6:.1f} MB"
    return size if trial.mean_kl is None else f"{size}, mean KL {trial.mean_kl:.2g}"


def _fate(trial: Trial) -> str:
    if trial.outcome == "refused":
        return "cannot hold the values"
    return f"{'is ' if trial.outcome == 'larger' else ''}{trial.outcome} ({_amounts(trial)})".removesuffix(" ()")


def choose(
    attempt: TryCodec, rungs: Sequence[Rung], lossless: Trial, max_kl: float, refine: Refine | None = None
) -> CodecChoice:
    """The smallest within `max_kl` of the rungs and `lossless`, which always is.

    Rungs that are expected to be the smallest come first: the others are then broken off early.
    """
    search = _Search(attempt, max_kl, [lossless])
    for rung in rungs:
        if rung.steps is not None:
            search.find_step(rung.codec, *rung.steps)
        elif search.judge(rung.codec).outcome == "over" and rung.refines and refine is not None:
            search.find_finer(refine(rung.codec))
    return CodecChoice(search.best, max_kl, tuple(search.tried))


def smallest_finer(attempt: TryCodec, codecs: Sequence[dict[str, Any]], lossless: Trial, max_kl: float) -> Trial | None:
    """The smallest of `codecs`, each larger and better than the one before, that stays within `max_kl` and is smaller
    than `lossless`; None when there is none."""
    search = _Search(attempt, max_kl, [lossless])
    search.find_finer(codecs)
    return None if search.best is lossless else search.best


@dataclass
class _Search:
    attempt: TryCodec
    max_kl: float
    tried: list[Trial]

    @property
    def best(self) -> Trial:
        """The smallest within the bound so far."""
        within = [trial for trial in self.tried if trial.outcome == "within"]
        return min(within, key=lambda trial: trial.stored_bytes or 0)

    def judge(self, codec: dict[str, Any]) -> Trial:
        """Try a configuration that has to be smaller than the best so far."""
        trial = self.attempt(codec, self.best.stored_bytes)
        self.tried.append(trial)
        return trial

    def find_finer(self, codecs: Sequence[dict[str, Any]]) -> None:
        """The first of `codecs`, each larger and better than the one before, that stays within the bound: bisection."""
        first, last = 0, len(codecs)
        while first < last:
            middle = (first + last) // 2
            trial = self.judge(codecs[middle])
            if trial.outcome == "over":
                first = middle + 1
            else:  # within; or larger than another codec, as all behind it are then too
                last = middle

    def find_step(self, codec: dict[str, Any], first: int, last: int) -> None:
        """The largest step within the bound, by `MAX_STEP_TRIALS` trials at most.

        Bisection between a step within and one over the bound, led by what KL should be: `c * 2 ** (2 * step / 64)`.
        """
        measured: dict[int, float] = {}
        step = min(max(codec["step"], first), last)
        while len(measured) < MAX_STEP_TRIALS and step not in measured and first <= step <= last:
            trial = self.judge({**codec, "step": step})
            if trial.mean_kl is None:  # refused, or larger than another codec: then smaller steps are too
                return
            measured[step] = trial.mean_kl
            if CLOSE_TO_BOUND * self.max_kl <= trial.mean_kl <= self.max_kl:
                return
            step = next_step(measured, self.max_kl, first, last)


def next_step(measured: dict[int, float], max_kl: float, first: int, last: int) -> int:
    """Where KL should be just within the bound, between the largest step within it and the least one over it.

    `measured` gives KL by step; at least one. Returns a measured step, or one outside of `[first, last]`, when nothing
    is left to try.
    """
    within = max((step for step, kl in measured.items() if kl <= max_kl), default=first - 1)
    over = min((step for step, kl in measured.items() if kl > max_kl and step > within), default=last + 1)
    if within in measured and over in measured and over - within <= NARROW_STEPS:
        return within
    octaves = {step: math.log2(max(kl, _LEAST_KL) / max(_AIM * max_kl, _LEAST_KL)) for step, kl in measured.items()}
    if within in measured and over in measured:
        return _between(within, over, octaves)
    origin, *others = sorted(octaves, key=lambda step: abs(octaves[step]))
    slope = _SLOPE
    if others:
        rise = (octaves[origin] - octaves[others[0]]) / (origin - others[0])
        slope = min(max(rise, _SLOPES[0]), _SLOPES[1])
    return min(max(origin + math.floor(-octaves[origin] / slope), within + 1), over - 1)


def _between(within: int, over: int, octaves: Mapping[int, float]) -> int:
    """Where a straight line from a step within the bound to one over it says, and at least an eighth away from both."""
    share = octaves[within] / (octaves[within] - octaves[over]) if octaves[within] < 0 else 0.0
    margin = max(1, (over - within) // 8)
    return min(max(within + math.floor(share * (over - within)), within + margin), over - margin)
