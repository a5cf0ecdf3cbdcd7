"""Errors of obstore as those of the store. Their texts hold URLs, which may be signed, so none is passed on.

What is said: where in the store, the HTTP status or the kind of failure, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore import exceptions

from cag_store.errors import BackendUnavailable, EntryNotFound, StoreError, StoreFull, UnsupportedBackend

_STATUS = re.compile(r"status(?: code)?: (\d{3})\b")
_KINDS = (
    (("169.254.169.254", "metadata.google.internal", "metadata/"), "no credentials were found"),
    (("kind: Timeout", "TimedOut", "timed out"), "no answer in time"),
    (("kind: Connect", "dns error"), "no connection"),
    (("kind: Decode", "kind: Body", "IncompleteMessage", "ConnectionReset"), "the connection broke"),
)
_FULL = {"507"}
RANGE_BEYOND_END = "416"


class ConditionFailed(Exception):
    """A conditional request was refused: the object is there already, or is another one by now."""


@contextmanager
def translated(where: str, *, writing: bool = False) -> Iterator[None]:
    """Around calls of obstore for the object `where`.

    Raises: EntryNotFound, StoreFull, BackendUnavailable, UnsupportedBackend; ConditionFailed.
    """
    try:
        yield
    except (StoreError, ConditionFailed):
        raise
    except FileNotFoundError:
        raise EntryNotFound(f"there is no {where}", path=where) from None
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError, exceptions.NotModifiedError):
        raise ConditionFailed(where) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise _refused(where, status_of(error), writing) from None
    except exceptions.NotSupportedError:
        raise UnsupportedBackend(f"{where}: this kind of storage cannot do what a store needs", where=where) from None
    except Exception as error:
        raise _failed(where, error, writing) from None


def status_of(error: Exception) -> str | None:
    """The HTTP status that an error of obstore tells of, or None."""
    found = _STATUS.search(str(error))
    return found[1] if found else None


def _refused(where: str, status: str | None, writing: bool) -> StoreError:
    reason = f"access denied{f' (HTTP {status})' if status else ''}; check the credentials and what they may do"
    if writing:
        return StoreFull(f"no permission to write {where}: {reason}", path=where)
    return BackendUnavailable(f"{where}: {reason}", where=where, status=status)


def _failed(where: str, error: Exception, writing: bool) -> StoreError:
    status, text = status_of(error), str(error)
    if writing and status in _FULL:
        return StoreFull(f"no space left to write {where}: the server answered HTTP {status}", path=where)
    reason = next((said for marks, said in _KINDS if any(mark in text for mark in marks)), None)
    if status:
        reason = f"the server answered HTTP {status}"
    return BackendUnavailable(
        f"{where}: {reason or 'the request failed'}, also after retries; try again, or check the URL, its endpoint "
        "and the credentials in the environment",
        where=where,
        status=status,
    )
