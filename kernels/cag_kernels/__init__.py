"""Attention over an immutable prefix and a growing tail, and products over few rows. Tensors in, tensors out.

This package knows torch and Triton, and no type of the project. `segment_attention` means what
`reference.segment_attention_reference` says, and `merge_segments` joins the results of several segments;
`packed_linear` multiplies a question's rows by a weight that `pack_weight` laid out for it.

`prefix_attention`, `paged_attention` and both together, `cascade_attention`, serve the queries of many sessions over
one prefix, which may be quantized (`quantize_prefix`); `move_keys` turns keys to other positions; `decode_segments` and
`inverse_transform` make them from entropy-coded integers. What they mean is in `prefix_reference`, `quantize`,
`rotation`, `rans` and `inverse`. Triton is imported by the first call that it serves on a CUDA device.
"""

from cag_kernels.attention import available_paths, choose_path, segment_attention
from cag_kernels.cpu.attention.segments import warm_up, warm_up_dots, warm_up_tiles
from cag_kernels.cpu.paged import warm_up_tails
from cag_kernels.cpu.processor import has_compiler, has_dots, has_numba, has_tiles, vector_lanes
from cag_kernels.inverse import inverse_transform
from cag_kernels.largest import LargestOutput, largest_output, largest_output_serves, warm_up_largest
from cag_kernels.linear import (
    FEW_ROWS,
    PackedProduct,
    dot_linear,
    dot_linear_serves,
    dot_product,
    linear_without_packing,
    multiplies_packed,
    packed_linear,
    tile_linear,
    tile_linear_serves,
    tile_product,
    warm_up_linear,
)
from cag_kernels.merge import merge_segments
from cag_kernels.packed import PackedWeight, can_pack, pack_weight
from cag_kernels.prefix import cascade_attention, choose_prefix_path, paged_attention, prefix_attention, rows_stay_apart
from cag_kernels.prefixes import DensePrefix, PagedTails, QuantizedPrefix
from cag_kernels.quantize import Coded, dequantize, dequantize_prefix, quantize, quantize_prefix
from cag_kernels.rans import CodeBlocks, RansSegments, RansSide, count_blocks, decode_segments
from cag_kernels.reference import segment_attention_reference
from cag_kernels.report import prefix_paths
from cag_kernels.rotation import move_keys
from cag_kernels.rows import add_and_norm, gate, rotate_and_store

__all__ = [
    "FEW_ROWS",
    "CodeBlocks",
    "Coded",
    "DensePrefix",
    "LargestOutput",
    "PackedProduct",
    "PackedWeight",
    "PagedTails",
    "QuantizedPrefix",
    "RansSegments",
    "RansSide",
    "add_and_norm",
    "available_paths",
    "can_pack",
    "cascade_attention",
    "choose_path",
    "choose_prefix_path",
    "count_blocks",
    "decode_segments",
    "dequantize",
    "dequantize_prefix",
    "dot_linear",
    "dot_linear_serves",
    "dot_product",
    "gate",
    "has_compiler",
    "has_dots",
    "has_numba",
    "has_tiles",
    "inverse_transform",
    "largest_output",
    "largest_output_serves",
    "linear_without_packing",
    "merge_segments",
    "move_keys",
    "multiplies_packed",
    "pack_weight",
    "packed_linear",
    "paged_attention",
    "prefix_attention",
    "prefix_paths",
    "quantize",
    "quantize_prefix",
    "rotate_and_store",
    "rows_stay_apart",
    "segment_attention",
    "segment_attention_reference",
    "tile_linear",
    "tile_linear_serves",
    "tile_product",
    "vector_lanes",
    "warm_up",
    "warm_up_dots",
    "warm_up_largest",
    "warm_up_linear",
    "warm_up_tails",
    "warm_up_tiles",
]
