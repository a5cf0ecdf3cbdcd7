"""A content-addressed store of compressed key/value caches: arrays <-> bytes on disk. Knows numpy;
no model, no tensor library."""

from cag_store.backends import is_url
from cag_store.backends.object_cache import DEFAULT_CACHE_BYTES, PieceCache
from cag_store.chunk import ChunkEntry, ChunkHeader
from cag_store.codecs import Codec, codec_from_config, codec_ids, config_resources
from cag_store.dtypes import STORAGE_DTYPES, storage_dtype
from cag_store.gc import GcReport
from cag_store.keys import FORMAT_VERSION, ROOT, ChunkContext, chunk_key
from cag_store.manifest import DocumentEntry, KVGeometry, Manifest, ModelIdentity, utc_after, utc_now, utc_text
from cag_store.paths import object_paths
from cag_store.pipeline import LoadTimings
from cag_store.quota import Eviction
from cag_store.reader import CacheReader
from cag_store.ref import Ref, checked_name
from cag_store.state_entry import CacheStates, StateEntry
from cag_store.states import StateArray, check_states
from cag_store.store import Store
from cag_store.transfer import CopyReport, copy_cache, only_name
from cag_store.usage import CacheUsage, StoreUsage
from cag_store.verify import VerifyReport

__all__ = [
    "DEFAULT_CACHE_BYTES",
    "FORMAT_VERSION",
    "ROOT",
    "STORAGE_DTYPES",
    "CacheReader",
    "CacheStates",
    "CacheUsage",
    "ChunkContext",
    "ChunkEntry",
    "ChunkHeader",
    "Codec",
    "CopyReport",
    "DocumentEntry",
    "Eviction",
    "GcReport",
    "KVGeometry",
    "LoadTimings",
    "Manifest",
    "ModelIdentity",
    "PieceCache",
    "Ref",
    "StateArray",
    "StateEntry",
    "Store",
    "StoreUsage",
    "VerifyReport",
    "check_states",
    "checked_name",
    "chunk_key",
    "codec_from_config",
    "codec_ids",
    "config_resources",
    "copy_cache",
    "is_url",
    "object_paths",
    "only_name",
    "storage_dtype",
    "utc_after",
    "utc_now",
    "utc_text",
]
