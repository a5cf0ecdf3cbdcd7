"""Reading a directory of Hugging Face files: the network, its tokenizer, and what is refused or checked before.

Knows transformers and the memory of the machine; nothing of attention, states or prompts beyond their stop strings.
transformers is imported where something is read: a start that was kept (`cag.starts`) does without.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cag.errors import InsufficientResources, ModelError, UnsupportedModel, UsageError
from cag.forward.recurrent import ATTENDING, RECURRENT, STATELESS, has_recurrent_layers
from cag.forward.weights import lay_out_weights, loses_in_bfloat16
from cag.machine.runtime import RuntimePlan, free_memory_bytes
from cag.models.fingerprint import ADAPTER_WEIGHTS, ModelFingerprints, model_fingerprint
from cag.prompt import PromptTemplate

NO_CODE = {"local_files_only": True, "trust_remote_code": False}
UNSTABLE_ROPE = frozenset({"dynamic", "longrope"})  # keys would depend on the length of the whole prompt


def refuse_unsupported(config: Any) -> None:
    """Raises: UnsupportedModel: an architecture whose attention or positions the engine cannot serve."""
    name = getattr(config, "model_type", type(config).__name__)
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder model; the engine serves decoder-only models.")
    known = ATTENDING | RECURRENT | STATELESS if has_recurrent_layers(config) else ATTENDING
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - known)
    if strange:
        raise UnsupportedModel(f"{name} has layers of type {', '.join(strange)}, whose state is no keys and values.")
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in nested or [parameters]:
        if rope.get("rope_type") in UNSTABLE_ROPE:
            raise UnsupportedModel(
                f"{name} uses {rope['rope_type']} RoPE scaling: keys of a prefix would change with the prompt's length."
            )


def prepared(network: Any) -> Any:
    """A network that is to be run and not trained, with our attention. Raises: UnsupportedModel."""
    from cag.forward.attention_hook import ATTENTION_NAME

    refuse_unsupported(network.config)
    network = network.eval().requires_grad_(False)
    network.set_attn_implementation(ATTENTION_NAME)
    return network


def turns_alike(rope: dict[str, Any]) -> bool:
    """Whether rotary angles do not depend on how long a sequence is, which would have to be asked in each step; `rope`
    is that of `LanguageModel`."""
    parameters = rope["parameters"] or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return not any(part.get("rope_type") in UNSTABLE_ROPE for part in kinds)


def stop_ids(network: Any, tokenizer: Any, template: PromptTemplate) -> frozenset[int]:
    """Tokens that end an answer: the model's, the tokenizer's, and the template's end of turn."""
    found: set[int] = set()
    for value in (network.generation_config.eos_token_id, tokenizer.eos_token_id):
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    special = set(tokenizer.all_special_ids)
    between = tokenizer(template.between, add_special_tokens=False)["input_ids"] if template.between else []
    if between and between[0] in special:
        found.add(between[0])
    return frozenset(found)


@dataclass(frozen=True)
class ReadParts:
    """What was read of a model: its network laid out on a device, its tokenizer, and in which types it is kept."""

    network: Any
    tokenizer: Any
    fingerprints: ModelFingerprints
    kv_dtype: torch.dtype
    compute_dtype: torch.dtype


def read_parts(directory: Path, plan: RuntimePlan, device: torch.device, dtype: str, adapter: Path | None) -> ReadParts:
    """Read a directory of Hugging Face files. Raises: as `LanguageModel.load`."""
    stored = stored_dtype(directory)
    compute = chosen_dtype(dtype, plan, stored)
    packs = plan.product == "packed" and (stored, compute) == (torch.bfloat16, torch.float32)
    packs = packs and adapter is None  # merged weights are no bfloat16 any more
    check_memory(directory, stored, stored if packs else compute, device)
    network = read_network(directory, stored if packs else compute)
    if packs and loses_in_bfloat16(network):
        packs, network = False, read_network(directory, compute)
    if adapter is not None:
        network = with_adapter(network, adapter)
    with ThreadPoolExecutor(1, "cag-load") as beside:  # the network's modules are imported by now
        tokenizer = beside.submit(read_tokenizer, directory)
        fingerprints = beside.submit(model_fingerprint, directory, adapter)
        lay_out_weights(network, plan, compute, packs=packs)
        network = network.to(device)
    return ReadParts(network, tokenizer.result(), fingerprints.result(), stored, compute)


def read_network(directory: Path, dtype: torch.dtype) -> Any:
    """The network in a directory of model files, every weight of it read. Raises: ModelError."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=AutoConfig.from_pretrained(directory, **NO_CODE),
            dtype=dtype,
            use_safetensors=True,  # or pickles are taken where there are only other names
            attn_implementation="eager",  # or the configuration may ask for code from the hub
            output_loading_info=True,
            **NO_CODE,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the model in {directory}: {error}", hint="Fetch it again.") from error
    network, found = read
    if missing := sorted(found["missing_keys"]):
        # transformers makes these up, in each process anew
        raise ModelError(
            f"the files in {directory} lack {len(missing)} weights, such as {missing[0]}.",
            hint="Fetch the model again.",
        )
    return network


def read_tokenizer(directory: Path) -> Any:
    """Its tokenizer. Raises: ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, mistral_format=False, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer in {directory}: {error}") from error


def stored_dtype(directory: Path) -> torch.dtype:
    """The 16- or 32-bit type that the checkpoint was saved in; keys and values are kept in the same."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, **NO_CODE)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration in {directory}: {error}") from error
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def chosen_dtype(wanted: str, plan: RuntimePlan, stored: torch.dtype) -> torch.dtype:
    """What to compute in: as wanted, or what the machine computes best with. Raises: UsageError."""
    if wanted == "auto":
        if plan.device == "cpu":
            return torch.float32 if stored == torch.float32 else getattr(torch, plan.compute_dtype)
        return stored
    dtype = getattr(torch, wanted, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"unknown dtype {wanted!r}.", hint="Use auto, float32, bfloat16 or float16.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_memory(directory: Path, stored: torch.dtype, compute: torch.dtype, device: torch.device) -> None:
    """Raises: InsufficientResources: the weights need more memory than is free."""
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    needed = weights // stored.itemsize * compute.itemsize
    free = free_memory_bytes(device)
    if needed > free:
        raise InsufficientResources(
            f"the model needs {needed / 1e9:.1f} GB of memory in {compute}, and {free / 1e9:.1f} GB are free.",
            hint="Take a smaller model, or free memory.",
        )


def with_adapter(network: Any, adapter: Path) -> Any:
    """The network with a LoRA adapter merged in. Raises: ModelError."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError("LoRA adapters need peft.", hint="Install cag-engine[adapters].") from error
    from safetensors import SafetensorError, safe_open

    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ModelError(f"{adapter} holds no {weights.name}.", hint="Save the adapter as safetensors.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # which is an error, below
            adapted = PeftModel.from_pretrained(network, str(adapter))
        with safe_open(weights, framework="pt") as stream:
            missing = sorted(get_peft_model_state_dict(adapted).keys() - set(stream.keys()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter in {adapter}: {error}") from error
    if missing:  # peft makes these up, in each process anew
        raise ModelError(f"the adapter in {adapter} lacks {len(missing)} weights, such as {missing[0]}.")
    return adapted.merge_and_unload()
