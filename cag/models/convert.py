"""GGUF -> a model directory: bf16 safetensors, configuration, tokenizer, chat template, generation defaults.

Weights pass through in blocks of rows, so the memory needed does not grow with the model. Knows the tensor names of
two architectures (llama, qwen2) and refuses everything it does not know: a wrongly named or missing tensor is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag.errors import UnsupportedModel
from cag.models.gguf_file import GgufFile, GgufTensor
from cag.models.gguf_tokenizer import build_tokenizer
from cag.models.progress import Progress, silent

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def convert_gguf(
    gguf_path: Path, destination: Path, *, stop_tokens: Sequence[str] = (), progress: Progress = silent
) -> None:
    """Writes the model of `gguf_path`, dequantized to bf16, with its tokenizer into the folder `destination`.

    `stop_tokens` end an answer beside the tokenizer's own end token.
    Raises: UnsupportedModel for a damaged file, an architecture, tensor or text splitting that is not known here, or a
    result whose tokenizer or chat template does not work.
    """
    progress("convert", 0, 0)
    with GgufFile(gguf_path) as file:
        config = _model_config(file)
        tokenizer = build_tokenizer(file.metadata)
        _check_tensor_set(file, config)
        _write_weights(file, config, destination / "model.safetensors", progress)
    config.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    _generation_config(tokenizer, stop_tokens).save_pretrained(destination)
    check_chat_tokenizer(destination)


def check_chat_tokenizer(directory: Path) -> None:
    """Raises: UnsupportedModel when the tokenizer in `directory` loses text, or cannot render and end a chat turn."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    sample = "Sum: 12,345.60  km\n\n\tdef f(x):\n        return x  # naïve “ça” 日本語 🎉\r\n"
    if tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) != sample:
        raise UnsupportedModel(f"the tokenizer in {directory} does not give back the text it was given.")
    if not tokenizer.chat_template:
        raise UnsupportedModel(f"the model in {directory} has no chat template.", hint="Take an instruct model.")
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Ping?"}], tokenize=False)
    stop_ids = GenerationConfig.from_pretrained(directory).eos_token_id
    turn_ids = tokenizer.encode(turn, add_special_tokens=False)
    if "Ping?" not in turn or not set(stop_ids if isinstance(stop_ids, list) else [stop_ids]) & set(turn_ids):
        raise UnsupportedModel(f"the chat template in {directory} does not end a turn with a stop token.")


def _model_config(file: GgufFile) -> Any:
    from transformers import AutoConfig

    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES or f"{architecture}.rope.scaling.type" in metadata:
        raise UnsupportedModel(
            f"GGUF files of architecture {architecture!r} (or with scaled positions) are not converted here.",
            hint="Take the model from the hub in safetensors form.",
            path=file.path,
        )

    def field(name: str) -> Any:
        try:
            return metadata[f"{architecture}.{name}"]
        except KeyError as error:
            raise UnsupportedModel(f"{file.path} lacks the field {architecture}.{name}.", path=file.path) from error

    num_q_heads = field("attention.head_count")
    head_dim = metadata.get(f"{architecture}.attention.key_length", field("embedding_length") // num_q_heads)
    return AutoConfig.for_model(
        architecture,
        architectures=[_ARCHITECTURES[architecture]],
        vocab_size=len(metadata.get("tokenizer.ggml.tokens", ())),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=num_q_heads,
        num_key_value_heads=metadata.get(f"{architecture}.attention.head_count_kv", num_q_heads),
        head_dim=head_dim,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=_shortest_float(field("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in file.tensors),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )


def _shortest_float(value: float) -> float:
    """The decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _check_tensor_set(file: GgufFile, config: Any) -> None:
    """Compares names and shapes with those of an empty model of `config`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        make_model: Any = AutoModelForCausalLM.from_config
        model = make_model(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {_parameter_name(tensor.name): tensor.shape for tensor in file.tensors}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UnsupportedModel(
            f"{file.path} does not hold the tensors of its architecture; first difference: {wrong[0]}, "
            f"expected {expected.get(wrong[0])}, found {found.get(wrong[0])}.",
            path=file.path,
        )


def _parameter_name(name: str) -> str:
    if name in _TOP_TENSORS:
        return _TOP_TENSORS[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _LAYER_TENSORS:
        return f"unknown tensor {name}"
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.{match[3]}"


def _write_weights(file: GgufFile, config: Any, path: Path, progress: Progress) -> None:
    """Streams all tensors into one safetensors file: length of header, header, then the bytes in header order."""
    sizes = {tensor.name: 2 * int(np.prod(tensor.shape)) for tensor in file.tensors}
    total_bytes = sum(sizes.values())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in file.tensors:
        end = start + sizes[tensor.name]
        name = _parameter_name(tensor.name)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    done_bytes = 0
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in file.tensors:
            for block in _parameter_blocks(file, tensor, config):
                done_bytes += output.write(_bfloat16_bytes(block))
                progress("convert", done_bytes, total_bytes)


def _parameter_blocks(file: GgufFile, tensor: GgufTensor, config: Any) -> Iterator[NDArray[np.float32]]:
    match = _LAYER_NAME.fullmatch(tensor.name)
    if config.model_type == "llama" and match and match[2] in ("attn_q", "attn_k"):
        num_heads = config.num_attention_heads if match[2] == "attn_q" else config.num_key_value_heads
        yield _halves_apart(np.concatenate(list(file.row_blocks(tensor))), num_heads)
    else:
        yield from file.row_blocks(tensor)


def _halves_apart(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes the row order of llama in GGUF, where the two halves that RoPE rotates are interleaved in each head."""
    head_dim = rows.shape[0] // num_heads
    return rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _bfloat16_bytes(values: NDArray[np.float32]) -> bytes:
    import torch

    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return bytes(rounded.view(torch.uint8).numpy().tobytes())


def _generation_config(tokenizer: Any, stop_tokens: Sequence[str]) -> Any:
    from transformers import GenerationConfig

    make_config: Any = GenerationConfig
    vocabulary = tokenizer.get_vocab()
    wanted = [tokenizer.eos_token, *stop_tokens]
    if any(token not in vocabulary for token in wanted):
        raise UnsupportedModel(f"the tokenizer lacks one of the stop tokens {wanted}.")
    stop_ids = [vocabulary[token] for token in wanted]
    return make_config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids if len(stop_ids) > 1 else stop_ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )
