"""A content-addressed store of compressed key/value caches: arrays <-> bytes on disk. Knows numpy;
no model, no tensor library."""

from cag_store.chunk import ChunkEntry, ChunkHeader
from cag_store.codecs import Codec, codec_from_config, codec_ids, config_resources
from cag_store.dtypes import STORAGE_DTYPES, storage_dtype
from cag_store.gc import GcReport
from cag_store.keys import FORMAT_VERSION, ROOT, ChunkContext, chunk_key
from cag_store.manifest import DocumentEntry, KVGeometry, Manifest, ModelIdentity, utc_after, utc_now
from cag_store.paths import object_paths
from cag_store.pipeline import LoadTimings
from cag_store.quota import Eviction
from cag_store.reader import CacheReader
from cag_store.ref import Ref, checked_name
from cag_store.store import Store
from cag_store.usage import CacheUsage, StoreUsage
from cag_store.verify import VerifyReport

__all__ = [
    "FORMAT_VERSION",
    "ROOT",
    "STORAGE_DTYPES",
    "CacheReader",
    "CacheUsage",
    "ChunkContext",
    "ChunkEntry",
    "ChunkHeader",
    "Codec",
    "DocumentEntry",
    "Eviction",
    "GcReport",
    "KVGeometry",
    "LoadTimings",
    "Manifest",
    "ModelIdentity",
    "Ref",
    "Store",
    "StoreUsage",
    "VerifyReport",
    "checked_name",
    "chunk_key",
    "codec_from_config",
    "codec_ids",
    "config_resources",
    "object_paths",
    "storage_dtype",
    "utc_after",
    "utc_now",
]
