"""The text of a chunk's header: a form, filled in (docs/format.md section 3).

A header's bytes follow from its facts and its segment table, and the chunks of a cache share most facts. So who knows
the facts needs to read the table alone, and sees by the header written again that nothing else stands there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

from cag_store.codecs import config_joint_layers, layer_groups
from cag_store.jsontext import canonical_bytes
from cag_store.keys import FORMAT_VERSION, ONE_SIDED_VERSION, ChunkContext

FORMAT = "cag-chunk"
OPENING = b'{"__metadata__":'
ALIGNMENT = 8

_SIDES = ("keys", "values")
_METADATA = b'{"chunk":"%%b","format":"%b","sha256":"%%b","version":"%%d"},' % FORMAT.encode("ascii")
_TABLE = b'\\"segments\\":['
_ROW = re.compile(r',([1-9]\d{0,17}),\\"([0-9a-f]{32})\\"\]', re.ASCII)


class HeaderForm(NamedTuple):
    """What the headers of one context and geometry have in common, with places for the rest. `facts`: key, tokens,
    parent, of each segment raw and encoded bytes and checksum, start. `tensors`: of each segment begin, end and size;
    bytes and number of the token ids. `version` is that of the chunk."""

    facts: str
    tensors: str
    version: int

    def filled(
        self, place: tuple[str, int, str, int], raw: Sequence[int], sizes: Sequence[int], checksums: Sequence[str]
    ) -> bytes:
        """Length prefix and JSON header; `place`: key, tokens, parent, start."""
        *before, start = place
        rows = chain.from_iterable(zip(raw, sizes, checksums, strict=True))
        facts = (self.facts % (*before, *rows, start)).encode("utf-8")
        escaped = facts.replace(b"\\", b"\\\\").replace(b'"', b'\\"')  # no canonical text has control characters
        metadata = _METADATA % (escaped, hashlib.sha256(facts).hexdigest().encode("ascii"), self.version)
        text = b"".join([OPENING, metadata, _tensors(self.tensors, tuple(sizes), place[1]), b"}"])
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text


def header_form(context: ChunkContext, num_kv_heads: Sequence[int], head_dim: Sequence[int]) -> HeaderForm:
    """The form of these headers; the last few are kept."""
    codec = canonical_bytes(context.codec.get("id")).decode("utf-8")
    joint_layers = config_joint_layers(context.codec)
    return _form(context.canonical, codec, joint_layers, context.sides, tuple(num_kv_heads), tuple(head_dim))


def found_rows(header: bytes) -> list[tuple[str, str]]:
    """Encoded bytes and checksum of each row of what looks like a segment table in a header; nothing is verified."""
    begin = header.rfind(_TABLE)
    return _ROW.findall(header[begin : header.find(b"]]", begin) + 1].decode("ascii", "replace"))


@lru_cache(maxsize=4)
def _tensors(form: str, sizes: tuple[int, ...], num_tokens: int) -> bytes:
    """The tensor table; chunks of codes that are not packed have the same one."""
    bounds = list(accumulate(sizes, initial=4 * num_tokens))
    numbers = chain.from_iterable(zip(bounds, bounds[1:], sizes, strict=False))
    return (form % (*numbers, 4 * num_tokens, num_tokens)).encode("ascii")


@lru_cache(maxsize=16)
def _form(
    context: bytes,
    codec: str,
    joint_layers: int,
    sides: int,
    num_kv_heads: tuple[int, ...],
    head_dim: tuple[int, ...],
) -> HeaderForm:
    groups = layer_groups(len(num_kv_heads), joint_layers)
    heads, dims = (canonical_bytes(sizes).decode("ascii") for sizes in (num_kv_heads, head_dim))
    known = context.decode("utf-8").replace("%", "%%")
    row = f'[{codec.replace("%", "%%")},%d,%d,"%s"]'
    facts = (
        f'{{"context":{known},"head_dim":{dims},"key":"%s","num_kv_heads":{heads},"num_layers":{len(num_kv_heads)},'
        f'"num_tokens":%d,"parent":"%s","segments":[{",".join([row] * sides * len(groups))}],"start":%d}}'
    )
    layers = [f"{first:03d}-{last - 1:03d}" if joint_layers > 1 else f"{first:03d}" for first, last in groups]
    names = [
        f"layers.{name}.{side}" for name in layers for side in _SIDES[:sides]
    ]  # in their sorted order, the ids last
    tensors = [f'"{name}":{{"data_offsets":[%d,%d],"dtype":"U8","shape":[%d]}}' for name in names]
    tensors.append('"token_ids":{"data_offsets":[0,%d],"dtype":"U32","shape":[%d]}')
    return HeaderForm(facts, ",".join(tensors), FORMAT_VERSION if sides == 2 else ONE_SIDED_VERSION)
