"""Who asks: each tenant has a store of its own, over the one model. No tenant sees, shares or names another's caches.

A key belongs to a tenant, or to the operator, whose caches lie in the server's own store. Knows no routes.
"""

from __future__ import annotations

import threading
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from fastapi import Depends, Request
from pydantic import SecretStr

from cag.engine import Engine
from cag.errors import UsageError
from cag.stores import open_store
from cag_store import checked_name

OPERATOR = ""
SCOPE = "cag.tenant"  # where a request's scope says whose it is


class CacheKey(NamedTuple):
    """A cache of a tenant."""

    tenant: str
    name: str

    @classmethod
    def named(cls, text: str) -> CacheKey:
        """From `tenant/name`, or `name` for the operator's."""
        tenant, _, name = text.rpartition("/")
        return cls(tenant, name)

    @property
    def is_operators(self) -> bool:
        """Whether it lies in the server's own store."""
        return self.tenant == OPERATOR


class Tenants:
    """The engines of a server: the operator's, and one for each tenant, made when it is first needed."""

    def __init__(self, engine: Engine, names: frozenset[str], stores: str | None) -> None:
        """stores: directory or URL under which each tenant's store lies, by the tenant's name."""
        self._engines = {OPERATOR: engine}
        self._names = names
        self._stores = stores
        self._lock = threading.Lock()

    def engine(self, tenant: str) -> Engine:
        """The engine over a tenant's store. Safe from several threads."""
        with self._lock:
            if tenant not in self._engines:
                assert tenant in self._names and self._stores is not None, "keys were checked at the start"
                store = open_store(store_location(self._stores, tenant))
                self._engines[tenant] = self._engines[OPERATOR].beside(store)
            return self._engines[tenant]

    def find(self, key: CacheKey) -> tuple[Engine, str]:
        """Where a cache is opened, and what it is called there."""
        return self.engine(key.tenant), key.name


def tenant_of(request: Request) -> str:
    """Whose request it is, as `middleware.ApiKeys` has found out. Raises KeyError where that has not looked: nobody's
    request is the operator's by default."""
    return str(request.scope[SCOPE])


Tenant = Annotated[str, Depends(tenant_of)]


def store_location(stores: str, tenant: str) -> str:
    """Directory or URL of a tenant's store."""
    return f"{stores.rstrip('/')}/{tenant}"


def read_tenant_keys(path: Path) -> dict[str, tuple[SecretStr, ...]]:
    """Keys of each tenant from a TOML file: `tenant = "key"`, or a list of keys.

    Raises: UsageError: a file that cannot be read, a name that no cache could have, no key. The message has no key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:  # its message quotes what it stumbles over, which may be a key
        raise UsageError(f"{path} is no TOML file.", hint='Each line is: tenant = "key"') from error
    return {tenant: _keys_of(path, tenant, value) for tenant, value in content.items()}


def _keys_of(path: Path, tenant: str, value: object) -> tuple[SecretStr, ...]:
    checked_name(tenant)
    given = value if isinstance(value, list) else [value]
    keys = [key for key in given if isinstance(key, str)]
    if not keys or len(keys) < len(given):
        raise UsageError(f"{path}: tenant {tenant!r} has no key.", hint='A line is: tenant = "key"')
    return tuple(SecretStr(key) for key in keys)


def owners_of(
    api_keys: tuple[SecretStr, ...], tenant_keys: Mapping[str, tuple[SecretStr, ...]]
) -> list[tuple[bytes, str]]:
    """Each key with whose it is."""
    whole = {OPERATOR: api_keys, **tenant_keys}
    return [(key.get_secret_value().encode(), tenant) for tenant, keys in whole.items() for key in keys]
