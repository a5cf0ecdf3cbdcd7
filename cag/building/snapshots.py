"""Snapshots of recurrent layers in a build: which are kept, where it can go on, and what becomes of them.

They stand behind chunks of exact keys and values, at sparse places (docs/design/021-recurrent-layers.md). For a model
without recurrent layers there are none, and everything here gives back what it was given. Knows no documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cag.forward.recurrent import States
from cag.forward.state import SequenceState
from cag.model import LanguageModel
from cag.residency.recurrent import loaded_states, stored_states
from cag_store import CacheStates, ChunkEntry, StateEntry, Store
from cag_store.errors import CorruptEntry, EntryNotFound


@dataclass
class Snapshots:
    """The snapshots of one prefix of `num_tokens` tokens; `entries` are those in the store, by place."""

    model: LanguageModel
    store: Store
    num_tokens: int
    chunk_tokens: int
    entries: dict[int, StateEntry] = field(default_factory=dict)

    def places(self) -> list[int]:
        """Behind which tokens of the prefix there are to be snapshots; none without recurrent layers."""
        layers = self.model.recurrent
        if layers is None:
            return []
        return list(layers.places(self.num_tokens, self.model.kv_bytes_per_token, self.chunk_tokens))

    def resumable(self, chunks: Sequence[ChunkEntry]) -> list[ChunkEntry]:
        """As many of the first `chunks` of the prefix as a build can go on behind: all, or up to the last of them that
        has a snapshot."""
        if self.model.recurrent is None:
            return list(chunks)
        places, ends = set(self.places()), {chunk.start + chunk.num_tokens: chunk for chunk in chunks}
        for place in sorted(places & set(ends)):
            try:
                self.entries[place] = self.store.state_entry(ends[place].key)
            except (EntryNotFound, CorruptEntry):  # a damaged one was removed by the store: it is made again
                continue
        last = max(self.entries, default=0)
        return [chunk for chunk in chunks if chunk.start < last]

    def take_over(self, state: SequenceState, num_tokens: int) -> None:
        """Let `state` go on behind its first `num_tokens` tokens, whose keys and values it has."""
        if self.model.recurrent is not None:
            state.stage(self._loaded(num_tokens))
        state.finish(num_tokens)

    def keep(self, states: States, chunk: ChunkEntry) -> None:
        """Store what recurrent layers know behind `chunk`, if there is to be a snapshot."""
        place = chunk.start + chunk.num_tokens
        if place in self.places():
            self.entries[place] = self.store.put_states(chunk.key, place, stored_states(states))

    def last(self) -> States:
        """What the recurrent layers know behind the prefix, as a reader will get it."""
        return {} if self.model.recurrent is None else self._loaded(self.num_tokens)

    def listed(self, codec: Mapping[str, Any], *, all_places: bool) -> CacheStates | None:
        """What a manifest says of them; `codec` is that of the exact chunks. Without those an update has no use for
        `all_places`: the last one is enough."""
        if self.model.recurrent is None:
            return None
        entries = [self.entries[place] for place in sorted(self.entries)]
        return CacheStates(codec, tuple(entries if all_places else entries[-1:]))

    def are_stored(self, states: CacheStates | None) -> bool:
        """Whether the store has the snapshots of a cache whole."""
        try:
            snapshots = () if states is None else states.snapshots
            return all(self.store.state_entry(entry.chunk) == entry for entry in snapshots)
        except (EntryNotFound, CorruptEntry):
            return False

    def _loaded(self, place: int) -> States:
        layers = self.model.recurrent
        assert layers is not None
        return loaded_states(self.store.states(self.entries[place]), layers, self.model.device)
