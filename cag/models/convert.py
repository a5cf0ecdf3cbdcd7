"""GGUF -> a model directory: bf16 safetensors, configuration, tokenizer, chat template, generation defaults.

Weights pass through in blocks of rows, so the memory needed does not grow with the model. What the tensors and fields
of an architecture mean stands in `gguf_families`; a wrongly named, wrongly shaped or missing tensor is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag.errors import CagError, UnsupportedModel
from cag.models.gguf_families import Family, Piece, family_of, places_of, read_config
from cag.models.gguf_fields import SAFETENSORS_INSTEAD, Fields
from cag.models.gguf_file import GgufFile, GgufTensor
from cag.models.gguf_tokenizer import build_tokenizer, find_stop_ids
from cag.models.progress import Progress, silent

SAMPLE = "Sum: 12,345.60  km\n\n\tdef f(x):\n        return x  # naïve “ça” 日本語 🎉\r\n"


def convert_gguf(
    gguf_path: Path, destination: Path, *, stop_tokens: Sequence[str] = (), progress: Progress = silent
) -> None:
    """Writes the model of `gguf_path`, dequantized to bf16, with its tokenizer into the folder `destination`.

    `stop_tokens` end an answer beside the tokenizer's own end token.
    Raises: UnsupportedModel for a damaged file, an architecture, tensor or text splitting that is not known here, or a
    result whose tokenizer or chat template does not work.
    """
    progress("convert", 0, 0)
    with GgufFile(gguf_path) as file, _foreign_errors_translated(gguf_path):
        fields = Fields(file)
        family = family_of(fields)
        config = _model_config(fields, family)
        tokenizer = build_tokenizer(file.metadata)
        stop_ids = find_stop_ids(file.metadata, stop_tokens)
        places = places_of(file, family)
        shapes = _check_places(file, places, config)
        _write_weights(file, places, shapes, config.head_dim, destination / "model.safetensors", progress)
    config.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    _generation_config(tokenizer, stop_ids).save_pretrained(destination)
    check_chat_tokenizer(destination)


@contextmanager
def _foreign_errors_translated(path: Path) -> Iterator[None]:
    """What libraries raise about numbers and texts of a file that are none that a model can have."""
    try:
        yield
    except CagError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UnsupportedModel(
            f"{path} says what no model of its architecture can be made of: {error}.",
            hint=SAFETENSORS_INSTEAD,
            path=path,
        ) from error


def check_chat_tokenizer(directory: Path) -> None:
    """Raises: UnsupportedModel when the tokenizer in `directory` loses text, or cannot render and end a chat turn."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False)) != SAMPLE:
        raise UnsupportedModel(f"the tokenizer in {directory} does not give back the text it was given.")
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "Ping?"}, {"role": "assistant", "content": "Pong."}]
    try:
        turn = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise UnsupportedModel(f"the chat template in {directory} cannot be rendered: {error}.") from error
    stop_ids = GenerationConfig.from_pretrained(directory).eos_token_id
    turn_ids = tokenizer.encode(turn, add_special_tokens=False)
    if "Ping?" not in turn or not set(stop_ids if isinstance(stop_ids, list) else [stop_ids]) & set(turn_ids):
        raise UnsupportedModel(f"the chat template in {directory} does not end a turn with a stop token.")


def _model_config(fields: Fields, family: Family) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config: Any = AutoConfig.for_model(family.model_type, **read_config(fields, family))
    network: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [network.__name__]
    return config


def _check_places(file: GgufFile, places: dict[str, list[Piece]], config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of an empty network of `config`, all of which must have their place.

    Raises: UnsupportedModel: other parameters, or of other shapes, than the network has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        make_model: Any = AutoModelForCausalLM.from_config
        model = make_model(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    found = {name: _shape(tensors, pieces) for name, pieces in places.items()}
    expected = {name: (prod(shape[:-1]), shape[-1]) for name, shape in shapes.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UnsupportedModel(
            f"{file.path} does not hold the tensors of its architecture; first difference: {wrong[0]}, "
            f"expected {expected.get(wrong[0])}, found {found.get(wrong[0])}.",
            hint=SAFETENSORS_INSTEAD,
            path=file.path,
        )
    return shapes


def _shape(tensors: dict[str, GgufTensor], pieces: list[Piece]) -> tuple[int, int]:
    """Rows and their length."""
    sizes = [tensors[piece.tensor].num_rows if piece.num_rows is None else piece.num_rows for piece in pieces]
    return sum(sizes), tensors[pieces[0].tensor].shape[-1]


def _write_weights(
    file: GgufFile,
    places: dict[str, list[Piece]],
    shapes: dict[str, tuple[int, ...]],
    head_dim: int,
    path: Path,
    progress: Progress,
) -> None:
    """Streams all parameters into one safetensors file: length of header, header, then the bytes in header order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in places:
        end = start + 2 * prod(shapes[name])
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    total_bytes, done_bytes = start, 0
    tensors = {tensor.name: tensor for tensor in file.tensors}
    with path.open("wb") as output:
        output.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in chain.from_iterable(places.values()):
            for block in _parameter_blocks(file, tensors[piece.tensor], piece, head_dim):
                done_bytes += output.write(_bfloat16_bytes(block))
                progress("convert", done_bytes, total_bytes)


def _parameter_blocks(file: GgufFile, tensor: GgufTensor, piece: Piece, head_dim: int) -> Iterator[NDArray[np.float32]]:
    blocks = file.row_blocks(tensor, piece.first_row, piece.num_rows, multiple=head_dim)
    if piece.change == "halves apart":
        # a bias has its heads in one row
        return (_halves_apart(block if len(tensor.shape) > 1 else block.T, head_dim) for block in blocks)
    return (block - 1 for block in blocks) if piece.change == "minus one" else blocks


def _halves_apart(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Undoes the row order of llama in GGUF, where the two halves that RoPE rotates are interleaved in each head."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _bfloat16_bytes(values: NDArray[np.float32]) -> bytes:
    import torch

    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return bytes(rounded.view(torch.uint8).numpy().tobytes())


def _generation_config(tokenizer: Any, stop_ids: Sequence[int]) -> Any:
    from transformers import GenerationConfig

    make_config: Any = GenerationConfig
    return make_config(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(stop_ids) if len(stop_ids) > 1 else stop_ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )
