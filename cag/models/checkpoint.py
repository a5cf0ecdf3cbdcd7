"""The configuration in a model's folder -> the network that is read from there, and what is refused before and behind.

Of a network that sees or hears besides, the text part is read. Weights that are stored quantized are unpacked while
they are read, where that gives plain linear layers: these are laid out, multiplied and merged with adapters as all
others. Other formats are refused by name, and so are tensors that nothing takes beside a weight that is taken: without
its scale a weight is another one, and answers would be wrong without a word. Knows transformers; runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cag.errors import ModelError, UnsupportedModel
from cag.models.directory import quantized_format

NO_CODE = {"local_files_only": True, "trust_remote_code": False}
HAVE_TEXT_PARTS = frozenset({"gemma3", "llava", "mistral3"})  # whose text part is a network of its own
TEXT_NAMES = {  # of tensors, in the network with all parts and in the one of the text part
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
OF_WHOLE = ("tie_word_embeddings", "eos_token_id", "quantization_config")  # said of all parts together
NOT_OF_WEIGHTS = frozenset(  # of activations and caches, which are not quantized here
    {"activation_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale"}
)
UNREADABLE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `renames` are those of tensors, None where the whole network is read; `quantization` is the
    format of quantized weights, None for plain ones."""

    directory: Path
    config: Any
    renames: dict[str, str] | None
    quantization: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The 16- or 32-bit type that was saved in, or that is unpacked to; keys and values are kept in the same."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32

    @cached_property
    def num_weights(self) -> int:
        """How many numbers the network has in its parameters, however few bits they are stored in. Raises: ModelError:
        a configuration that no network can be made of."""
        from transformers import AutoModelForCausalLM

        make_model: Any = AutoModelForCausalLM.from_config
        try:
            with torch.device("meta"):
                network = make_model(self.config, attn_implementation="eager", trust_remote_code=False)
        except UNREADABLE as error:
            raise ModelError(f"cannot make the network that {self.directory} describes: {error}") from error
        return sum(parameter.numel() for parameter in network.parameters())

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is told of it."""
        placed = {"device_map": {"": "cpu"}} if self.quantization == "bitsandbytes" else {}
        return {"config": self.config, "key_mapping": self.renames, **placed}

    def with_plain_weights(self, network: Any, dtype: torch.dtype) -> Any:
        """`network` as it was read, all weights of it plain and in `dtype`."""
        if self.quantization is None:
            return network
        if self.quantization == "bitsandbytes":
            from accelerate.hooks import remove_hook_from_submodules

            network = network.dequantize(dtype)
            remove_hook_from_submodules(network)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)  # some are unpacked to bfloat16 whatever is wanted
        return network


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the configuration of the model in `directory`.

    Raises:
        ModelError: it cannot be read.
        UnsupportedModel: no network that continues text, or weights in a format that is not read.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        whole: Any = AutoConfig.from_pretrained(directory, **NO_CODE)
    except UNREADABLE as error:
        raise ModelError(f"cannot read the configuration in {directory}: {error}") from error
    config = _text_part(whole) if whole.model_type in HAVE_TEXT_PARTS else whole
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{directory} holds a model of type {whole.model_type}, which is not served: transformers has no network "
            "of that type that continues text.",
            hint="Take a decoder-only language model.",
        )
    quantization = _unpack(config, directory)
    if config is not whole and quantization == "bitsandbytes":
        raise UnsupportedModel(
            f"{directory} holds {whole.model_type} quantized with bitsandbytes, of which the text part cannot be read.",
            hint="Take the model unquantized.",
        )
    if config.dtype is None:
        config.dtype = getattr(config.get_text_config(), "dtype", None)
    return Checkpoint(directory, config, None if config is whole else TEXT_NAMES, quantization)


def _text_part(whole: Any) -> Any:
    text = whole.get_text_config()
    for name in OF_WHOLE:
        if getattr(whole, name, None) is not None:
            setattr(text, name, getattr(whole, name))
    text.dtype = whole.dtype or text.dtype
    return text


def _unpack(config: Any, directory: Path) -> str | None:
    """The format of the weights that `config` describes, which from now on asks for plain ones."""
    described = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if described is None:
        return None
    method = quantized_format(described, directory)
    if method == "compressed-tensors":
        _refuse_mixtures(described, directory)
    if method == "fp8":
        _refuse_cut_blocks(described.get("weight_block_size"), directory)
    if method != "bitsandbytes":
        config.quantization_config = described | {"dequantize": True}
    return method


def _refuse_mixtures(described: dict[str, Any], directory: Path) -> None:
    """transformers unpacks all weights as those of one group, and turns none back."""
    groups = described.get("config_groups") or {}
    formats = {json.dumps([group.get("weights"), group.get("format")], sort_keys=True) for group in groups.values()}
    if len(formats) > 1 or described.get("transform_config"):
        what = f"{len(formats)} formats at once" if len(formats) > 1 else "a rotated space (transform_config)"
        raise UnsupportedModel(
            f"the weights in {directory} are quantized in {what}, which is not read.",
            hint="Take a checkpoint with one format for all weights.",
            path=directory,
        )


def _refuse_cut_blocks(block: Any, directory: Path) -> None:
    """transformers takes a scale for as many rows as all others, also for the last one of rows that fill no block."""
    for name, dtype, shape in _stored(directory) if block else ():
        sizes = zip(shape[-2:], block, strict=False)
        if dtype in _FP8 and any(size > step and size % step for size, step in sizes):
            raise UnsupportedModel(
                f"{name} in {directory} is {shape}, which is no whole number of blocks of {block}.",
                hint="Take the model unquantized.",
                path=directory,
            )


def _stored(directory: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of each tensor in the files. Raises: ModelError."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    part = stream.get_slice(name)
                    yield name, part.get_dtype(), part.get_shape()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read {path}: {error}", hint="Fetch the model again.") from error


def left_over(network: Any, unexpected: Iterable[str]) -> list[str]:
    """Names of tensors in the files that the network has no place for, at or below a module with weights of its own:
    experts lie as modules in files, and in one tensor in the network."""
    taken = {name.rpartition(".")[0] for name, _ in network.named_parameters(remove_duplicate=False)}
    return [name for name in sorted(unexpected) if _parents(name) & taken and _own(name) not in NOT_OF_WEIGHTS]


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts))}


def _own(name: str) -> str:
    return name.rpartition(".")[2]
