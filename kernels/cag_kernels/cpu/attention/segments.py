"""Segment attention compiled for this processor: a few rows of query over a long segment held in 16 or 32 bits.

The code is made by LLVM (llvmlite) when a head dimension is first needed and runs on torch's own OpenMP threads, which
are awake from the layer's products. The number of threads does not show in the result's bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cag_kernels.cpu.floats import reads_floats
from cag_kernels.cpu.processor import has_compiler, has_dots, has_tiles, prefers_dots
from cag_kernels.cpu.tape import CompiledStep, float_bits, new_call, scratch_memory
from cag_kernels.prefixes import Codes, QuantizedPrefix, code_bits

if TYPE_CHECKING:
    from cag_kernels.cpu.attention.panel import Blocking

HEAD_DIM_MULTIPLE = 16  # one vector of the widest registers
RANGE_TOKENS = 512  # keys of one piece of parallel work, of whose sums each row has its own
TILE_DEPTH = 32  # of the summed axis of one product of tiles
MAX_HEAD_DIM = 576  # of usual latents; the scratch of a thread stays far below the smallest of usual stacks
MAX_FEW_ROWS = 8  # rows of a single query up to which code of its own pays
MIN_FEW_HEAD_DIM = 32  # two vectors of the widest registers, of which that code turns as many keys
_USUAL_CODES = Codes(8, 8, 64, 64)

Result = tuple[Tensor, Tensor]  # outputs and their log-sum-exps

_lock = threading.Lock()


def cpu_attention_serves(query: Tensor, keys: Tensor) -> bool:
    """Whether `cpu_attention` takes these tensors, with a window or without."""
    return (
        query.device.type == "cpu"
        and (query.dtype == torch.float32 or (keys.dtype == torch.bfloat16 and _meets_rounded(query)))
        and keys.shape[1] > 0
        and query.shape[1] > 0
        and query.shape[2] % HEAD_DIM_MULTIPLE == 0
        and query.shape[2] <= MAX_HEAD_DIM
        and keys.stride()[1:] == (keys.shape[2], 1)
        and not query.requires_grad  # the compiled code knows no gradients
        and has_compiler()
        and reads_floats(keys.dtype)
    )


def attends_in_bfloat16(head_dim: int) -> bool:
    """Whether compiled code takes queries in bfloat16 over such keys here: by tiles, else by products of pairs."""
    return head_dim % TILE_DEPTH == 0 and head_dim <= MAX_HEAD_DIM and (has_tiles() or has_dots())


def _tiles_serve(query: Tensor) -> bool:
    return has_tiles() and _meets_rounded(query)


def _meets_rounded(query: Tensor) -> bool:
    return query.dtype == torch.bfloat16 and attends_in_bfloat16(query.shape[2])


def cpu_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    offset: int,
    window: int | None = None,
    positions: Tensor | None = None,
    softcap: float | None = None,
    into: Result | None = None,
) -> Result:
    """As `reference.segment_attention_reference`, for queries that stand behind the whole segment.

    Takes what `cpu_attention_serves` accepts, without a cap. A float32 query meets widened keys; a bfloat16 query meets
    keys as they are, and weights are rounded to bfloat16 before they meet the values. Accumulates in float32, and gives
    float32, in the tensors of `into` if given (contiguous). Safe to call from several Python threads.

    Args:
        offset: place of query 0, counted from the segment's first key; `offset >= num_keys - 1`. With positions, what
            is added to them.
        window: query `i` sees keys `j` with `place - window < j`; None: all. A query that sees no key gets zeros and
            `-inf`.
        positions: contiguous int32 `[num_queries]`; query `i` stands at place `offset + positions[i]`, not before the
            last key. None: at `offset + i`. Only looked at with a window; a recorded call reads them anew whenever it
            is run.
    """
    assert softcap is None, "no compiled code caps scores"
    assert positions is not None or offset >= keys.shape[1] - 1, "every query stands behind the keys"
    num_q_heads, num_queries, head_dim = query.shape
    rows = num_q_heads // keys.shape[0] if num_queries == 1 else None
    if query.dtype == torch.float32:
        kernel = compiled_kernel(head_dim, rows, window, keys.dtype)
    else:
        kernel = tile_kernel(head_dim, window) if has_tiles() else dot_kernel(head_dim, rows, window)
    values = values if values.stride()[1:] == (head_dim, 1) else values.contiguous()
    return _run(kernel, query, keys, values, scale, _Window(offset, window, positions), into=into)


def quantized_attention_serves(query: Tensor, prefix: QuantizedPrefix) -> bool:
    """Whether `cpu_quantized_attention` takes these tensors, with a window or without; that they fit together is not
    looked at."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and prefix.num_tokens > 0
        and query.shape[1] > 0
        and not query.requires_grad
        and compiles_codes(query.shape[2], _codes(prefix))
        and reads_floats(prefix.exact_keys.dtype)
        and all(side.stride()[1:] == (side.shape[2], 1) for side in (prefix.key_codes, prefix.value_codes))
    )


def compiles_codes(head_dim: int, codes: Codes) -> bool:
    """Whether there is compiled attention over a prefix that is kept like this."""
    vectors = 2 * HEAD_DIM_MULTIPLE if 4 in (codes.key_bits, codes.value_bits) else HEAD_DIM_MULTIPLE
    groups = codes.group_tokens, codes.group_channels
    whole = head_dim % vectors == 0 and not any(size % HEAD_DIM_MULTIPLE for size in groups)
    return whole and head_dim <= MAX_HEAD_DIM and has_compiler()


def cpu_quantized_attention(
    query: Tensor,
    prefix: QuantizedPrefix,
    *,
    scale: float,
    offset: int = 0,
    window: int | None = None,
    positions: Tensor | None = None,
    into: Result | None = None,
) -> Result:
    """As `prefix_reference.prefix_attention_reference` without a cap, for what `quantized_attention_serves`; `offset`,
    `window` and `positions` as in `cpu_attention`.

    A float32 query meets codes by 16-bit integers where `multiplies_codes`: its numbers, times the scales of keys, and
    weights, times those of values, are rounded to 16 bits of the largest of a row, for 64 keys and a group of channels
    at a time; only tokens around exact ones are numbers. Elsewhere codes become numbers a stretch at a time, on the
    stack, with the bits that the store's codecs decode to; then all is as in `cpu_attention`.
    """
    is_behind = window is None or positions is not None or offset >= prefix.num_tokens - 1
    assert is_behind, "every query stands behind the prefix"
    dtype = prefix.exact_keys.dtype
    tiles = dtype == torch.bfloat16 and _tiles_serve(query)
    query = query if tiles else query.float()
    rows = query.shape[0] // prefix.key_codes.shape[0] if query.shape[1] == 1 else None
    kernel = code_kernel(query.shape[2], _codes(prefix), tiles, window, rows, dtype)
    exact = [side.contiguous() for side in (prefix.exact_keys, prefix.exact_values)]
    scales = (prefix.key_scales, prefix.key_offsets, prefix.value_scales, prefix.value_offsets)
    pointers = [tensor.data_ptr() for tensor in (*scales, *exact)]
    codes_fields = (prefix.key_scales.shape[1], exact[0].shape[1], *pointers)
    sides, seen = (prefix.key_codes, prefix.value_codes), _Window(offset, window, positions)
    return _run(kernel, query, *sides, scale, seen, codes_fields, (*scales, *exact), into)


def _codes(prefix: QuantizedPrefix) -> Codes:
    key_bits, value_bits = (code_bits(side) for side in (prefix.key_codes, prefix.value_codes))
    return Codes(key_bits, value_bits, prefix.group_tokens, prefix.group_channels)


class _Window(NamedTuple):
    """Where queries stand, and how far back they see; see `cpu_attention`."""

    offset: int
    window: int | None
    positions: Tensor | None

    def positions_of(self, num_queries: int) -> Tensor:
        """Int32 `[num_queries]`, of any content where there is no window."""
        if self.window is None or self.positions is None:
            return _first_positions(num_queries)
        assert self.positions.dtype == torch.int32 and self.positions.shape == (num_queries,)
        assert self.positions.is_contiguous()
        return self.positions


@lru_cache(maxsize=64)
def _first_positions(num_queries: int) -> Tensor:
    return torch.arange(num_queries, dtype=torch.int32)


def _run(
    kernel: CompiledKernel,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    seen: _Window,
    codes_fields: tuple[int, ...] = (),
    codes_memory: tuple[Tensor, ...] = (),
    into: Result | None = None,
) -> Result:
    num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys, _ = keys.shape
    num_rows = num_q_heads // num_kv_heads * num_queries
    num_lanes = -(-num_rows // kernel.blocking.lanes) * kernel.blocking.lanes
    num_ranges = -(-num_keys // kernel.blocking.range_tokens)
    query = query.contiguous()
    if into is None:
        into = torch.empty_like(query, dtype=torch.float32), torch.empty(num_q_heads, num_queries, dtype=torch.float32)
    out, logsumexps = into
    num_tasks = num_kv_heads * num_ranges
    counts = (num_kv_heads * head_dim, num_tasks, num_tasks, num_tasks * head_dim, 1)  # of num_lanes numbers each
    scratch = scratch_memory(sum(counts) * num_lanes)
    *places, first_keys = (scratch.data_ptr() + 4 * num_lanes * sum(counts[:index]) for index in range(5))
    positions = seen.positions_of(num_queries)
    window_fields = (positions.data_ptr(), first_keys, num_queries, seen.offset, seen.window or 0, 0)
    sizes = (num_kv_heads, num_keys, num_rows, num_lanes, num_ranges, keys.stride(0), values.stride(0))
    pointers = (*(tensor.data_ptr() for tensor in (query, keys, values)), *places, out.data_ptr())
    fields = (0, *pointers, logsumexps.data_ptr(), *sizes, float_bits(scale), *window_fields, *codes_fields)
    kernel.run(fields, num_tasks, (query, keys, values, scratch, out, logsumexps, positions, *codes_memory))
    return out, logsumexps


def warm_up(
    head_dims: Iterable[int],
    group_sizes: Iterable[int] = (),
    windows: Iterable[int | None] = (None,),
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Compile what calls with these head dimensions and windows over keys of a type need; nothing where that cannot be.

    Each of `group_sizes` query heads a key/value head has code of its own for a single query.
    """
    kinds = list(product((None, *group_sizes), windows))
    for head_dim in head_dims:
        fits = head_dim % HEAD_DIM_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM
        if fits and has_compiler() and reads_floats(dtype):
            for group_size, window in kinds:
                compiled_kernel(head_dim, group_size, window, dtype)


def warm_up_dots(
    head_dims: Iterable[int], group_sizes: Iterable[int] = (), windows: Iterable[int | None] = (None,)
) -> None:
    """Compile what bfloat16 queries and blocks need where there are products of pairs and no tiles; as `warm_up`."""
    if prefers_dots():
        from cag_kernels.cpu.products.dot_linear import compiled_kernel as linear_kernel

        linear_kernel()
        kinds = list(product((None, *group_sizes), windows))
        for head_dim in filter(attends_in_bfloat16, head_dims):
            for group_size, window in kinds:
                dot_kernel(head_dim, group_size, window)


def warm_up_tiles(head_dims: Iterable[int], windows: Iterable[int | None] = (None,)) -> None:
    """Compile what bfloat16 queries and blocks with these head dimensions and windows need; nothing where there are no
    tiles."""
    if has_tiles():
        from cag_kernels.cpu.products.tile_linear import compiled_kernel as linear_kernel

        linear_kernel()
        kinds = list(windows)
        for head_dim in head_dims:
            if head_dim % TILE_DEPTH == 0 and head_dim <= MAX_HEAD_DIM:
                for window in kinds:
                    tile_kernel(head_dim, window)


class CompiledKernel:
    """Machine code of a module with `prepare`, `attend` and `finish` for one head dimension, run on several threads;
    with `shares` also the first and the last, which must be made for it. `build(*arguments)` emits the module."""

    def __init__(self, blocking: Blocking, build: Callable[..., Any], *arguments: object, shares: bool = False) -> None:
        from cag_kernels.cpu.program import Program

        self.blocking, self._shares = blocking, shares
        program = Program(build, *arguments)
        self._prepare, self._attend, self._finish = (
            CompiledStep(program.address(name), program) for name in ("prepare", "attend", "finish")
        )

    def run(self, fields: tuple[int, ...], num_tasks: int, memory: tuple[Tensor, ...]) -> None:
        """Serve one call; `fields` are `cpu.attention.call.Field` in order, `memory` is what their addresses are of."""
        call = new_call(fields, memory)
        for step, is_shared in ((self._prepare, self._shares), (self._attend, True), (self._finish, self._shares)):
            call[0] = 0  # the counter: a tape sets it back by itself
            if is_shared:
                step.shared(call, num_tasks)
            else:
                step.alone(call)


def compiled_kernel(
    head_dim: int,
    single_query_rows: int | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> CompiledKernel:
    """The kernel of a head dimension over keys of a type, compiled once a process; for one query of that many rows, or
    for any number; with a window of that size, or without."""
    few_rows = _few_rows(head_dim, single_query_rows, window)
    with _lock:
        return _compile(head_dim, few_rows, None, window is not None, False, dtype)


def dot_kernel(head_dim: int, single_query_rows: int | None = None, window: int | None = None) -> CompiledKernel:
    """As `compiled_kernel`, for bfloat16 queries by products of pairs."""
    few_rows = _few_rows(head_dim, single_query_rows, window)
    with _lock:
        return _compile_dots(head_dim, few_rows, window is not None)


def _few_rows(head_dim: int, single_query_rows: int | None, window: int | None) -> int | None:
    """The rows of a single query, if code of their own serves them."""
    few = single_query_rows is not None and single_query_rows <= MAX_FEW_ROWS and head_dim >= MIN_FEW_HEAD_DIM
    # a window would begin in the midst of a tile of keys, and a row's bits go by tiles
    return single_query_rows if few and window is None else None


def tile_kernel(head_dim: int, window: int | None = None) -> CompiledKernel:
    """The kernel of a head dimension for bfloat16 queries, compiled once a process."""
    with _lock:
        return _tiles_for(head_dim, None, window)


def code_kernel(
    head_dim: int,
    codes: Codes,
    tiles: bool,
    window: int | None = None,
    single_query_rows: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> CompiledKernel:
    """The kernel for a prefix in codes with exact numbers of a type, for bfloat16 queries if `tiles`, else for float32
    ones, then for one query of that many rows, or for any number; compiled once."""
    with _lock:
        if tiles:
            return _tiles_for(head_dim, codes, window)
        by_integers = multiplies_codes(codes)
        few_rows = _few_rows(head_dim, single_query_rows, window)
        if by_integers and not _few_codes_serve(head_dim, codes):
            few_rows = None
        return _compile(head_dim, few_rows, codes, window is not None, by_integers, dtype)


def _few_codes_serve(head_dim: int, codes: Codes) -> bool:
    from cag_kernels.cpu.attention.few_codes import few_codes_serve
    from cag_kernels.cpu.attention.panel import host_blocking

    return few_codes_serve(head_dim, codes, host_blocking())


def multiplies_codes(codes: Codes) -> bool:
    """Whether a float32 query meets such codes by 16-bit integers: where the processor has such products and no tiles
    of bfloat16, and groups of keys are whole tiles of them."""
    from cag_kernels.cpu.attention.panel import host_blocking
    from cag_kernels.cpu.pairs import pairs_win

    return codes.group_tokens % host_blocking().tile == 0 and pairs_win(host_blocking().lanes) and not has_tiles()


def codes_arithmetic() -> str:
    """How compiled code attends to codes here, for reports; needs a compiler."""
    by_integers = multiplies_codes(_USUAL_CODES)
    return "by 16-bit integers" if by_integers else "dequantized a stretch at a time"


def attention_kernel(
    head_dim: int,
    blocking: Blocking,
    few_rows: int | None = None,
    codes: Codes | None = None,
    has_window: bool = False,
    by_integers: bool = False,
    kept: torch.dtype = torch.bfloat16,
    by_dots: bool = False,
) -> CompiledKernel:
    """Of a module as `loops.attention_module` says."""
    from cag_kernels.cpu.attention.loops import attention_module, shares_ends

    arguments = head_dim, blocking, few_rows, codes, has_window, by_integers, kept, by_dots
    return CompiledKernel(blocking, attention_module, *arguments, shares=shares_ends(blocking))


@cache
def _compile(
    head_dim: int, few_rows: int | None, codes: Codes | None, has_window: bool, by_integers: bool, dtype: torch.dtype
) -> CompiledKernel:
    from cag_kernels.cpu.attention.panel import host_blocking

    return attention_kernel(head_dim, host_blocking(), few_rows, codes, has_window, by_integers, dtype)


@cache
def _compile_dots(head_dim: int, few_rows: int | None, has_window: bool) -> CompiledKernel:
    from cag_kernels.cpu.attention.panel import host_blocking
    from cag_kernels.cpu.dots import require_dots

    require_dots()
    return attention_kernel(head_dim, host_blocking(), few_rows, has_window=has_window, by_dots=True)


def _tiles_for(head_dim: int, codes: Codes | None, window: int | None) -> CompiledKernel:
    from cag_kernels.cpu.attention.tile_segments import SHORT_BLOCKING, SHORT_WINDOW, TILE_BLOCKING

    is_short = window is not None and window <= SHORT_WINDOW
    return _compile_tiles(head_dim, codes, SHORT_BLOCKING if is_short else TILE_BLOCKING, window is not None)


@cache
def _compile_tiles(head_dim: int, codes: Codes | None, blocking: Blocking, has_window: bool) -> CompiledKernel:
    from cag_kernels.cpu.attention.tile_segments import tile_attention_module
    from cag_kernels.cpu.tiles import require_tiles

    require_tiles()
    return CompiledKernel(blocking, tile_attention_module, head_dim, codes, blocking, has_window)
