"""From a start that was kept to the parts of a model, or to nothing where it does not hold here and now.

Knows transformers' readers, for when more than the parts is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cag.errors import ModelError
from cag.forward.decoder_layers import SeenLayer, Turning
from cag.forward.layer_probe import ProbedNetwork
from cag.forward.state import AttentionRule, KvPlace, KvShape
from cag.forward.weights import PackedLinear, join_network, loses_in_16_bits, use_products
from cag.machine.runtime import RuntimePlan
from cag.model_files import read_network, read_tokenizer
from cag.models.fingerprint import ModelFingerprints, model_fingerprint
from cag.models.read_files import ReadFiles
from cag.starts.begin import Beginning
from cag.starts.keeping import plan_facts
from cag.starts.network import PlainNetwork, adopt_weights, weights_of
from cag.starts.tokenizer import KeptTokenizer


@dataclass(frozen=True)
class StartedParts:
    """What `LanguageModel` is made of after a start that was kept. `load_network` reads transformers' own network, over
    the weights of `network`."""

    network: PlainNetwork
    tokenizer: KeptTokenizer
    fingerprints: ModelFingerprints
    files: ReadFiles
    probed: ProbedNetwork
    load_network: Callable[[], Any]


def take_start(begun: Beginning, plan: RuntimePlan) -> StartedParts | None:
    """The parts of a model whose start was begun; None where the plan is another one by now, or anything of what was
    read is not what the record says."""
    start, directory = begun.start, begun.directory
    if plan_facts(plan) != start.plan:
        return None
    tables, weights = begun.tokenizer(), begun.weights()
    if weights is None or tables is None:
        return None
    try:
        fingerprints = model_fingerprint(directory)  # of what is then found to be what was read
        if not begun.holds():
            return None
        network = PlainNetwork(start, weights_of(weights, start))
        rules = [AttentionRule(**rule) for rule in start.rules]
        probed = ProbedNetwork(
            kv_shapes=[KvShape(*shape) for shape in start.kv_shapes],
            rules=rules,
            places=[KvPlace(layer) for layer in range(len(rules))],
            seen=[SeenLayer(rule, Turning()) for rule in rules],
        )
    except (OSError, KeyError, TypeError, ValueError):
        return None
    join_network(network)
    dtype = getattr(torch, start.stored_dtype)
    return StartedParts(
        network=network,
        tokenizer=KeptTokenizer(tables, lambda: _unchanged(read_tokenizer(directory), directory, fingerprints)),
        fingerprints=fingerprints,
        files=begun.files,
        probed=probed,
        load_network=lambda: _unchanged(_whole_network(network, directory, plan, dtype), directory, fingerprints),
    )


def _whole_network(plain: PlainNetwork, directory: Path, plan: RuntimePlan, dtype: torch.dtype) -> Any:
    network = read_network(directory, dtype)
    try:
        if isinstance(plain.lm_head, PackedLinear) and loses_in_16_bits(network):
            raise ValueError("it has numbers that its type rounds.")
        adopt_weights(network, plain)
    except (AttributeError, ValueError) as error:
        raise ModelError(f"the model in {directory} is another one than was loaded: {error}") from error
    use_products(network, plan)
    return network


def _unchanged(part: Any, directory: Path, fingerprints: ModelFingerprints) -> Any:
    """`part`, which was read from `directory` just now. Raises: ModelError: from other files than the rest."""
    if model_fingerprint(directory) != fingerprints:
        raise ModelError(f"the model in {directory} changed since it was loaded.", hint="Load it again.")
    return part
