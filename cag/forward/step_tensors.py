"""What a forward of several sequences needs besides its weights, as tensors on the model's device.

All of it goes there in one copy: token ids, positions, where each row's keys and values go, the pages and lengths of
each sequence. The memory may stay from step to step and be larger than a step needs: then rows and sequences behind
the real ones are filled with ones that touch a scratch page only. Knows batches; knows no network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cag.forward.state import AttentionRule, sides_of
from cag_kernels import PagedTails

if TYPE_CHECKING:
    from cag.forward.batch import Batch

NUM_ARRIVALS = 128  # key/value heads for which an attention may count its programs
LONGS = ("ids", "positions", "row_pages", "row_places", "wanted")  # what torch indexes with is int64


@dataclass(frozen=True, order=True)
class StepSizes:
    """Rows, sequences, pages a sequence, most rows of one sequence, and rows whose logits are wanted."""

    num_rows: int
    num_sequences: int
    num_pages: int
    max_rows: int
    num_wanted: int

    @classmethod
    def of(cls, batch: Batch, num_wanted: int) -> StepSizes:
        """What a batch has, nothing more."""
        return cls(batch.num_rows, batch.num_sequences, batch.pages.shape[1], max(batch.counts), num_wanted)


class StepState(ABC):
    """What the rows of a step attend to: their own tokens in pages, and what stands before them.

    `tensors` are those of the step.
    """

    tensors: StepTensors

    @abstractmethod
    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """The pages of a layer, keys and values."""

    @abstractmethod
    def attend_stored(self, layer: int, query: Tensor, rule: AttentionRule, sinks: Tensor | None = None) -> Tensor:
        """Attend; the keys and values of all rows are in their pages."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        stores: bool = True,
    ) -> Tensor:
        """Store the keys and values of all rows, `[num_kv_heads, num_rows, head_dim]`, and attend; see
        `cag.forward.state.SequenceState.attend`."""
        if stores:
            for side, new in zip(sides_of(*self.sides(layer)), (keys, values), strict=False):
                side[self.tensors.row_pages, :, self.tensors.row_places] = new.transpose(0, 1).to(side.dtype)
        return self.attend_stored(layer, query, AttentionRule(scale, window, softcap), sinks)


class StepTensors:
    """The tensors of a step of `sizes`: int64 `ids`, `positions`, `row_pages`, `row_places` `[num_rows]` and `wanted
    [num_wanted]`; int32 `pages [num_sequences, num_pages]`, `lengths [num_sequences]`, `starts [num_sequences + 1]`.
    `arrivals`: int32 zeros in which the attentions of the step count, one behind the other.

    `fill` may be called again: what was filled in before must have been used by then in the order of the device's
    work, which the caller's stream keeps; the host's copy is waited for.
    """

    def __init__(self, sizes: StepSizes, device: torch.device) -> None:
        self.sizes = sizes
        on_gpu = device.type == "cuda"
        rows, sequences = sizes.num_rows, sizes.num_sequences
        shapes: dict[str, tuple[int, ...]] = {name: (sizes.num_wanted if name == "wanted" else rows,) for name in LONGS}
        shapes |= {"pages": (sequences, sizes.num_pages), "lengths": (sequences,), "starts": (sequences + 1,)}
        shapes["arrivals"] = (NUM_ARRIVALS,)
        places, total = {}, 0
        for name, shape in shapes.items():
            places[name] = total
            total += int(np.prod(shape)) * (8 if name in LONGS else 4)
        self._host = torch.zeros(-(-total // 8), dtype=torch.int64, pin_memory=on_gpu)
        self._device = torch.zeros_like(self._host, device=device) if on_gpu else self._host
        self._copied: torch.cuda.Event | None = None
        if on_gpu:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrays = {name: _view(self._host, places[name], shape, name).numpy() for name, shape in shapes.items()}
        found = {name: _view(self._device, places[name], shape, name) for name, shape in shapes.items()}
        self.ids, self.positions, self.wanted = found["ids"], found["positions"], found["wanted"]
        self.row_pages, self.row_places = found["row_pages"], found["row_places"]
        self.pages, self.lengths, self.starts = found["pages"], found["lengths"], found["starts"]
        self.arrivals = found["arrivals"]

    def fill(self, ids: Tensor, batch: Batch, wanted: Sequence[int], scratch_page: int = 0) -> None:
        """Put a batch of at most these sizes there, `ids [num_rows]` on the CPU, and start the copy to the device.

        Where there are more rows than the batch has, they are token 0 of further sequences, whose only pages are
        `scratch_page`, behind the prefix of the first. With one row a sequence each has its own, else one has all.
        """
        if self._copied is not None:
            self._copied.synchronize()
        arrays, rows, sequences = self._arrays, batch.num_rows, batch.num_sequences
        arrays["ids"][:rows] = ids.numpy()
        arrays["positions"][:rows] = batch.row_positions
        arrays["row_pages"][:rows], arrays["row_places"][:rows] = batch.row_pages, batch.row_places
        arrays["wanted"][: len(wanted)], arrays["wanted"][len(wanted) :] = wanted, 0
        arrays["pages"][:sequences, : batch.pages.shape[1]] = batch.pages
        arrays["lengths"][:sequences], arrays["starts"][: sequences + 1] = batch.lengths, batch.starts
        if self.sizes.num_rows > rows or self.sizes.num_sequences > sequences:
            self._pad(batch, scratch_page)
        if self._copied is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._copied.record()

    def tails(self, keys: Tensor, values: Tensor) -> PagedTails:
        """The sequences' own tokens in a layer's pages."""
        return PagedTails(keys, values, self.pages, self.lengths, self.starts, self.sizes.max_rows)

    def _pad(self, batch: Batch, scratch_page: int) -> None:
        rows, sequences = batch.num_rows, batch.num_sequences
        more_rows, more_sequences = self.sizes.num_rows - rows, self.sizes.num_sequences - sequences
        assert more_rows == 0 or more_sequences > 0, "rows behind the batch need a sequence of their own"
        counts = np.zeros(more_sequences, dtype=np.int32)
        if self.sizes.max_rows == 1:
            counts[:more_rows] = 1
        elif more_sequences:
            counts[0] = more_rows
        tokens = np.concatenate([np.arange(count) for count in counts]) if more_rows else np.zeros(0, np.int64)
        page_tokens, arrays = batch.page_tokens, self._arrays
        arrays["ids"][rows:] = 0
        arrays["positions"][rows:] = batch.states[0].num_prefix + tokens
        arrays["row_pages"][rows:], arrays["row_places"][rows:] = scratch_page, tokens % page_tokens
        arrays["pages"][sequences:], arrays["lengths"][sequences:] = scratch_page, counts
        arrays["starts"][sequences + 1 :] = rows + np.cumsum(counts)


def _view(memory: Tensor, first_byte: int, shape: tuple[int, ...], name: str) -> Tensor:
    """A part of `memory`, int64 or int32."""
    dtype = torch.int64 if name in LONGS else torch.int32
    count = int(np.prod(shape))
    first = first_byte // dtype.itemsize
    return memory.view(dtype)[first : first + count].view(shape)
