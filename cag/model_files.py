"""A directory of Hugging Face files -> network and tokenizer, in which types, and whether memory suffices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cag.errors import InsufficientResources, ModelError, UnsupportedModel
from cag.runtime import RuntimePlan


def read_network(directory: Path, dtype: torch.dtype) -> Any:
    """The network of a directory. Raises: ModelError."""
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model in {directory}: {error}") from error


def read_tokenizer(directory: Path) -> Any:
    """Its tokenizer. Raises: ModelError."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer in {directory}: {error}") from error


def stored_dtype(directory: Path) -> torch.dtype:
    """The 16- or 32-bit type that the checkpoint was saved in; keys and values are kept in the same."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration in {directory}: {error}") from error
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def compute_dtype_of(wanted: str, plan: RuntimePlan, stored: torch.dtype) -> torch.dtype:
    """What to compute in: `wanted`, or for "auto" what the plan found best. Raises: UnsupportedModel."""
    if wanted == "auto":
        if plan.device == "cpu":
            return torch.float32 if stored == torch.float32 else getattr(torch, plan.compute_dtype)
        return stored
    dtype = getattr(torch, wanted, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModel(f"compute dtype {wanted!r} is unknown.", hint="Use auto, float32, bfloat16 or float16.")
    assert isinstance(dtype, torch.dtype)
    return dtype


def check_memory(directory: Path, stored: torch.dtype, compute: torch.dtype, device: torch.device) -> None:
    """Raises: InsufficientResources: weights in `compute` do not fit into free memory."""
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    needed = weights // stored.itemsize * compute.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise InsufficientResources(
            f"the model needs {needed / 1e9:.1f} GB of memory in {compute}, and {free / 1e9:.1f} GB are free.",
            hint="Take a smaller model, or free memory.",
        )


def with_adapter(network: Any, adapter: Path) -> Any:
    """The network with a LoRA adapter merged in. Raises: ModelError."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("LoRA adapters need peft.", hint="Install cag-engine[adapters].") from error
    try:
        return PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the adapter in {adapter}: {error}") from error
