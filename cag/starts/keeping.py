"""Keeping a start: what transformers made of a model is written down once everything that replaces it was compared.

Nothing is kept unless the weights in the files are those of the network to the bit, the rotary angles the same at every
position of the window, the tokenizer the same on samples, and the logits of the forward of few rows over the plain
parts those of the one over transformers' network. Knows a loaded model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cag.forward.decoder import recognize
from cag.forward.decoder_layers import SeenLayer, Turning
from cag.forward.weights import PackedLinear
from cag.machine.runtime import RuntimePlan
from cag.models.read_files import ReadFiles
from cag.prompt import CLOSING_TEXT, SYSTEM_TEXT, document_marker
from cag.starts.facts import start_facts
from cag.starts.network import PlainNetwork, epsilons_of
from cag.starts.record import Start, write_start
from cag.starts.tokenizer import KeptTokenizer, read_tables
from cag_kernels import PackedWeight
from cag_kernels.device import HALF_TYPES
from cag_kernels.packed import PANEL

if TYPE_CHECKING:
    from cag.model import LanguageModel

_POSITIONS = 4096  # compared at once
_SAMPLES = (
    SYSTEM_TEXT,
    CLOSING_TEXT,
    document_marker(7, "A title"),
    " two  spaces\t\n\nlines\r\n",
    "Größe 漢字 🙂 e\u0301",
    "1234567.89",
)


@dataclass(frozen=True)
class StartKeeper:
    """Keeps the start of the model in `directory` in `path`; made before the model is read."""

    directory: Path
    path: Path
    files: ReadFiles

    @classmethod
    def before_reading(cls, directory: Path, path: Path) -> StartKeeper:
        """Notes which files the model is read from."""
        return cls(directory, path, ReadFiles.before_reading(directory))

    @torch.inference_mode()
    def keep(self, model: LanguageModel) -> bool:
        """Write down the start of a model that was read in whole; returns whether it was found to be the same."""
        if not _may_be_kept(model):
            return False
        with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # parts that are not there, or others
            tables = model.tokenizer.backend_tokenizer.to_str().encode()
            start, packed = _described(model, tables), _packed_weights(model.network)
            plain = PlainNetwork(start, dict(model.network.named_parameters(remove_duplicate=False)) | packed)
            if not self._same_weights(model.network, start) or not _same_angles(model.network, plain, start):
                return False
            probed = _same_logits(model, plain)
            if probed is None or not _same_tokens(model, tables):
                return False
            facts = start_facts(self.directory)
            if not self.files.are_untouched():
                return False
            write_start(self.path, replace(start, facts=facts, probe_sha256=digest_of(probed)), tables)
            return True
        return False

    def _same_weights(self, network: Any, start: Start) -> bool:
        from safetensors import safe_open

        names = [(name, name) for name in start.parameters] + list(start.packed_sources.items())
        found = set()
        for path in sorted(self.directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as stream:
                stored = set(stream.keys())
                for name, source in names:
                    if source not in stored:
                        continue
                    if not _has_bits(attrgetter(name)(network), stream.get_tensor(source), start.stored_dtype):
                        return False
                    found.add(name)
        return found == {name for name, _ in names}


def plan_facts(plan: RuntimePlan) -> dict[str, Any]:
    """What of a plan decides how a model is read and computes."""
    return {key: value for key, value in asdict(plan).items() if key not in ("measured_ms", "reason")}


def digest_of(logits: Tensor) -> str:
    """Hex sha256 of their bits."""
    return hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()


def _may_be_kept(model: LanguageModel) -> bool:
    on_cpu = model.device.type == "cpu" and model.adapter is None and model.kv_dtype in HALF_TYPES
    return on_cpu and model.decoder is not None and bool(model.tokenizer.is_fast)


def _packed_weights(network: Any) -> dict[str, PackedWeight]:
    layers = ((name, module) for name, module in network.named_modules() if isinstance(module, PackedLinear))
    return {f"{name}.weight": layer.packed for name, layer in layers}


def _has_bits(weight: Tensor, stored: Tensor, dtype: str) -> bool:
    """Whether a network's weight is that of a file, which is of a type, to the bit, or widened from it."""
    if stored.dtype != getattr(torch, dtype) or weight.dtype not in (stored.dtype, torch.float32):
        return False
    bits = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return torch.equal(weight.detach().view(bits), stored.to(weight.dtype).view(bits))


def _described(model: LanguageModel, tables: bytes) -> Start:
    """Raises: ValueError: something that a record does not hold: what JSON would change, or other rotations than the
    usual one of all layers."""
    network = model.network
    config, rotary = network.config.get_text_config(), network.model.rotary_emb
    start = Start(
        facts="",
        plan=plan_facts(model.plan),
        stored_dtype=str(model.kv_dtype).removeprefix("torch."),
        compute_dtype=str(model.compute_dtype).removeprefix("torch."),
        parameters=sorted(name for name, _ in network.named_parameters()),
        packed=sorted(_packed_weights(network)),
        panel_rows=PANEL,
        is_tied=torch.equal(network.lm_head.weight, network.model.embed_tokens.weight),
        epsilons=epsilons_of(network),
        inverse_frequencies=rotary.inv_freq.float().tolist(),
        attention_scaling=float(rotary.attention_scaling),
        kv_shapes=[list(asdict(shape).values()) for shape in model.kv_shapes],
        rules=[asdict(rule) for rule in model.rules],
        num_q_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        window_tokens=config.max_position_embeddings,
        rope_parameters=getattr(config, "rope_parameters", None),
        template=asdict(model.template),
        thinking=asdict(model.thinking),
        stop_ids=sorted(model.stop_ids),
        tokenizer_sha256=hashlib.sha256(tables).hexdigest(),
        probe_sha256="",
    )
    if any(seen != SeenLayer(seen.rule, Turning()) for seen in model.seen):
        raise ValueError("its layers turn in several ways.")
    if model.short is not None:
        raise ValueError("short sequences have another RoPE.")
    if getattr(network.model.embed_tokens, "scale", 1) != 1:
        raise ValueError("its embedding is scaled.")
    if start.rope_parameters != json.loads(json.dumps(start.rope_parameters)):
        raise ValueError("its positions cannot be written down.")
    return start


def _same_angles(network: Any, plain: Any, start: Start) -> bool:
    """At every position; whether they are changed by what was asked before does not matter then."""
    for first in range(0, start.window_tokens, _POSITIONS):
        positions = torch.arange(first, min(first + _POSITIONS, start.window_tokens))[None]
        hidden = torch.zeros(1, positions.shape[1], 1, dtype=torch.float32)
        expected, found = network.model.rotary_emb(hidden, positions), plain.model.rotary_emb(hidden, positions)
        if not all(map(torch.equal, expected, found)):
            return False
    return True


def _same_logits(model: LanguageModel, plain: PlainNetwork) -> Tensor | None:
    """Logits of the probe tokens, if both forwards have the same bits."""
    other = recognize(plain, model.kv_shapes[0].head_dim, model.seen, model.plan.product, model.kv_dtype)
    if other is None or model.decoder is None:
        return None
    found = model.probe(other)
    return found if torch.equal(model.probe(model.decoder), found) else None


def _same_tokens(model: LanguageModel, tables: bytes) -> bool:
    whole, kept = model.tokenizer, KeptTokenizer(read_tables(tables), lambda: None)
    for text in _texts(model):
        for splits in (False, True):
            options = {"add_special_tokens": False, "split_special_tokens": splits, "verbose": False}
            ids = whole(text, **options)["input_ids"]
            if list(ids) != kept(text, **options)["input_ids"]:
                return False
            for skips in (False, True):
                options = {"skip_special_tokens": skips, "clean_up_tokenization_spaces": False}
                if whole.decode(ids, **options) != kept.decode(ids, **options):
                    return False
    return True


def _texts(model: LanguageModel) -> Iterator[str]:
    parts = (*asdict(model.template).values(), *asdict(model.thinking).values())
    pieces = [text for text in parts if isinstance(text, str)]
    specials = list(model.tokenizer.all_special_tokens)
    yield from (text for text in (*_SAMPLES, *pieces, *specials, " ".join(specials)) if text)
    vocabulary = range(0, len(model.tokenizer), max(1, len(model.tokenizer) // 4096))
    yield model.tokenizer.backend_tokenizer.decode(list(vocabulary), skip_special_tokens=False)
