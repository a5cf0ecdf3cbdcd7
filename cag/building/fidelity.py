"""What a codec costs in answers: next-token distributions behind the compressed cache against the uncompressed one.

In: a model, the resident keys and values, probes (`cag.building.probes`). The distributions behind the uncompressed
cache are computed once and wait in a temporary file, so that memory holds the logits of one group of probes at a time,
whatever the vocabulary. Knows no codec: whoever owns the buffers puts other values into them between two measurements.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cag.building.probes import Branch, warnings_about
from cag.errors import InsufficientResources, UnsupportedModel
from cag.model import LanguageModel
from cag.residency.resident import ResidentPrefix

GROUP_PROBES = 128  # of one forward
_BLOCK_ROWS = 8  # compared at once, in float64


@dataclass(frozen=True)
class Fidelity:
    """Over all probes: KL divergence (nats) of the next-token distribution, mean and 95th percentile; how often the
    most likely token is the same; how much more surprising the real next token has become (nats, mean).

    `probes` says what they were: how many of `num_probes` stand in excerpts read behind the prefix
    (`continuation_tokens`), how many in the answers (`answer_tokens`) of how many questions. `method` "bits": keys and
    values were found to be the same to the bit, so no probe had to be run. `mean_kl_se` is the standard error of
    `mean_kl` in nats, probes of one branch taken together as they are alike; None where it is unknown: a single branch,
    or a manifest of before it was stated.
    """

    mean_kl: float
    p95_kl: float
    top1: float
    num_probes: int
    nll_change: float
    probes: dict[str, int]
    method: Literal["probes", "bits"] = "probes"
    mean_kl_se: float | None = None

    @property
    def is_judged(self) -> bool:
        """Whether it says what a cache loses: equal bits do, and `NUM_PROBES` probes; fewer are a hint at most."""
        return not self.warnings

    @property
    def warnings(self) -> tuple[str, ...]:
        """What users have to know about the figures."""
        return warnings_about(self.method, self.num_probes)

    def to_json(self) -> dict[str, Any]:
        """As manifests keep it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Fidelity | None:
        """What a manifest keeps; None when it was measured in another way than now."""
        known = set(stored) | {"mean_kl_se"} == set(cls.__dataclass_fields__)
        whole = known and isinstance(stored["mean_kl"], int | float) and isinstance(stored["num_probes"], int)
        return cls(**stored) if whole else None


class FidelityProbe:
    """Compares what `prefix` answers now with what it answered when this was made. A context manager."""

    def __init__(self, model: LanguageModel, prefix: ResidentPrefix, branches: Sequence[Branch]) -> None:
        """Computes the distributions to compare with. Raises: InsufficientResources."""
        self._model = model
        self._prefix = prefix
        self._groups = list(_groups(branches))
        self._branches = branches
        self._exact = tempfile.TemporaryFile()  # noqa: SIM115, closed by `close`
        try:
            for group in self._groups:
                self._exact.write(self._logits(group).contiguous().numpy().data)
        except OSError as error:
            self.close()
            raise InsufficientResources(
                f"the distributions of the probes do not fit into {tempfile.gettempdir()}: {error.strerror or error}.",
                hint="Free space there, or let TMPDIR name another directory.",
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> FidelityProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the distributions."""
        self._exact.close()

    def measure(self) -> Fidelity:
        """Run the probes on what the prefix holds now. At least one branch.

        Raises: UnsupportedModel: predictions that are not numbers.
        """
        self._exact.seek(0)
        num_probes = sum(len(branch.targets) for branch in self._branches)
        # made before the blocks: what stays of each would lie between the memory of one and the next, and split it
        divergence, nll_change = (torch.empty(num_probes, dtype=torch.float64) for _ in range(2))
        same, first = torch.empty(num_probes, dtype=torch.bool), 0
        for group in self._groups:
            for block in self._compared(group):
                last = first + len(block[0])
                divergence[first:last], same[first:last], nll_change[first:last] = block
                first = last
        if not divergence.isfinite().all():
            raise UnsupportedModel(
                "what the model predicts behind the cache is not numbers (NaN), so no loss can be measured.",
                hint="Compute in another type (`--dtype`); `--codec lossless` needs no measure.",
            )
        return Fidelity(
            mean_kl=float(divergence.mean()),
            p95_kl=float(divergence.quantile(0.95)),
            top1=float(same.double().mean()),
            num_probes=len(divergence),
            nll_change=float(nll_change.mean()),
            probes=_counted(self._branches),
            mean_kl_se=standard_error(divergence, [len(branch.targets) for branch in self._branches]),
        )

    def _logits(self, group: Sequence[Branch]) -> Tensor:
        """`[probes of the group, vocab_size]` float32 on the CPU."""
        rows: list[int] = []
        end = 0
        for branch in group:
            end += len(branch.token_ids)
            rows += range(end - len(branch.targets), end)
        return self._model.forward_branches([list(branch.token_ids) for branch in group], self._prefix, rows).cpu()

    def _compared(self, group: Sequence[Branch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """KL, agreement and change of the NLL, each `[block]`, block by block."""
        coded = self._logits(group)
        targets = torch.tensor([target for branch in group for target in branch.targets])
        exact = np.empty((min(_BLOCK_ROWS, len(coded)), coded.shape[1]), dtype=np.float32)
        for first in range(0, len(coded), _BLOCK_ROWS):
            block = coded[first : first + _BLOCK_ROWS]
            kept = exact[: len(block)]
            if self._exact.readinto(kept.data.cast("B")) != kept.nbytes:
                raise InsufficientResources(f"the distributions of the probes were cut in {tempfile.gettempdir()}.")
            yield compare(torch.from_numpy(kept), block, targets[first : first + _BLOCK_ROWS])


def same_bits(branches: Sequence[Branch]) -> Fidelity:
    """The fidelity of a cache whose keys and values are the uncompressed ones to the bit."""
    counts = _counted(branches)
    return Fidelity(0.0, 0.0, 1.0, counts["continuation_tokens"] + counts["answer_tokens"], 0.0, counts, "bits", 0.0)


def _counted(branches: Sequence[Branch]) -> dict[str, int]:
    sizes = Counter[str]()
    for branch in branches:
        sizes[branch.kind] += len(branch.targets)
    num_questions = sum(branch.kind == "question" for branch in branches)
    return {
        "continuation_tokens": sizes["continuation"],
        "answer_tokens": sizes["question"],
        "num_questions": num_questions,
    }


def compare(exact: Tensor, coded: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare logits `[num_probes, vocab_size]` of the same probes; `targets` `[num_probes]` are the real next tokens.

    Returns:
        KL divergence of coded from exact in nats, whether the most likely token is the same, and the change of the
        real token's negative log-likelihood; each `[num_probes]`.
    """
    log_p = exact.double().log_softmax(-1)
    difference = log_p - coded.double().log_softmax(-1)
    change = difference.gather(1, targets[:, None])[:, 0]
    divergence = difference.mul_(log_p.exp_()).sum(-1).clamp_min(0)
    same = exact.argmax(-1) == coded.argmax(-1)
    return divergence, same, change


def standard_error(values: Tensor, counts: Sequence[int]) -> float | None:
    """Of the mean of `values`, `counts[i]` neighbours of which belong to cluster `i`; None for a single cluster.

    Source: Cochran, Sampling Techniques, 3rd edition, section 2.11: the mean as a ratio of totals of clusters.
    """
    if len(counts) < 2:
        return None
    sums = torch.stack([part.sum() for part in torch.split(values - values.mean(), list(counts))])
    return float((sums.square().sum() * len(counts) / (len(counts) - 1)).sqrt() / len(values))


def _groups(branches: Sequence[Branch]) -> Iterator[list[Branch]]:
    """Neighbouring branches with at most `GROUP_PROBES` probes together, or a single one."""
    group: list[Branch] = []
    for branch in branches:
        if group and sum(len(other.targets) for other in group) + len(branch.targets) > GROUP_PROBES:
            yield group
            group = []
        group.append(branch)
    if group:
        yield group
