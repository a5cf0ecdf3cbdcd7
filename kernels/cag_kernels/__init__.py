"""Attention over an immutable prefix and a growing tail. Tensors in, tensors out.

This package knows torch (and Triton), and no type of the project. The public op is `segment_attention`; its meaning is
written down in `reference.segment_attention_reference`, and `merge_segments` joins the results of several segments.
"""

from cag_kernels.attention import available_paths, choose_path, segment_attention
from cag_kernels.cpu import warm_up
from cag_kernels.linear import FEW_ROWS, few_rows_linear, warm_up_linear
from cag_kernels.merge import merge_segments
from cag_kernels.reference import segment_attention_reference

__all__ = [
    "FEW_ROWS",
    "available_paths",
    "choose_path",
    "few_rows_linear",
    "merge_segments",
    "segment_attention",
    "segment_attention_reference",
    "warm_up",
    "warm_up_linear",
]
