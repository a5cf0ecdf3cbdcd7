"""What a codec costs in answers: next-token distributions behind the compressed cache against the uncompressed one.

The corpus provides its own probes: excerpts from all over it, read behind the prefix as one continuation. At each of
their positions the two distributions are compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.model import LanguageModel
from cag.resident import ResidentPrefix

NUM_PROBES = 256
EXCERPT_TOKENS = 32


@dataclass(frozen=True)
class Fidelity:
    """KL divergence (nats) of the next-token distribution, and how often the most likely token is the same."""

    mean_kl: float
    p95_kl: float
    top1: float
    num_probes: int

    def to_json(self) -> dict[str, Any]:
        """As manifests keep it."""
        return asdict(self)


def probe_ids(token_ids: NDArray[np.int64], num_probes: int = NUM_PROBES) -> list[int]:
    """Excerpts of `EXCERPT_TOKENS` tokens, evenly spread over the prefix; at most `num_probes` tokens."""
    num_excerpts = min(num_probes // EXCERPT_TOKENS, len(token_ids) // EXCERPT_TOKENS)
    if num_excerpts == 0:
        return [int(token) for token in token_ids[:num_probes]]
    last = len(token_ids) - EXCERPT_TOKENS
    starts = np.linspace(0, last, num_excerpts).astype(int)
    return [int(token) for start in starts for token in token_ids[start : start + EXCERPT_TOKENS]]


def probe_logits(model: LanguageModel, prefix: ResidentPrefix) -> Tensor:
    """Logits at each probe position behind `prefix`, `[num_probes, vocab_size]` float32."""
    room = max(1, model.window_tokens - prefix.num_tokens)
    probes = probe_ids(prefix.token_ids)[:room]
    return model.forward(probes, model.new_state(prefix), num_logits=0)


def compare(exact: Tensor, coded: Tensor) -> Fidelity:
    """Compare two sets of logits of the same probes, `[num_probes, vocab_size]`."""
    divergences, agreements = [], 0
    for exact_row, coded_row in zip(exact, coded, strict=True):
        log_p, log_q = exact_row.double().log_softmax(-1), coded_row.double().log_softmax(-1)
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum().clamp_min(0)))
        agreements += int(exact_row.argmax() == coded_row.argmax())
    kl = torch.tensor(divergences, dtype=torch.float64)
    return Fidelity(float(kl.mean()), float(kl.quantile(0.95)), agreements / len(divergences), len(divergences))
