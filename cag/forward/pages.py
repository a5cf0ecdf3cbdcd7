"""A pool of pages for the tails of sessions: keys and values of all layers, some tokens a page.

A session owns whole pages and nothing else, so idle ones cost their own tails only. The pool grows by slabs and gives
pages of ended sessions to new ones; when nobody has any, its memory is given back. Knows tensors; knows no prefix.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cag.errors import InsufficientResources
from cag.forward.state import KvShape, SequenceState, sides_of

PAGE_TOKENS = 32
SLAB_PAGES = 16  # 512 tokens

Pages = list[int]


class PagePool:
    """Pages `[num_pages, num_kv_heads, page_tokens, head_dim]`, a layer and side, as `PagedTails` of the kernels wants.

    Page `p` of every layer and side belongs to one session. `take` and `settle` are called by whoever runs the
    model's forwards, one at a time: growing moves the pages. `give_back` may be called from anywhere.

    Attributes:
        version: counts how often the pages have moved; what was recorded over an older one is worth nothing.
        before_moving: told before they move, so that nobody holds the memory that they leave.
        make_room: asked for pages where there is no memory for more; says whether some were given back.
        scratch_page: the page that nobody gets and anybody may write to, None without `has_scratch`.
    """

    def __init__(
        self,
        shapes: list[KvShape],
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_scratch: bool = False,
        kept_bytes: int = 0,
    ) -> None:
        """`kept_bytes`: how much is not given back when nobody has a page, so that it does not move soon again."""
        self.shapes = shapes
        self.version = 0
        self.before_moving: Callable[[PagePool], None] = lambda _pool: None
        self.make_room: Callable[[], bool] = lambda: False
        self.scratch_page = 0 if has_scratch else None
        self._kept_bytes = kept_bytes
        self.page_tokens = PAGE_TOKENS
        self.keys = [
            torch.empty(0, s.num_kv_heads, PAGE_TOKENS, s.head_dim, dtype=dtype, device=device) for s in shapes
        ]
        self.values = [shape.values_beside(keys) for shape, keys in zip(shapes, self.keys, strict=True)]
        self._free: Pages = []  # the last one is the next to be taken: its memory is warm
        self._returned: deque[Pages] = deque()  # appended to without a lock: a finalizer may come at any point

    @property
    def num_pages(self) -> int:
        """Pages that there is memory for."""
        return len(self.keys[0])

    @property
    def num_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free) + sum(len(pages) for pages in list(self._returned))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return sum(shape.width for shape in self.shapes) * self.page_tokens * self.keys[0].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return self.num_pages * self.page_bytes

    def take(self, count: int) -> Pages:
        """`count` pages of any content.

        Raises:
            InsufficientResources: there is no memory for them. Nobody else's pages are touched.
        """
        self._collect()
        while count > len(self._free):
            try:
                self._grow(count - len(self._free))
            except InsufficientResources:
                if not self.make_room():
                    raise
                self._collect()
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Pages) -> None:
        """Pages that are not used any more."""
        self._returned.append(list(pages))

    def settle(self) -> None:
        """Give the memory back, except for one slab and `kept_bytes`, if nobody has a page."""
        self._collect()
        kept = max(SLAB_PAGES, self._kept_bytes // self.page_bytes)
        if self.num_pages > kept and len(self._free) == self.num_pages - self._num_scratch:
            self._free = list(reversed(range(self._num_scratch, kept)))
            with suppress(torch.OutOfMemoryError):  # not enough to copy what is kept: it stays where it is
                self._resize(kept)

    def check_integrity(self, owned: Iterable[Pages]) -> None:
        """Every page is free or has one owner. For tests, and for whoever suspects the pool.

        Args:
            owned: the pages of every session that lives.
        """
        self._collect()
        taken = [page for pages in owned for page in pages]
        every = sorted([*self._free, *taken, *range(min(self._num_scratch, self.num_pages))])
        assert every == list(range(self.num_pages)), f"pages {every} of {self.num_pages}, {len(taken)} of them owned"

    @property
    def _num_scratch(self) -> int:
        return 0 if self.scratch_page is None else 1

    def _collect(self) -> None:
        while self._returned:
            self._free += self._returned.popleft()

    def _grow(self, count: int) -> None:
        """Room for `count` more pages, and for half as many again as there are, so that moving them stays rare."""
        before = self.num_pages
        first = before or self._num_scratch
        slabs = -(-max(count + first - before, before // 2) // SLAB_PAGES)
        try:
            self._resize(before + slabs * SLAB_PAGES)
        except torch.OutOfMemoryError as error:
            raise InsufficientResources(
                f"{count * self.page_tokens} more tokens of sessions take more memory than is free: {error}",
                hint="End other sessions or close a cache, or ask for less.",
            ) from error
        self._free = list(reversed(range(first, self.num_pages))) + self._free

    def _resize(self, num_pages: int) -> None:
        """Move the pages, one layer and side after the other, so that one of them is there twice.

        Raises:
            OutOfMemoryError: for one of them; now all have the pages that are in both sizes.
        """
        self.before_moving(self)
        self.version += 1
        kept = min(num_pages, self.num_pages)
        try:
            for index in range(len(self.shapes)):
                self._replace(index, partial(_moved, num_pages=num_pages))
        except BaseException:
            # each gives room to the next one, as the larger one did before
            for index in reversed(range(len(self.shapes))):
                self._replace(index, partial(_cut, num_pages=kept))
            raise

    def _replace(self, index: int, made: Callable[[Tensor], Tensor]) -> None:
        """Put in the place of a layer's sides what is made of them."""
        is_one = self.values[index] is self.keys[index]
        self.keys[index] = made(self.keys[index])
        self.values[index] = self.keys[index] if is_one else made(self.values[index])


def _moved(side: Tensor, num_pages: int) -> Tensor:
    """New memory for so many pages, with those that there are."""
    moved = side.new_empty(num_pages, *side.shape[1:])
    kept = min(num_pages, len(side))
    moved[:kept] = side[:kept]
    return moved


def _cut(side: Tensor, num_pages: int) -> Tensor:
    """The first pages only; where there is no memory to copy them they keep that of all."""
    if len(side) == num_pages:
        return side
    try:
        return _moved(side, num_pages)
    except torch.OutOfMemoryError:
        return side[:num_pages]


class PagedTail:
    """The tail of one session: pages of a pool in order. They go back when it is closed or no longer used."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: Pages = []
        self._finalizer = weakref.finalize(self, pool.give_back, self.pages)
        self._finalizer.atexit = False

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        return self.pool.page_tokens

    def close(self) -> None:
        """Give the pages back."""
        self._finalizer()
        self.pages.clear()

    def reserve(self, num_tokens: int, used: int) -> None:  # noqa: ARG002  pages keep what is in them
        """Make room for `num_tokens` in all; `used` of them are there."""
        assert self._finalizer.alive, "a closed tail takes no tokens"
        missing = -(-num_tokens // self.page_tokens) - len(self.pages)
        if missing > 0:
            self.pages += self.pool.take(missing)

    def shrink(self, num_tokens: int) -> None:
        """Give back the pages that the first `num_tokens` do not need."""
        needed = -(-num_tokens // self.page_tokens)
        self.pool.give_back(self.pages[needed:])
        del self.pages[needed:]

    def sides(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that `pages` counts in, those of other sessions too."""
        return self.pool.keys[layer], self.pool.values[layer]

    def gathered(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of a layer, `[num_kv_heads, num_tokens, head_dim]`, copied."""
        used = self.pages[: -(-num_tokens // self.page_tokens)]
        pages = torch.tensor(used, dtype=torch.long, device=self.pool.keys[layer].device)
        sides = sides_of(*self.sides(layer))
        whole = [side[pages].transpose(0, 1).flatten(1, 2)[:, :num_tokens] for side in sides]
        return whole[0], whole[-1]

    def store(self, layer: int, place: int, keys: Tensor, values: Tensor) -> None:
        """Put `[num_kv_heads, num_new, head_dim]` at token `place` and behind it."""
        tokens = np.arange(place, place + keys.shape[1])
        device = keys.device
        pages = torch.as_tensor(np.asarray(self.pages)[tokens // self.page_tokens], device=device)
        places = torch.as_tensor(tokens % self.page_tokens, device=device)
        for side, new in zip(sides_of(*self.sides(layer)), (keys, values), strict=False):
            side[pages, :, places] = new.transpose(0, 1).to(side.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of its pages."""
        return len(self.pages) * self.pool.page_bytes


class PagedState(SequenceState):
    """A sequence whose own tokens lie in pages, as those of sessions do."""

    tail: PagedTail
