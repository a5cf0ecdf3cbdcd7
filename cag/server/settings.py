"""What may be chosen about a server, each default written once."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cag.server.tenants import CacheKey
from cag_store import checked_name


class ServerSettings(BaseModel):
    """Settings of one server; unknown keys are refused.

    Attributes:
        api_keys: any of them opens `/v1`; none: `/v1` is open to all. Each is one word of visible ASCII characters:
            no other arrives in a header as it was meant.
        tenant_keys: keys of each tenant, which has a store of its own and sees no other caches.
        tenant_stores: directory or URL under which the tenants' stores lie, each by its tenant's name.
        cors_origins: web pages of these origins (`https://chat.example.org`) may ask from a browser; "*": of all.
        preload: names of caches to load before `/readyz` says ready; `tenant/name` for a tenant's.
        max_resident_bytes: of keys and values of open caches; None: no limit. See `ResidentCaches`.
        num_slots: answers that are computed at the same time; they share forwards.
        max_waiting: requests of one tenant that may wait for a slot; one more is refused with 429.
        default_max_tokens: of an answer whose request does not say.
        speculate: as in `SamplingOptions`, for all answers.
        session_ttl_s: how long a session lives without a question; its maker may ask for less, never for more.
        conversation_bytes: of keys and values of conversations that chat completions have left, for their next
            questions, as long as a session lives at most; 0: each request is read from its first message on.
        max_sessions: of one tenant that may be open; one more is refused with 429.
        max_body_bytes: of a request.
        max_waiting_builds: caches of one tenant that may wait to be built; one more is refused with 429.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_keys: tuple[SecretStr, ...] = ()
    tenant_keys: dict[str, tuple[SecretStr, ...]] = Field(default_factory=dict)
    tenant_stores: str | None = None
    cors_origins: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    max_resident_bytes: int | None = Field(default=None, ge=1)
    num_slots: int = Field(default=16, ge=1, le=64)
    max_waiting: int = Field(default=64, ge=0)
    default_max_tokens: int = Field(default=512, ge=1)
    speculate: bool | None = None
    session_ttl_s: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    conversation_bytes: int = Field(default=512 << 20, ge=0)
    max_sessions: int = Field(default=100, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    max_waiting_builds: int = Field(default=8, ge=0)

    @field_validator("api_keys")
    @classmethod
    def _can_be_sent(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(keys, start=1):
            if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
                text = "API key {number} is empty, or has other characters than visible ASCII ones"
                raise PydanticCustomError("unusable_key", text, {"number": number})
        return keys

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
                text = (
                    "{origin} is no origin: write it as browsers send it, like https://chat.example.org, or * for all"
                )
                raise PydanticCustomError("no_origin", text, {"origin": repr(origin)})
        return origins

    @model_validator(mode="after")
    def _tenants_are_apart(self) -> ServerSettings:
        spelled: dict[str, str] = {}
        for tenant, keys in self.tenant_keys.items():
            self._can_be_sent(keys)
            if spelled.setdefault(checked_name(tenant).casefold(), tenant) != tenant:  # one folder, on some systems
                text = "tenants {tenant} and {other} differ by case alone"
                raise PydanticCustomError("one_name", text, {"tenant": tenant, "other": spelled[tenant.casefold()]})
        every = [key.get_secret_value() for keys in (self.api_keys, *self.tenant_keys.values()) for key in keys]
        if len(set(every)) < len(every):
            raise PydanticCustomError("shared_key", "an API key is given twice")
        if self.tenant_keys and self.tenant_stores is None:
            raise PydanticCustomError("no_stores", "tenants need a place for their stores")
        for name in self.preload:
            key = CacheKey.named(name)
            if not key.is_operators and key.tenant not in self.tenant_keys:
                raise PydanticCustomError("no_tenant", "cannot preload {name}: no such tenant", {"name": name})
        return self

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self.api_keys and not self.tenant_keys
