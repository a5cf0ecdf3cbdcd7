"""Blobs: texts as they lie on a backend, a checksum and one zstd frame (docs/format.md section 1)."""

from __future__ import annotations

import xxhash
import zstandard

from cag_store.errors import CorruptEntry

MAX_BLOB_BYTES = 256 << 20
MAX_BLOB_FILE_BYTES = MAX_BLOB_BYTES + (MAX_BLOB_BYTES >> 7)
_LEVEL = 9
_CHECKSUM_BYTES = 16
_MAX_WINDOW_BYTES = 8 << 20
_STEP = 1 << 20


def pack_blob(data: bytes) -> bytes:
    """The file of a blob with content `data`."""
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    return xxhash.xxh3_128_digest(frame) + frame


def unpack_blob(file: bytes, where: str) -> bytes:
    """The content; memory grows with it, not with what the frame claims. Raises: CorruptEntry."""
    frame = file[_CHECKSUM_BYTES:]
    if xxhash.xxh3_128_digest(frame) != file[:_CHECKSUM_BYTES]:
        raise CorruptEntry(
            f"{where}: the checksum does not fit: the file is damaged; build the cache again", where=where
        )
    content = bytearray()
    try:
        with zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(frame) as stream:
            while part := stream.read(_STEP):
                content += part
                if len(content) > MAX_BLOB_BYTES:
                    raise CorruptEntry(f"{where}: more than {MAX_BLOB_BYTES} bytes of text", where=where)
    except zstandard.ZstdError as error:
        raise CorruptEntry(f"{where}: {error}", where=where) from error
    return bytes(content)
