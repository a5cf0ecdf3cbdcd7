"""GPTQ and AWQ checkpoints: what their description says, and their linear layers as plain weights.

A layer lies as `qweight` (codes packed into words of 32 bits), `qzeros` and `scales` (of groups of its inputs) and, in
GPTQ, `g_idx` (the group of each input). Its weight is (code - zero point) * scale, computed in float32, then rounded.
GPTQ packs inputs, as a stream of bits from the lowest on, and stores a zero point less one, unless its format is
`gptq_v2`; AWQ packs outputs, by eight, the even ones before the odd ones. Knows descriptions and tensors, no files;
refuses what is not certain.

Source: the packers of AutoGPTQ, GPTQModel, AutoAWQ and AutoRound; `docs/log.md` says which were compared, and how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cag.errors import ModelError, UnsupportedModel
from cag.models.directory import TAKE_ANOTHER

PACKED = ("gptq", "awq", "auto-round")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AUTO_ROUND = ("auto_round:auto_gptq", "auto_round:auto_awq")
_GPTQ_FORMATS, _FLOATS = (None, "gptq", "gptq_v2"), ("F16", "BF16", "F32")
_KNOWN: dict[str, dict[str, tuple[Any, ...]]] = {  # what the fields of a description may say
    "gptq": {
        "bits": (2, 3, 4, 8),
        "format": _GPTQ_FORMATS,
        "checkpoint_format": _GPTQ_FORMATS,
        "is_marlin_format": (None, False),
    },
    "awq": {
        "bits": (4,),
        "version": (None, "gemm", "GEMM"),
        "format": (None, "gemm"),
        "checkpoint_format": (None, "gemm"),
    },
}
_OF_BOTH: dict[str, tuple[Any, ...]] = {
    "pack_dtype": (None, "int32"),
    "data_type": (None, "int"),
    "act_bits": (None, 16, 32),
    "rotation": (None,),
    "rotation_config": (None, {}),
    "adapter": (None, {}),
}
_AWQ_SHIFTS = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32)  # of the eight outputs in a word
_BLOCK_WEIGHTS = 1 << 18  # unpacked at once: what is between codes and weight stays in a processor's cache


@dataclass(frozen=True)
class Packing:
    """How the layers of a checkpoint are packed.

    `is_awq` or GPTQ; `group_size` -1 is one group of all inputs; `in_order`: groups are of neighbours; `zero_offset` is
    what stored zero points lack; `dtype` is that of the weights.
    """

    is_awq: bool
    bits: int
    group_size: int
    in_order: bool
    zero_offset: int
    dtype: torch.dtype


def read_packing(described: Mapping[str, Any], place: object, dtype: torch.dtype) -> Packing:
    """What `described` says, a `quantization_config` of a method in `PACKED`.

    Raises: UnsupportedModel: a packing that is not known for certain.
    """

    def refused(name: str, value: object) -> UnsupportedModel:
        message = f"the weights in {place} are quantized with {name} {value!r}, which is not read."
        return UnsupportedModel(message, hint=TAKE_ANOTHER, path=place)

    method, packing, size = described["quant_method"], described.get("packing_format"), described.get("group_size")
    if packing not in (_AUTO_ROUND if method == "auto-round" else (None,)):
        raise refused("packing_format", packing)
    is_awq = method == "awq" or packing == "auto_round:auto_awq"
    for name, known in (_KNOWN["awq" if is_awq else "gptq"] | _OF_BOTH).items():
        value = described.get(name)
        if value not in known or isinstance(value, float):
            raise refused(name, value)
    if type(size) is not int or not (size == -1 or size > 0):
        raise refused("group_size", size)
    if described.get("backend") == "llm-awq":
        raise refused("backend", "llm-awq")
    for field in ("dynamic", "extra_config"):
        if _has_exceptions(described, field):
            raise refused(field, described[field])
    formats = {described[name] for name in ("checkpoint_format", "format") if described.get(name)}
    if len(formats) > 1:
        raise refused("the formats", sorted(formats))
    return Packing(
        is_awq=is_awq,
        bits=described["bits"],
        group_size=size,
        in_order=is_awq or method == "auto-round" or described.get("desc_act") is False,
        zero_offset=int(not is_awq and "gptq_v2" not in formats),
        dtype=dtype,
    )


def _has_exceptions(described: Mapping[str, Any], field: str) -> bool:
    """Whether some layers are packed in another way. Those that are not packed at all lie as such."""
    try:
        return not all(
            pattern.startswith("-:")
            or settings.get("bits", 0) >= 16
            or all(value == described.get(name) for name, value in settings.items() if name != "sym")
            for pattern, settings in (described.get(field) or {}).items()
        )
    except (AttributeError, TypeError):
        return True


def plain_tensors(stored: Mapping[str, Any], packing: Packing) -> dict[str, Any]:
    """`stored`, slices of safetensors files by name, as an unquantized checkpoint has them. Raises: ModelError."""
    tensors: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, part in stored.items():
        layer, _, own = name.rpartition(".")
        if own in _PARTS:
            layers.setdefault(layer, {})[own] = part
        else:
            tensors[name] = part
    for layer, parts in layers.items():
        if f"{layer}.weight" in tensors:
            raise ModelError(f"the layer {layer} has a weight and a quantized one.", hint="Fetch the model again.")
        tensors[f"{layer}.weight"] = QuantizedWeight(layer, parts, packing)
    return tensors


class QuantizedWeight:
    """The weight of a layer, in parts that are not read yet; `weight[...]` reads and unpacks it, as it reads a tensor.

    Raises: ModelError on making it: parts that are missing, or of a type or shape that does not belong to the others.
    """

    def __init__(self, name: str, parts: Mapping[str, Any], packing: Packing) -> None:
        """`parts` are slices of safetensors files, of the layer `name`: qweight, qzeros and so on."""
        self.name, self._parts, self._packing = name, parts, packing
        if missing := [part for part in _PARTS[: 3 if packing.in_order else 4] if part not in parts]:
            raise self._damaged(f"lacks {missing[0]}")
        bits, shape = packing.bits, parts["qweight"].get_shape()
        if len(shape) != 2 or 0 in shape:
            raise self._damaged(f"has a qweight of shape {shape}")
        inputs, outputs = (shape[0], shape[1] * 32 // bits) if packing.is_awq else (shape[0] * 32 // bits, shape[1])
        self._shape, self._group_size = (outputs, inputs), inputs
        if packing.group_size != -1:
            self._group_size = min(packing.group_size, inputs)
        groups = -(-inputs // self._group_size)
        expected = {
            "qweight": ([inputs, outputs * bits // 32] if packing.is_awq else [inputs * bits // 32, outputs], ("I32",)),
            "qzeros": ([groups, outputs * bits // 32], ("I32",)),
            "scales": ([groups, outputs], _FLOATS),
            "g_idx": ([inputs], () if packing.is_awq else ("I32", "I64")),
        }
        for part in sorted(parts, key=_PARTS.index):
            (wanted, dtypes), found, dtype = expected[part], parts[part].get_shape(), parts[part].get_dtype()
            if found != wanted or dtype not in dtypes or outputs * bits % 32:
                raise self._damaged(f"has {part} as {dtype} {found}, where {wanted} of {dtypes} is expected")

    def __getitem__(self, _everything: object) -> torch.Tensor:
        """`[num_outputs, num_inputs]` in the packing's dtype. Raises: ModelError: groups that cannot be;
        UnsupportedModel: zero points that mean different numbers to different programs."""
        packing, groups = self._packing, self._groups()
        words = self._parts["qweight"][...].T.contiguous()
        zeros, scales = self._zeros(), self._parts["scales"][...].T.float()
        weight = torch.empty(self._shape, dtype=packing.dtype)
        first = 0
        for block in words.split(max(1, _BLOCK_WEIGHTS * len(words) // weight.numel())):
            codes = _awq_codes(block) if packing.is_awq else _codes(block, packing.bits)
            rows = slice(first, first + len(codes))
            values = codes - self._of_inputs(zeros[rows], groups)
            values *= self._of_inputs(scales[rows], groups)
            weight[rows] = values
            first += len(codes)
        return weight

    def _zeros(self) -> torch.Tensor:
        """`[num_outputs, num_groups]` in float32, which has all these integers."""
        packed, packing = self._parts["qzeros"][...], self._packing
        largest = 2**packing.bits - 1
        zeros = _awq_codes(packed.T) if packing.is_awq else _codes(packed, packing.bits).T
        if packing.zero_offset and int(zeros.max()) == largest:
            raise UnsupportedModel(
                f"{self.name} has a stored zero point of {largest}, which programs read as different numbers.",
                hint="Take a symmetric checkpoint, or one of format gptq_v2.",
            )
        return torch.add(zeros, packing.zero_offset).float()

    def _groups(self) -> torch.Tensor | None:
        """The group of each input; None where they follow each other."""
        if "g_idx" not in self._parts:
            return None
        in_order = torch.arange(self._shape[1]) // self._group_size
        groups: torch.Tensor = self._parts["g_idx"][...].long()
        if torch.equal(groups, in_order):
            return None
        if self._packing.in_order or not torch.equal(groups.sort().values, in_order):
            raise self._damaged("has a g_idx that does not give each group its inputs")
        return groups

    def _of_inputs(self, values: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        """`[num_rows, num_inputs]` of values of groups."""
        if groups is None:
            return values.repeat_interleave(self._group_size, 1)[:, : self._shape[1]]
        return values[:, groups]

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"the quantized layer {self.name} {what}.", hint="Fetch the model again.")


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """`[num_rows, num_codes]` of the stream of bits in each row of `words`; three words hold 32 codes of 3 bits."""
    largest = 2**bits - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return torch.bitwise_right_shift(words[..., None], shifts).bitwise_and_(largest).flatten(1)
    starts = torch.arange(0, 32 * bits, bits)
    # As 64 bits with the next word above: a code may end there.
    wide = words.reshape(len(words), -1, bits).long().bitwise_and_(0xFFFFFFFF)
    wide |= wide.roll(-1, 2) << 32
    return torch.bitwise_right_shift(wide[..., starts // 32], starts % 32).bitwise_and_(largest).int().flatten(1)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """`[8 * num_words, num_columns]` of words of eight outputs each, `[num_words, num_columns]`."""
    return torch.bitwise_right_shift(words[:, None], _AWQ_SHIFTS[:, None]).bitwise_and_(15).flatten(0, 1)
