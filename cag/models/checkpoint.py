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
from cag.machine.imports import import_transformers
from cag.models.directory import DESCRIPTIONS, TAKE_ANOTHER, quantized_format
from cag.models.quantized import PACKED, Packing, QuantizedWeight, plain_tensors, read_packing

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
    format of quantized weights, None for plain ones; `packing` how they are packed, where they are unpacked here."""

    directory: Path
    config: Any
    renames: dict[str, str] | None
    quantization: str | None
    packing: Packing | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The 16- or 32-bit type that was saved in, or that is unpacked to; keys and values are kept in the same."""
        return _weight_dtype(self.config)

    @cached_property
    def empty(self) -> Any:
        """The network without weights. Raises: ModelError: a configuration that none can be made of."""
        from transformers import AutoModelForCausalLM

        make_model: Any = AutoModelForCausalLM.from_config
        try:
            with torch.device("meta"):
                return make_model(self.config, attn_implementation="eager", trust_remote_code=False)
        except UNREADABLE as error:
            raise ModelError(f"cannot make the network that {self.directory} describes: {error}") from error

    def num_weights(self, *, apart: bool = False) -> int:
        """How many numbers the network has in its parameters, however few bits they are stored in. An output matrix
        that is the embedding counts by itself where the files hold one, since transformers reads both; and where what
        is laid out is kept `apart`. Raises: ModelError."""
        own: int = sum(parameter.numel() for parameter in self.empty.parameters())
        output = self.empty.get_output_embeddings()
        is_tied = output is not None and output.weight is self.empty.get_input_embeddings().weight
        again: int = output.weight.numel() if is_tied and (apart or self._holds(output)) else 0
        return own + again

    def _holds(self, module: Any) -> bool:
        """Whether the files have weights of a module of `empty`."""
        own = next(name for name, found in self.empty.named_modules() if found is module)
        return any(f".{own}." in f".{stored}" for stored, _, _ in _stored(self.directory))

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The tensors in files of packed layers by name, as plain ones; each is read when it is asked for by `[...]`.
        Raises: ModelError; OSError, SafetensorError, KeyError and the like: files that cannot be read."""
        from safetensors import safe_open

        assert self.packing is not None
        stored: dict[str, Any] = {}
        for path in self._weight_files():
            stream: Any = safe_open(path, framework="pt")
            stored |= {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
        return plain_tensors(stored, self.packing)

    def _weight_files(self) -> list[Path]:
        """Those that transformers takes of a folder."""
        named = getattr(self.config, "transformers_weights", None)
        file = self.directory / (named or "model.safetensors")
        if not named and not file.exists():
            file = self.directory / "model.safetensors.index.json"
        if file.suffix != ".json":
            return [file]
        places = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return [self.directory / name for name in sorted(set(places.values()))]

    def from_pretrained(self, **options: Any) -> Any:
        """What transformers' `from_pretrained` makes of it. Raises: UnsupportedModel, or as transformers does."""
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.pytorch_utils import Conv1D

        options |= {"key_mapping": self.renames, **NO_CODE}
        if self.packing is None:
            placed = {"device_map": {"": "cpu"}} if self.quantization == "bitsandbytes" else {}
            return AutoModelForCausalLM.from_pretrained(self.directory, config=self.config, **placed, **options)
        if any(isinstance(module, Conv1D) for module in self.empty.modules()):
            raise UnsupportedModel(
                f"{self.directory} holds {self.config.model_type} quantized as {self.quantization!r}, of which inputs "
                "and outputs lie the other way round.",
                hint=TAKE_ANOTHER,
                path=self.directory,
            )
        generation = self.directory / "generation_config.json"
        return type(self.empty).from_pretrained(
            None,
            config=self.empty.config,
            state_dict=self.tensors,
            generation_config=GenerationConfig.from_pretrained(self.directory) if generation.exists() else None,
            **options,
        )

    def adds_nothing(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros: AutoGPTQ gives one to each layer that it packs."""
        layer, _, own = name.rpartition(".")
        if self.packing is None or own != "bias" or name not in self.tensors:
            return False
        packed = isinstance(self.tensors.get(f"{layer}.weight"), QuantizedWeight)
        return packed and not self.tensors[name][...].any()

    def with_plain_weights(self, network: Any, dtype: torch.dtype) -> Any:
        """`network` as it was read, all weights of it plain and in `dtype`."""
        if self.quantization is None or self.packing is not None:
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
    import_transformers()
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
    if config.dtype is None:
        config.dtype = getattr(config.get_text_config(), "dtype", None)
    quantization, packing = _unpack(config, directory)
    if config is not whole and quantization == "bitsandbytes":
        raise UnsupportedModel(
            f"{directory} holds {whole.model_type} quantized with bitsandbytes, of which the text part cannot be read.",
            hint="Take the model unquantized.",
        )
    return Checkpoint(directory, config, None if config is whole else TEXT_NAMES, quantization, packing)


def _weight_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _text_part(whole: Any) -> Any:
    text = whole.get_text_config()
    for name in OF_WHOLE:
        if getattr(whole, name, None) is not None:
            setattr(text, name, getattr(whole, name))
    text.dtype = whole.dtype or text.dtype
    return text


def _unpack(config: Any, directory: Path) -> tuple[str | None, Packing | None]:
    """The format of the weights that `config` describes, which from now on asks for plain ones."""
    described = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    described = described or _described_beside(directory)
    if described is None:
        return None, None
    method = quantized_format(described, directory)
    if method in PACKED:
        for part in (config, config.get_text_config()):
            vars(part).pop("quantization_config", None)
        return method, read_packing(described, directory, _weight_dtype(config))
    if method == "compressed-tensors":
        _refuse_mixtures(described, directory)
        _refuse_integer_experts(directory)
    if method == "fp8":
        _refuse_cut_blocks(described.get("weight_block_size"), directory)
    if method != "bitsandbytes":
        config.quantization_config = described | {"dequantize": True}
    return method, None


def _described_beside(directory: Path) -> dict[str, Any] | None:
    """What older checkpoints say in a file of its own, in its older words. Raises: ModelError."""
    for file, method in DESCRIPTIONS.items():
        path = directory / file
        if path.exists() and any(_own(name) == "qweight" for name, _, _ in _stored(directory)):
            try:
                said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                older = {"bits": said.get("w_bit"), "group_size": said.get("q_group_size"), "quant_method": method}
            except UNREADABLE as error:
                raise ModelError(f"cannot read {path}: {error}", hint="Fetch the model again.") from error
            return older | said
    return None


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


def _refuse_integer_experts(directory: Path) -> None:
    """transformers joins experts of packed codes and of FP8, but not these."""
    for name, dtype, _ in _stored(directory):
        if ".experts." in name and (dtype == "I8" or _own(name) == "weight_zero_point"):
            raise UnsupportedModel(
                f"{name} in {directory} is of an expert in 8-bit integers or with zero points, which is not read.",
                hint=TAKE_ANOTHER,
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
