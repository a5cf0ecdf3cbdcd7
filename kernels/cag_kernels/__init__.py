"""Attention over an immutable prefix and a growing tail, and products over few rows. Tensors in, tensors out.

This package knows torch (and Triton), and no type of the project. `segment_attention` means what
`reference.segment_attention_reference` says, and `merge_segments` joins the results of several segments;
`packed_linear` multiplies a question's rows by a weight that `pack_weight` laid out for it.
"""

from cag_kernels.attention import available_paths, choose_path, segment_attention
from cag_kernels.cpu import has_compiler, warm_up, warm_up_tiles
from cag_kernels.linear import (
    FEW_ROWS,
    linear_without_packing,
    packed_linear,
    tile_linear,
    tile_linear_serves,
    warm_up_linear,
)
from cag_kernels.merge import merge_segments
from cag_kernels.packed import PackedWeight, can_pack, pack_weight
from cag_kernels.reference import segment_attention_reference

__all__ = [
    "FEW_ROWS",
    "PackedWeight",
    "available_paths",
    "can_pack",
    "choose_path",
    "has_compiler",
    "linear_without_packing",
    "merge_segments",
    "pack_weight",
    "packed_linear",
    "segment_attention",
    "segment_attention_reference",
    "tile_linear",
    "tile_linear_serves",
    "warm_up",
    "warm_up_linear",
    "warm_up_tiles",
]
