"""The sizes of a run: of the network with random weights, of the prefix, of questions and sessions. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from cag.errors import UsageError


@dataclass(frozen=True)
class NetworkShape:
    """A Llama's sizes; the defaults are those of Llama 3.1 8B."""

    num_layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 128_256


@dataclass(frozen=True)
class GpuOptions:
    """What `cag bench gpu` measures.

    prefix_tokens: of the corpus. question_tokens: of a question. rag_tokens: what retrieval would prefill instead.
    sessions: at once. tail_tokens: what each of them has behind the prefix. steps: of decoding, a sample each.
    samples: timings of everything else. joint_layers: of the codec `transform`. budget_s: when the run ends.
    """

    network: NetworkShape = NetworkShape()
    prefix_tokens: int = 85_000
    question_tokens: int = 32
    rag_tokens: int = 1_536
    sessions: int = 64
    tail_tokens: int = 128
    steps: int = 32
    samples: int = 20
    joint_layers: int = 4
    budget_s: float = 450.0
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.prefix_tokens, self.question_tokens, self.rag_tokens, self.sessions, self.steps, self.samples)
        if min(sizes) < 1 or self.tail_tokens < 1 or self.joint_layers < 1 or self.budget_s <= 0:
            raise UsageError("tokens, sessions, steps, samples and seconds must be more than 0.")


SMALL = GpuOptions(
    network=NetworkShape(2, 64, 96, 4, 2, 32, 300),
    prefix_tokens=200,
    question_tokens=5,
    rag_tokens=40,
    sessions=3,
    tail_tokens=9,
    steps=2,
    samples=2,
    joint_layers=2,
)
"""Sizes with which the same run takes seconds on a CPU: a test of the run, not of any machine."""
