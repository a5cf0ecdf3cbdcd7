"""Registry and factory of codecs. A third party adds one through the entry point group `cag.codecs` (name = id,
object = class)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any, TypeVar

from cag_store.codecs.base import (
    BulkDecoder,
    Codec,
    Config,
    Configured,
    EncodedSegment,
    Packer,
    RawSegments,
    Resources,
    Side,
    Transform,
    config_joint_layers,
    config_resources,
    layer_groups,
)
from cag_store.codecs.coded import CodedShape, CodedSide
from cag_store.codecs.int4 import Int4
from cag_store.codecs.int8 import Int8
from cag_store.codecs.loops import warm_up
from cag_store.codecs.lossless import Lossless
from cag_store.codecs.packers import Zstd
from cag_store.codecs.ranks import Ranks
from cag_store.codecs.streams import StreamChunk, StreamShape, StreamSide
from cag_store.codecs.transform import JointTransform
from cag_store.codecs.transforms import Rotate
from cag_store.errors import UnknownCodec

__all__ = [
    "BulkDecoder",
    "Codec",
    "CodedShape",
    "CodedSide",
    "Config",
    "EncodedSegment",
    "Int4",
    "Int8",
    "JointTransform",
    "Lossless",
    "Packer",
    "Ranks",
    "RawSegments",
    "Resources",
    "Rotate",
    "Side",
    "StreamChunk",
    "StreamShape",
    "StreamSide",
    "Transform",
    "Zstd",
    "codec_from_config",
    "codec_ids",
    "config_joint_layers",
    "config_resources",
    "layer_groups",
    "packer_from_config",
    "transform_from_config",
    "warm_up",
]

ENTRY_POINT_GROUP = "cag.codecs"

Kind = TypeVar("Kind", bound=Configured)

_CODECS: dict[str, type[Codec]] = {codec.codec_id: codec for codec in (Lossless, Int8, Int4, JointTransform)}
_TRANSFORMS: dict[str, type[Transform]] = {Rotate.codec_id: Rotate}
_PACKERS: dict[str, type[Packer]] = {packer.codec_id: packer for packer in (Zstd, Ranks)}


def codec_from_config(config: Mapping[str, Any] | str, resources: Resources | None = None) -> Codec:
    """The codec of a configuration, or of a bare id with all defaults.

    A codec that names blobs can encode and decode only with `resources`, which fetches them.
    Raises: UnknownCodec; EntryNotFound and CorruptEntry for a blob.
    """
    config = {"id": config} if isinstance(config, str) else config
    codec_id = _codec_id(config)
    found = _CODECS.get(codec_id) or _third_party(codec_id)
    if found is None:
        raise _unknown("codec", codec_id, _CODECS)
    codec = _built(found, config)
    return codec if resources is None else codec.with_resources(resources)


def transform_from_config(config: Mapping[str, Any]) -> Transform:
    """The transform of a configuration. Raises: UnknownCodec."""
    codec_id = _codec_id(config)
    if codec_id not in _TRANSFORMS:
        raise _unknown("transform", codec_id, _TRANSFORMS)
    return _built(_TRANSFORMS[codec_id], config)


def packer_from_config(config: Mapping[str, Any]) -> Packer:
    """The packer of a configuration. Raises: UnknownCodec."""
    codec_id = _codec_id(config)
    if codec_id not in _PACKERS:
        raise _unknown("packer", codec_id, _PACKERS)
    return _built(_PACKERS[codec_id], config)


def codec_ids() -> list[str]:
    """Ids of all codecs that can be built here, third-party ones included."""
    return sorted({*_CODECS, *(point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP))})


def _codec_id(config: Mapping[str, Any]) -> str:
    codec_id = config.get("id") if isinstance(config, Mapping) else None
    if not isinstance(codec_id, str):
        raise UnknownCodec(f"a codec configuration is an object with an id, found {config!r:.130}")
    return codec_id


def _built(found: type[Kind], config: Mapping[str, Any]) -> Kind:
    return found.from_config({key: value for key, value in config.items() if key != "id"})


def _third_party(codec_id: str) -> type[Codec] | None:
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=codec_id):
        loaded = point.load()
        if not (isinstance(loaded, type) and issubclass(loaded, Codec)):
            raise UnknownCodec(f"entry point {point.value!r} of {codec_id!r} is not a Codec", found=codec_id)
        return loaded
    return None


def _unknown(kind: str, codec_id: str, known: Mapping[str, object]) -> UnknownCodec:
    hint = f"known: {', '.join(sorted(known))}; others come with packages that register under {ENTRY_POINT_GROUP!r}"
    return UnknownCodec(f"no {kind} is called {codec_id!r:.130}; {hint}", found=codec_id)
