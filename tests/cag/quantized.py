"""GPTQ and AWQ layers, packed as their formats are described, one code after the other; folders of such layers."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def write_quantized(plain, directory, described, change, *, every=lambda name: "proj" in name):
    """A copy of the model in `plain` with `change(weight)` in the place of each weight that `every` takes; it gives
    parts by name, and the weight that they stand for. Returns the folder, and all weights by name."""
    shutil.copytree(plain, directory)
    tensors, weights = {}, load_file(plain / "model.safetensors")
    for name, weight in list(weights.items()):
        if every(name) and weight.ndim == 2:
            parts, weights[name] = change(weight.float())
            tensors |= {name.replace("weight", part): value for part, value in parts.items()}
        else:
            tensors[name] = weight
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    set_fields(directory / "config.json", quantization_config=described)
    return directory, weights


def set_fields(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_tensors(directory, change):
    """`change` gets the tensors by name, to alter them in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def gptq(bits=4, size=32, *, desc_act=False, symmetric=True, lacking=1, scales=torch.float16, indices=True):
    """What packs a weight as GPTQ does; `lacking` is what zero points are stored less."""

    def pack(weight):
        inputs = weight.shape[1]
        group = torch.arange(inputs) // (inputs if size == -1 else size)
        if desc_act:
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        codes, zeros, scale = round_to_codes(weight, group, bits, symmetric, scales)
        parts = {
            "qweight": gptq_words(codes, bits).T.contiguous(),
            "qzeros": gptq_words(zeros.T - lacking, bits),
            "scales": scale.T.contiguous(),
        }
        parts |= {"g_idx": group.int()} if indices else {}
        return parts, value_of(codes, zeros, scale, group)

    return pack


def awq(size=32, *, scales=torch.float16):
    """What packs a weight as AutoAWQ's `gemm` does."""

    def pack(weight):
        group = torch.arange(weight.shape[1]) // (weight.shape[1] if size == -1 else size)
        codes, zeros, scale = round_to_codes(weight, group, 4, False, scales)
        parts = {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scale.T.contiguous()}
        return parts, value_of(codes, zeros, scale, group)

    return pack


def round_to_codes(weight, group, bits, symmetric, dtype):
    """Codes `[outputs, inputs]`, zero points and scales `[outputs, groups]`."""
    codes, zeros, scales = torch.empty(weight.shape, dtype=torch.long), [], []
    for index in range(int(group.max()) + 1):
        part = weight[:, group == index]
        least, most = part.amin(1), part.amax(1)
        if symmetric:
            most = part.abs().amax(1)
            least = -most
        scale = ((most - least) / (2**bits - 1)).to(dtype)
        zero = torch.full(least.shape, 2.0 ** (bits - 1)) if symmetric else (-least / scale.float()).round()
        zero = zero.clamp(1, 2**bits - 1).long()
        codes[:, group == index] = ((part / scale.float()[:, None]).round().long() + zero[:, None]).clamp(
            0, 2**bits - 1
        )
        zeros.append(zero)
        scales.append(scale)
    return codes, torch.stack(zeros, 1), torch.stack(scales, 1)


def value_of(codes, zeros, scales, group):
    return (codes - zeros[:, group]).double() * scales.double()[:, group]


def gptq_words(rows, bits):
    """Each row as a stream of bits, lowest first, cut into words of 32 bits."""
    words = []
    for row in rows.tolist():
        stream = sum(code << (bits * index) for index, code in enumerate(row))
        words.append([stream >> (32 * index) & 0xFFFFFFFF for index in range(len(row) * bits // 32)])
    return as_int32(words)


def awq_words(rows):
    """Each eight of a row in a word, in AWQ's order from the lowest bits on."""
    words = []
    for row in rows.tolist():
        eights = [row[start : start + 8] for start in range(0, len(row), 8)]
        words.append([sum(eight[AWQ_ORDER[index]] << (4 * index) for index in range(8)) for eight in eights])
    return as_int32(words)


def as_int32(words):
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)
