"""The errors of the engine, and the one table that maps them to exit codes and HTTP statuses.

CagError
├── UsageError (ValueError)                 bad argument, name or combination of options
├── ModelError
│   ├── ModelNotFound (LookupError)         no catalogue entry, hub id or directory of that name
│   ├── DownloadFailed (OSError)            a source could not be reached or broke off
│   ├── HashMismatch (ValueError)           downloaded bytes are not the pinned ones; nothing is kept
│   ├── UnsupportedModel (ValueError)       a model whose layers or template the engine cannot serve
│   └── InsufficientResources (OSError)     too little disk or memory, said before the work starts
├── CorpusError
│   ├── EmptyCorpus (ValueError)            no document with text
│   ├── UnreadableDocument (ValueError)     a file that cannot be read as what it claims to be
│   └── CorpusTooLarge (ValueError)         more tokens than the model's window
├── CacheError
│   ├── CacheNotFound (LookupError)         no cache of that name
│   ├── CacheMismatch (ValueError)          built by another model, adapter, tokenizer or chat template
│   └── FidelityMissed (ValueError)         a codec that loses more than the bound allows; nothing is committed
├── RequestError
│   ├── RequestTooLong (ValueError)         prompt and answer do not fit into the model's window
│   ├── QueueFull (RuntimeError)            the server has no free slot
│   ├── SessionNotFound (LookupError)       no session of that id: it has expired, was deleted, or never was
│   ├── SessionBusy (RuntimeError)          another question of the session is being answered
│   ├── JobNotFound (LookupError)           no job of that id, or not the caller's
│   └── ServerStopping (RuntimeError)       the server stops and cannot wait for this answer
└── BuildInterrupted (RuntimeError)         stopped by the user; whole chunks are kept for the next build

Errors of `cag_store` have a tree of their own (`cag_store.errors`); both trees stand in `ERROR_TABLE`.
"""

from __future__ import annotations

from typing import NamedTuple

import cag_store.errors as store_errors


class CagError(Exception):
    """Base of all errors of the engine. `hint` says what to do; facts are attributes named by the subclass."""

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(f"{message} {hint}".strip() if hint else message)
        self.message = message
        self.hint = hint
        self.facts = facts


class UsageError(CagError, ValueError):
    """A bad argument, name or combination of options."""


class ModelError(CagError):
    """Something about the model itself."""


class ModelNotFound(ModelError, LookupError):
    """No catalogue entry, hub id or directory of that name."""


class DownloadFailed(ModelError, OSError):
    """A source could not be reached, or broke off. Parts that arrived whole are kept."""


class HashMismatch(ModelError, ValueError):
    """Downloaded bytes are not the pinned ones. Nothing of them is kept."""


class UnsupportedModel(ModelError, ValueError):
    """A model whose layers or chat template the engine cannot serve."""


class InsufficientResources(ModelError, OSError):
    """Too little disk or memory for what is about to be done."""


class CorpusError(CagError):
    """Something about the documents."""


class EmptyCorpus(CorpusError, ValueError):
    """No document with text was found."""


class UnreadableDocument(CorpusError, ValueError):
    """A file that cannot be read as what it claims to be. Fact: `path`."""


class CorpusTooLarge(CorpusError, ValueError):
    """More tokens than the model's window. Facts: `num_tokens`, `window_tokens`."""


class CacheError(CagError):
    """Something about a cache, seen from the engine."""


class CacheNotFound(CacheError, LookupError):
    """No cache of that name."""


class CacheMismatch(CacheError, ValueError):
    """A cache built by another model, adapter, tokenizer or chat template. Facts: `part`, `expected`, `found`."""


class FidelityMissed(CacheError, ValueError):
    """A codec that loses more than the bound allows; nothing is committed. Facts: `mean_kl`, `max_kl`, `codec`."""


class RequestError(CagError):
    """Something about one question."""


class RequestTooLong(RequestError, ValueError):
    """Prompt and answer do not fit into the model's window."""


class QueueFull(RequestError, RuntimeError):
    """The server has no free slot. Fact: `retry_after_s`."""


class SessionNotFound(RequestError, LookupError):
    """No session of that id: it has expired, was deleted, or never was."""


class SessionBusy(RequestError, RuntimeError):
    """Another question of the session is being answered."""


class JobNotFound(RequestError, LookupError):
    """No job of that id, or not the caller's. Jobs do not outlive the server."""


class ServerStopping(RequestError, RuntimeError):
    """The server stops and cannot wait for this answer. Another server, or this one later, may be asked again."""


class BuildInterrupted(CagError, RuntimeError):
    """Stopped by the user. Whole chunks are kept, and the next build resumes from them."""


class ErrorRow(NamedTuple):
    """How one error class is shown outside: process exit code, HTTP status, stable code word."""

    exit_code: int
    http_status: int
    code: str


ERROR_TABLE: dict[type[Exception], ErrorRow] = {
    CagError: ErrorRow(1, 500, "internal_error"),
    UsageError: ErrorRow(2, 400, "invalid_request"),
    ModelError: ErrorRow(10, 500, "model_error"),
    ModelNotFound: ErrorRow(11, 404, "model_not_found"),
    DownloadFailed: ErrorRow(12, 502, "download_failed"),
    HashMismatch: ErrorRow(13, 502, "hash_mismatch"),
    UnsupportedModel: ErrorRow(14, 422, "unsupported_model"),
    InsufficientResources: ErrorRow(15, 507, "insufficient_resources"),
    CorpusError: ErrorRow(20, 422, "corpus_error"),
    EmptyCorpus: ErrorRow(21, 422, "empty_corpus"),
    UnreadableDocument: ErrorRow(22, 422, "unreadable_document"),
    CorpusTooLarge: ErrorRow(23, 413, "corpus_too_large"),
    CacheError: ErrorRow(30, 500, "cache_error"),
    CacheNotFound: ErrorRow(31, 404, "cache_not_found"),
    CacheMismatch: ErrorRow(32, 409, "cache_mismatch"),
    FidelityMissed: ErrorRow(33, 422, "fidelity_missed"),
    RequestError: ErrorRow(40, 400, "request_error"),
    RequestTooLong: ErrorRow(41, 400, "context_length_exceeded"),
    QueueFull: ErrorRow(42, 429, "queue_full"),
    SessionNotFound: ErrorRow(45, 404, "session_not_found"),
    SessionBusy: ErrorRow(46, 409, "session_busy"),
    JobNotFound: ErrorRow(47, 404, "job_not_found"),
    ServerStopping: ErrorRow(48, 503, "server_stopping"),
    BuildInterrupted: ErrorRow(130, 499, "interrupted"),
    store_errors.StoreError: ErrorRow(50, 500, "store_error"),
    store_errors.EntryNotFound: ErrorRow(51, 404, "entry_not_found"),
    store_errors.CorruptEntry: ErrorRow(52, 500, "corrupt_entry"),
    store_errors.UnsupportedFormat: ErrorRow(53, 409, "unsupported_format"),
    store_errors.UnknownCodec: ErrorRow(54, 409, "unknown_codec"),
    store_errors.StoreFull: ErrorRow(55, 507, "store_full"),
    store_errors.StoreBusy: ErrorRow(56, 409, "store_busy"),
    store_errors.InvalidName: ErrorRow(57, 400, "invalid_name"),
    store_errors.UnencodableArray: ErrorRow(58, 422, "unencodable_array"),
    store_errors.BackendUnavailable: ErrorRow(60, 503, "backend_unavailable"),
    store_errors.UnsupportedBackend: ErrorRow(61, 400, "unsupported_backend"),
    store_errors.EntryChanged: ErrorRow(62, 503, "entry_changed"),
    store_errors.EntryConflict: ErrorRow(63, 409, "entry_conflict"),
    store_errors.EntryPinned: ErrorRow(2, 409, "entry_pinned"),  # on the command line, a flag is missing
}


def error_row(error: BaseException) -> ErrorRow:
    """The row of the nearest class of `error` in `ERROR_TABLE`."""
    for cls in type(error).__mro__:
        if cls in ERROR_TABLE:
            return ERROR_TABLE[cls]
    return ERROR_TABLE[CagError]
