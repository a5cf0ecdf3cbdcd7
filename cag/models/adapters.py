"""Adapters in peft's format: read, and merged into a network's weights, which then are all that there is.

What no weights can do is refused by name. Knows peft; nothing of the network but that layers may share a weight.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from cag.errors import ModelError, UnsupportedModel
from cag.models.fingerprint import ADAPTER_WEIGHTS

_SETTLED_HERE = (  # of what peft warns
    "Found missing adapter keys",
    "Model (has|with) `tie_word_embeddings=True`",
    "Input and output embeddings are no longer tied",
)
_NOT_IN_WEIGHTS = {  # fields of an adapter's configuration, and what one does that has them
    "is_prompt_learning": "it puts vectors before the prompt",
    "alora_invocation_tokens": "it counts only behind its invocation tokens",
    "layer_replication": "it repeats layers",
    "xlora_depth": "it chooses among adapters at each token",
}

# What `init_lora_weights` may be: the network's own weights stay, or change in the same way each time.
_STEADY_STARTS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica")


def with_adapter(network: Any, adapter: Path) -> Any:
    """The network with an adapter merged in. Raises: ModelError, UnsupportedModel."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError("LoRA adapters need peft.", hint="Install cag-engine[adapters].") from error
    from safetensors import SafetensorError, safe_open

    weights = adapter / ADAPTER_WEIGHTS
    if not adapter.is_dir():
        raise ModelError(f"there is no folder {adapter}.", hint="Name the folder of a LoRA adapter.")
    if not weights.is_file():
        raise ModelError(f"{adapter} holds no {weights.name}.", hint="Save the adapter as safetensors.")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot load the adapter in {adapter}: {error}") from error
    _refuse_unmergeable(config, adapter)
    _refuse_random_start(config, adapter)
    try:
        with _without_warnings():
            adapted = PeftModel.from_pretrained(network, str(adapter))
        with safe_open(weights, framework="pt") as stream:
            # an embedding that is tuned may stand in the file, and is the model's own
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            missing = sorted(wanted.keys() - set(stream.keys()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter in {adapter}: {error}") from error
    if missing:  # peft makes these up, in each process anew
        raise ModelError(f"the adapter in {adapter} lacks {len(missing)} weights, such as {missing[0]}.")
    _untie(adapted)
    try:
        with _without_warnings():
            return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _cannot_be_merged(config, adapter, str(error)) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for beginning in _SETTLED_HERE:
            warnings.filterwarnings("ignore", beginning)
        yield


def _refuse_unmergeable(config: Any, adapter: Path) -> None:
    """Raises: ModelError for what peft would merge in part only, or not at all."""
    for field, does in _NOT_IN_WEIGHTS.items():
        if getattr(config, field, None):
            raise _cannot_be_merged(config, adapter, f"{does} ({field}).")


def _refuse_random_start(config: Any, adapter: Path) -> None:
    """Raises: UnsupportedModel: an adapter for which peft changes the network's own weights, not always in one way."""
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _STEADY_STARTS:
        raise UnsupportedModel(
            f"the adapter in {adapter} began as {start!r}, for which peft may make another model at each load.",
            hint="Convert it to an ordinary LoRA adapter (peft's path_initial_model_for_weight_conversion).",
            path=adapter,
        )


def _cannot_be_merged(config: Any, adapter: Path, why: str) -> ModelError:
    kind = getattr(config.peft_type, "value", config.peft_type)
    return ModelError(
        f"the adapter in {adapter}, of type {kind}, cannot be merged into the model's weights: {why}",
        hint="Take one that only changes weights, such as LoRA.",
    )


def _untie(adapted: Any) -> None:
    """Give each tuned layer that shares its weight (embedding and output matrix) one of its own: an adapter tunes the
    layer, and merging changes the weight in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(adapted.modules())
    holders = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    for module in modules:
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            weight = getattr(layer, "weight", None)
            if weight is not None and holders[id(weight)] > 1:
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
