"""Compiles the launches of the Triton kernels for a GPU, without one, and prints a line of JSON for each.

The product's own launching code runs on CPU tensors; what it would launch is compiled instead, by Triton, to machine
code, and taken apart for the registers, the memory that spills, the bytes that a store takes and the shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cag_kernels import DensePrefix, PagedTails, quantize_prefix
from cag_kernels.rans import CodeBlocks, RansSegments, RansSide
from cag_kernels.rotation import angles
from cag_kernels.triton import overlap as triton_overlap
from cag_kernels.triton.bytes import split_blocks, split_codes, split_rows
from cag_kernels.triton.inverse import invert
from cag_kernels.triton.launch import attend
from cag_kernels.triton.quantize import dequantize_on_device, quantize_on_device
from cag_kernels.triton.rans import decode_on_device
from cag_kernels.triton.rotation import rotate
from cag_kernels.triton.rows import add_and_norm_on_device, gate_on_device, rotate_and_store_on_device

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8", torch.uint8: "*u8",
    torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
done = set()


def compile_launch(kernel, *args, grid, warmup, launch_pdl=False, **kwargs):
    """Stands for a launch; how it is made is no matter of the code."""
    assert launch_pdl == kwargs.get("overlaps", False), kernel.fn.__name__
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):  # a launch makes a constant of 1 too
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else type_of(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    key = json.dumps([kernel.fn.__name__, signature, sorted(map(str, constants.items())), sorted(map(str, attributes))])
    if key in done:
        return
    done.add(key)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGET, options=options)
    names = ("block_rows", "key_bits", "value_bits", "bits", "joined_rows", "page_tokens", "overlaps", "has_ahead")
    sizes = {name: values[name] for name in names if name in values}
    print(json.dumps({"kernel": kernel.fn.__name__, **sizes, **resources(compiled)}))


def type_of(value):
    return "fp32" if isinstance(value, float) else "i32"


def resources(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])
    stored = {int(numbers or 1) * int(bits) // 8 for numbers, bits in stores}
    found = {"registers": registers, "spilled_bytes": stack + local, "stored_bytes": sorted(stored)}
    found |= {"arrivals": arrival_order(compiled.asm["ptx"]), "waits": waits_first(compiled.asm["ptx"])}
    return found | {"shared_bytes": compiled.metadata.shared, "warps": compiled.metadata.num_warps}


def waits_first(ptx):
    """Whether a program waits for the launch before it, ahead of every access to global memory; hints are none."""
    first = re.search(r"griddepcontrol\.wait|(ld|st|red)\.global|atom\.|cp\.async\.(?!bulk\.prefetch)", ptx)
    return first is not None and first[0] == "griddepcontrol.wait"


def arrival_order(ptx):
    """The atomic that counts arrivals (A), the barrier (B) or access to global memory in front of it, and everything
    behind it: barriers, stores (S), and loads past the first-level cache (L), by a path that is not coherent (n), and
    others (l)."""
    kinds = {
        "B": r"bar\.sync", "A": r"atom\.global\.gpu\.acq_rel", "S": r"st\.global", "L": r"ld\.global\.cg",
        "n": r"ld\.global\.nc", "l": r"ld\.global",
    }  # fmt: skip
    forms = [[name for name, form in kinds.items() if re.search(form, line)] for line in ptx.splitlines()]
    found = "".join(names[0] for names in forms if names)
    return found[max(0, found.find("A") - 1) :] if "A" in found else ""


def launch_everything():
    """Each kernel in the shape of Llama 3.1 8B: 32 query and 8 key/value heads of 128 channels."""
    keys, values = torch.zeros(2, 8, 1024, 128, dtype=torch.bfloat16)
    pool = torch.zeros(2, 4, 8, 16, 128, dtype=torch.bfloat16)
    pages, counts = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    tails = PagedTails(*pool, pages, counts[1:] + 4, counts, 1)
    masks = {"scale": 0.1, "positions": None, "window": None, "softcap": None}
    queries = torch.zeros(32, 64, 128, dtype=torch.bfloat16)
    query = queries[:, :32]
    attend(query[:, :1], DensePrefix(keys, values), tails, 132, **masks, dtype=torch.bfloat16)
    attend(query, DensePrefix(keys, values), None, 132, **masks)
    for bits in (8, 4):
        prefix = quantize_prefix(keys, values, key_bits=bits, value_bits=bits, group_channels=16 * bits)
        for num_queries in (1, 4, 32, 64):
            attend(queries[:, :num_queries], prefix, None, 132, **masks)
        arrivals = torch.zeros(8, dtype=torch.int32)
        for own in (tails, None):
            attend(query[:, :1], prefix, own, 132, **masks, dtype=torch.bfloat16, arrivals=arrivals)
        sizes = {"group_tokens": 64, "group_channels": 1}
        dequantize_on_device(*prefix[:3], **sizes, dtype=torch.bfloat16)
        quantize_on_device(keys, bits=bits, num_exact=4, **sizes)
        quantize_on_device(values, bits=bits, num_exact=4, group_tokens=1, group_channels=64)
    window = {"scale": 0.1, "positions": counts[1:], "window": 64, "softcap": 5.0}
    attend(query[:, :1], DensePrefix(keys, values), tails, 132, **window, dtype=torch.bfloat16)
    wide = torch.zeros(2, 1, 128, 256, dtype=torch.float16)
    attend(wide[0, :, :1], quantize_prefix(*wide, key_bits=4, value_bits=4), None, 132, **window)
    wide = wide.float()
    attend(wide[0, :, :1], DensePrefix(*wide), None, 132, **masks)
    tables = angles(torch.zeros(64, dtype=torch.int64), torch.ones(64))
    codes, rows = torch.zeros(64, 700, dtype=torch.int16), torch.zeros(700, 1024, dtype=torch.int16)
    split = split_rows(rows, (64, 64, False))
    out, ones = torch.empty(8, 64, 128, dtype=torch.bfloat16), torch.ones(2, 1024)
    blocks = CodeBlocks(torch.zeros(2, 700, 32, dtype=torch.int16), pages[0], 64)
    for found in (split_codes(codes), split_blocks(blocks)):
        invert(found, split, ones[0], ones, counts[:1].expand(64), tables, out)
    invert(found, split_rows(rows, (64, 0, False)), ones[0], ones[0], None, None, out)
    counts = torch.tensor([0, 64], dtype=torch.int32)
    shifts = torch.zeros(64, dtype=torch.int8), torch.zeros(1, 700, dtype=torch.int8)
    numbers = torch.zeros(1, 32, dtype=torch.int32), torch.zeros(64, dtype=torch.int16)
    segments = RansSegments(*numbers, counts, numbers[1], counts, counts, *shifts)
    slots = torch.zeros(64, 4096, dtype=torch.int32)
    decode_on_device([RansSide(segments, slots, *shifts[1].expand(2, -1), 2)])
    rows, residual = torch.zeros(32, 6144, dtype=torch.bfloat16), torch.zeros(32, 4096)
    narrow, weight = rows[:, :4096].contiguous(), torch.zeros(4096, 4096, dtype=torch.bfloat16)
    for ahead in (None, weight):
        add_and_norm_on_device(residual, narrow, residual[0], 1e-5, torch.bfloat16, ahead)
    places = torch.zeros(32, dtype=torch.int64)
    cosines, head_norm = residual[:, :128].contiguous(), torch.ones(128)
    for norms in ((None, None), (head_norm, head_norm)):
        rotate_and_store_on_device(rows, (cosines, cosines), tuple(pool), (places, places), norms, 1e-6)
    for ahead in (None, weight):
        gate_on_device(torch.zeros(32, 2 * 14336, dtype=torch.bfloat16), ahead)
    rotate(keys, *angles(torch.zeros(1024, dtype=torch.int64), torch.ones(64)), "halves")


JITFunction.run = compile_launch
triton_overlap.overlaps_on = lambda _device: TARGET.arch >= 90
launch_everything()
