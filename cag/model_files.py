"""Reading a directory of Hugging Face files: the network, its tokenizer, and what is refused or checked before.

Knows transformers and the memory of the machine; nothing of attention, states or prompts beyond their stop strings.
transformers is imported where something is read: a start that was kept (`cag.starts`) does without.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cag.errors import InsufficientResources, ModelError, UnsupportedModel, UsageError
from cag.forward.recurrent import ATTENDING, RECURRENT, STATELESS, has_recurrent_layers
from cag.forward.rope import BY_LENGTH, settle_frequencies
from cag.forward.weights import lay_out_weights, loses_in_16_bits
from cag.machine.imports import import_transformers
from cag.machine.runtime import RuntimePlan, free_memory_bytes
from cag.models.adapters import with_adapter
from cag.models.checkpoint import NO_CODE, UNREADABLE, Checkpoint, left_over, read_checkpoint
from cag.models.directory import TAKE_ANOTHER
from cag.models.fingerprint import ModelFingerprints, chat_template_text, model_fingerprint
from cag.models.read_files import ReadFiles
from cag.prompt import PromptTemplate, encode
from cag_kernels import multiplies_packed

_COMPARED_TEXTS = ("Sum: 12,345.60  km", "of a\n\n\tline", "naïve 漢字 🎉", "def f(x):\n    return x")


def refuse_unsupported(config: Any) -> None:
    """Raises: UnsupportedModel: an architecture whose attention or positions the engine cannot serve."""
    name = getattr(config, "model_type", type(config).__name__)
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder model; the engine serves decoder-only models.")
    known = ATTENDING | RECURRENT | STATELESS if has_recurrent_layers(config) else ATTENDING
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - known)
    if strange:
        raise UnsupportedModel(
            f"{name} has layers of type {', '.join(strange)}, which do not attend to all tokens before, "
            "or to a window of them, by keys and values alone."
        )
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in parameters.values():
        if isinstance(rope, dict) and rope.get("rope_type") in BY_LENGTH:
            raise UnsupportedModel(f"{name} uses {rope['rope_type']} RoPE scaling, and another RoPE in other layers.")


def prepared(network: Any) -> Any:
    """A network that is to be run and not trained, with our attention and one RoPE for all lengths. Raises:
    UnsupportedModel."""
    from cag.forward.attention_hook import ATTENTION_NAME

    refuse_unsupported(network.config)
    settle_frequencies(network)
    network = network.eval().requires_grad_(False)
    network.set_attn_implementation(ATTENTION_NAME)
    return network


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
    """What was read of a model: its network laid out on a device, its tokenizer, in which types it is kept; and from
    which files."""

    network: Any
    tokenizer: Any
    fingerprints: ModelFingerprints
    kv_dtype: torch.dtype
    compute_dtype: torch.dtype
    files: ReadFiles


def read_parts(directory: Path, plan: RuntimePlan, device: torch.device, dtype: str, adapter: Path | None) -> ReadParts:
    """Read a directory of Hugging Face files. Raises: as `LanguageModel.load`."""
    files = ReadFiles.before_reading(directory, adapter)
    checkpoint = read_checkpoint(directory)
    refuse_unsupported(checkpoint.config)
    stored = checkpoint.dtype
    compute = chosen_dtype(dtype, plan, stored)
    packs = plan.product == "packed" and compute == torch.float32
    # an adapter's merged weights are of no 16 bits any more
    kept = stored if packs and adapter is None and multiplies_packed(stored) else compute
    check_memory(checkpoint.num_weights(apart=packs), kept, device)
    network = read_network(directory, kept)
    if kept != compute and loses_in_16_bits(network):
        network = read_network(directory, compute)
    if adapter is not None:
        network = with_adapter(network, adapter)
    with ThreadPoolExecutor(1, "cag-load") as beside:  # the network's modules are imported by now
        tokenizer = beside.submit(read_tokenizer, directory)
        fingerprints = beside.submit(model_fingerprint, directory, adapter)
        lay_out_weights(network, plan, compute, packs=packs)
        network = network.to(device)
    files.check_read()
    return ReadParts(network, tokenizer.result(), fingerprints.result(), stored, compute, files)


def read_network(directory: Path, dtype: torch.dtype) -> Any:
    """The network in a directory of model files, every weight of it read, in `dtype`.

    Raises:
        ModelError: files that cannot be read, or lack a weight.
        UnsupportedModel: files in a format that is not read, or with more than the network takes.
    """
    from safetensors import SafetensorError

    checkpoint = read_checkpoint(directory)
    try:
        with _reports_left_to_us():
            network, found = checkpoint.from_pretrained(
                dtype=dtype,
                use_safetensors=True,  # or pickles are taken where there are only other names
                attn_implementation="eager",  # or the configuration may ask for code from the hub
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
            _refuse_other_weights(checkpoint, network, found)
            return checkpoint.with_plain_weights(network, dtype)
    except ImportError as error:
        raise ModelError(f"cannot load the model in {directory}: {error}", hint=_install(checkpoint)) from error
    except (*UNREADABLE, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"cannot load the model in {directory}: {error}",
            hint="Fetch it again; with TRANSFORMERS_VERBOSITY=warning transformers reports what it found.",
        ) from error


@contextmanager
def _reports_left_to_us() -> Iterator[None]:
    """Inside, transformers reports nothing, unless the environment asks it to."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = transformers_logging.get_verbosity()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _install(checkpoint: Checkpoint) -> str:
    return "" if checkpoint.quantization is None else "Install cag-engine[quantized]."


def _where_weights_are(checkpoint: Checkpoint, needed: str) -> str:
    """What to do about missing weights of a network of the class `needed`."""
    architectures = getattr(checkpoint.config, "architectures", None) or [needed]
    if needed in architectures:
        return "Fetch the model again."
    return f"Fetch the model again, or take one that writes text: these files are of {', '.join(architectures)}."


def _refuse_other_weights(checkpoint: Checkpoint, network: Any, found: dict[str, Any]) -> None:
    """What is missing or of another shape transformers makes up, in each process anew; what is left over it forgets."""
    directory = checkpoint.directory
    if more := [name for name in left_over(network, found["unexpected_keys"]) if not checkpoint.adds_nothing(name)]:
        raise UnsupportedModel(
            f"the files in {directory} hold {len(more)} tensors beside weights that the network has no place for, such "
            f"as {more[0]}: quantized in a way that config.json does not describe, or of another model.",
            hint=TAKE_ANOTHER,
            path=directory,
        )
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"the files in {directory} lack {len(missing)} weights, such as {missing[0]}.",
            hint=_where_weights_are(checkpoint, type(network).__name__),
        )
    if others := sorted(found["mismatched_keys"]):
        name, shape, expected = others[0]
        raise ModelError(
            f"the files in {directory} have {len(others)} weights of another shape, such as {name}: {tuple(shape)} "
            f"where {tuple(expected)} is expected.",
            hint="Fetch the model again.",
        )


def read_tokenizer(directory: Path) -> Any:
    """Its tokenizer, with the chat template that the directory has.

    Raises:
        ModelError: files that cannot be read, or not without a library that is missing.
        UnsupportedModel: transformers makes other tokens of them than they do.
    """
    import_transformers()
    from transformers import AutoTokenizer

    pieces = None if (directory / "tokenizer.json").exists() else _sentencepiece(directory / "tokenizer.model")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, mistral_format=False, **NO_CODE)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"cannot load the tokenizer in {directory}: {error}") from error
    if pieces is not None and pieces != [encode(tokenizer, text, special=False) for text in _COMPARED_TEXTS]:
        raise UnsupportedModel(
            f"of tokenizer.model in {directory} transformers makes a tokenizer with other tokens.",
            hint="Take a model with a tokenizer.json.",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template_text(directory)
    return tokenizer


def _sentencepiece(path: Path) -> list[list[int]] | None:
    """Tokens of the compared texts by the library that the vocabulary at `path` was made with; None without a file."""
    if not path.exists():
        return None
    try:
        import google.protobuf  # noqa: F401  (which transformers reads it with)
        from sentencepiece import SentencePieceProcessor

        vocabulary: Any = SentencePieceProcessor(model_file=str(path))
        return [list(vocabulary.encode(text)) for text in _COMPARED_TEXTS]
    except ImportError as error:
        raise ModelError(
            f"the model in {path.parent} has a {path.name} and no tokenizer.json, and what reads that is missing: "
            f"{error}.",
            hint="Install sentencepiece and protobuf, or take a model with a tokenizer.json.",
        ) from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error


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


def check_memory(num_weights: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises: InsufficientResources: the weights need more memory than is free."""
    needed, free = num_weights * dtype.itemsize, free_memory_bytes(device)
    if needed > free:
        raise InsufficientResources(
            f"the model needs {needed / 1e9:.1f} GB of memory in {dtype}, and {free / 1e9:.1f} GB are free.",
            hint="Take a smaller model, or free memory.",
        )
