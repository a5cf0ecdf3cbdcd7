"""The record of a start: what transformers made of a model, as numbers and texts. In `$CAG_HOME/starts`.

A record that is damaged, of other facts or of another schema is none. Knows files, no torch.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cag.home import cag_home, is_trusted, write_atomically
from cag.prompt import PromptTemplate
from cag.thinking import Thinking, thinking_from_json

EMBEDDING, OUTPUT_MATRIX = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Start:
    """What a process needs to answer short questions, besides the weights.

    Attributes:
        facts: digest of what all of this follows from (`cag.starts.facts`).
        plan: what of the `RuntimePlan` it was found with.
        stored_dtype: of all weights in the files, bfloat16 or float16; keys and values are kept in it.
        compute_dtype: what forwards compute in.
        parameters: names of the network's weights that lie as its files have them.
        packed: names of those that are packed in panels (`cag_kernels.packed`).
        panel_rows: rows of a weight in a panel.
        is_tied: whether the output matrix is the embedding, or packed from it.
        epsilons: of each norm, by the name of its module.
        inverse_frequencies, attention_scaling: of the rotary embedding.
        kv_shapes: of each layer `num_kv_heads` and `head_dim`.
        rules: of each layer the fields of its `AttentionRule`.
        template, thinking: the fields of the `PromptTemplate`, and of what the model's `Thinking` is.
        rope_parameters: of the configuration: what positions mean.
        tokenizer_sha256: of the tokenizer's tables, which lie in a file of their own.
        probe_sha256: of the logits that the forward of few rows gave on the probe tokens.
    """

    facts: str
    plan: dict[str, Any]
    stored_dtype: str
    compute_dtype: str
    parameters: list[str]
    packed: list[str]
    panel_rows: int
    is_tied: bool
    epsilons: dict[str, float]
    inverse_frequencies: list[float]
    attention_scaling: float
    kv_shapes: list[list[int]]
    rules: list[dict[str, Any]]
    num_q_heads: int
    vocab_size: int
    window_tokens: int
    rope_parameters: dict[str, Any] | None
    template: dict[str, Any]
    thinking: dict[str, Any]
    stop_ids: list[int]
    tokenizer_sha256: str
    probe_sha256: str

    @property
    def packed_sources(self) -> dict[str, str]:
        """Names of packed weights, each with its name in the files."""
        return {name: EMBEDDING if self.is_tied and name == OUTPUT_MATRIX else name for name in self.packed}

    @property
    def prompt_template(self) -> PromptTemplate:
        """The template itself."""
        return PromptTemplate(**self.template | {"stop_strings": tuple(self.template["stop_strings"])})

    @property
    def model_thinking(self) -> Thinking:
        """How the model thinks."""
        return thinking_from_json(self.thinking)


def record_path(directory: Path, device: str, dtype: str) -> Path:
    """Where the start of the model in `directory` is kept, for a choice of device and dtype ("auto" is one)."""
    name = hashlib.sha256(json.dumps([str(directory.resolve()), device, dtype]).encode()).hexdigest()
    return cag_home() / "starts" / f"{name[:32]}.json"


def read_start(path: Path) -> Start | None:
    """The record in `path`; None where there is none that is whole, or where others may have written it."""
    try:
        if not is_trusted(path):
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        if digest != _digest(content) or content.keys() != {field.name for field in fields(Start)}:
            return None
        return Start(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_tokenizer_tables(path: Path, start: Start) -> bytes | None:
    """The tokenizer's tables beside the record in `path`; None if they are not those of `start`."""
    try:
        tables = _tables_path(path).read_bytes()
    except OSError:
        return None
    return tables if hashlib.sha256(tables).hexdigest() == start.tokenizer_sha256 else None


def write_start(path: Path, start: Start, tables: bytes) -> None:
    """Keep a start; where the home cannot be written, the next process finds it out again."""
    content = asdict(start)
    text = json.dumps(content | {"sha256": _digest(content)})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_tables_path(path), tables)
        write_atomically(path, text.encode())


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tables_path(path: Path) -> Path:
    return path.with_suffix(".tokenizer")
