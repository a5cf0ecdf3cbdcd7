"""One prefix between buffers and store: its keys and values in the sequence that computes them, its chunks on disk.

Chunks of any codec are written from the buffers and read back into them, so several codecs can be tried with one copy
of the cache in memory. Knows no documents and no manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

import cag_store
from cag.building.snapshots import Snapshots
from cag.forward.recurrent import States
from cag.forward.state import WholeState, sides_of
from cag.identity import check_weights
from cag.model import LanguageModel
from cag.prefill import BLOCK_TOKENS, prefill
from cag.residency.buffers import HostBuffers, storage_view
from cag.residency.resident import ResidentPrefix
from cag_kernels import DensePrefix
from cag_store import ChunkContext, ChunkEntry, ChunkHeader, Store
from cag_store.errors import CorruptEntry, EntryNotFound


@dataclass
class PrefixChunks:
    """A prefix of `token_ids` `[num_tokens]`, whose keys and values are in the tail of `state`.

    Call it inside a build lease of the store: chunks are used that no manifest holds.
    """

    model: LanguageModel
    store: Store
    token_ids: NDArray[np.int64]
    state: WholeState
    snapshots: Snapshots = field(init=False)

    def __post_init__(self) -> None:
        self.snapshots = Snapshots(self.model, self.store, self.num_tokens, BLOCK_TOKENS)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prefix."""
        return len(self.token_ids)

    @property
    def resident(self) -> ResidentPrefix:
        """The prefix as sequences stand behind it; it has whatever the buffers hold."""
        prefix = ResidentPrefix.from_tail(self.state.tail, self.token_ids)
        prefix.recurrent = self.snapshots.last()
        return prefix

    def resident_start(self, num_tokens: int, states: States) -> ResidentPrefix:
        """The first `num_tokens` tokens of the prefix, as sequences stand behind them, with what recurrent layers know
        there."""
        tail = self.state.tail
        pairs = (tail.gathered(layer, num_tokens) for layer in range(len(tail.shapes)))
        segments = [(DensePrefix(*pair),) for pair in pairs]
        prefix = ResidentPrefix(segments, self.token_ids[:num_tokens])
        prefix.recurrent = states
        prefix.mark_loaded()
        return prefix

    def context(self, codec: dict[str, Any]) -> ChunkContext:
        """What decides the chunks' bytes besides the tokens, with the full configuration of a codec."""
        model = self.model
        return ChunkContext(
            model_fingerprint=model.fingerprints.weights,
            adapter_fingerprint=model.fingerprints.adapter,
            rope=model.rope,
            dtype=str(model.kv_dtype).removeprefix("torch."),
            compute_dtype=str(model.compute_dtype).removeprefix("torch."),
            codec=codec,
            chunk_tokens=BLOCK_TOKENS,
            sides=model.kv_shapes[0].sides,
        )

    def keys(self, context: ChunkContext) -> list[str]:
        """The keys of all chunks; they are known before anything is computed."""
        keys = [cag_store.ROOT]
        for start in range(0, self.num_tokens, context.chunk_tokens):
            keys.append(cag_store.chunk_key(keys[-1], self.token_ids[start : start + context.chunk_tokens], context))
        return keys[1:]

    def stored(self, context: ChunkContext) -> list[ChunkEntry]:
        """The chunks that the store has whole, from the beginning to the first that is missing."""
        found: list[ChunkEntry] = []
        for key in self.keys(context):
            try:
                found.append(self.store.chunk_entry(key))
            except (EntryNotFound, CorruptEntry):  # a damaged chunk was removed by the store: it is made again
                break
        return found

    def take_over(self, entries: Sequence[ChunkEntry], context: ChunkContext) -> None:
        """Begin the sequence with the tokens of `entries`."""
        if entries:
            self.load(entries, context)
            self.snapshots.take_over(self.state, sum(entry.num_tokens for entry in entries))

    def compute(self, on_block: Callable[[int], None]) -> None:
        """Prefill what the sequence does not hold yet; `on_block(start)` after each block, with its first token."""
        first = self.state.num_tail
        rest = self.token_ids[first:].tolist()
        if rest:
            prefill(self.model, self.state, rest, on_block=lambda start, _: on_block(first + start))

    def put(self, context: ChunkContext, parent: str, start: int) -> ChunkEntry:
        """Store the chunk of the tokens from `start` on, from what the buffers hold, unless it is there already.
        Raises: ModelError: the weights that gave them are others by now."""
        check_weights(self.model)
        end = min(start + context.chunk_tokens, self.num_tokens)
        header = ChunkHeader(
            key=cag_store.chunk_key(parent, self.token_ids[start:end], context),
            parent=parent,
            start=start,
            num_tokens=end - start,
            num_kv_heads=tuple(shape.num_kv_heads for shape in self.model.kv_shapes),
            head_dim=tuple(shape.head_dim for shape in self.model.kv_shapes),
            context=context,
        )
        return self.store.put_chunk(header, self._views(start, end), self.token_ids[start:end])

    def load(self, entries: Sequence[ChunkEntry], context: ChunkContext) -> None:
        """Decode `entries` into the buffers."""
        tail = self.state.tail
        with self.store.chunk_reader(entries, context) as reader:
            layers = list(zip(tail.keys, tail.values, strict=True))
            host = HostBuffers(layers, through_host=self.model.device.type != "cpu")
            reader.load(host.views(), host.arrived)
            host.finish()

    def decoded_keys(self, codec: dict[str, Any], layer: int) -> Tensor:
        """Keys of one layer as a codec of one layer a segment gives them back, `[num_kv_heads, num_tokens, head_dim]`
        on the CPU; nothing is stored."""
        context, ready = self.context(codec), self.store.codec(codec)
        decoded = self.state.tail.keys[layer][:, : self.num_tokens].cpu().clone()
        keys = storage_view(decoded)
        for start in range(0, self.num_tokens, context.chunk_tokens):
            part = keys[:, start : start + context.chunk_tokens]
            data = ready.encode_layers([part], context.dtype, "keys", layer, start)
            ready.decode_layers_into(data, [part], "keys", layer, start)
        return decoded

    def checksum(self) -> str:
        """Of all keys and values that the buffers hold."""
        digest = xxhash.xxh3_128()
        for sides in self._views(0, self.num_tokens):
            for array in sides:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _views(self, start: int, end: int) -> Iterator[tuple[Any, ...]]:
        """Host views of tokens `[start, end)` of each layer's buffers, one a side, one layer at a time."""
        for sides in zip(self.state.tail.keys, self.state.tail.values, strict=True):
            yield tuple(storage_view(side[:, start:end].cpu()) for side in sides_of(*sides))
