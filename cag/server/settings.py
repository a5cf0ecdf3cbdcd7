"""What may be chosen about a server, each default written once."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError


class ServerSettings(BaseModel):
    """Settings of one server; unknown keys are refused.

    Attributes:
        api_keys: any of them opens `/v1`; none: `/v1` is open to all. Each is one word of visible ASCII characters:
            no other arrives in a header as it was meant.
        preload: names of caches to load before `/readyz` says ready.
        max_resident_bytes: of keys and values of open caches; None: no limit. See `ResidentCaches`.
        num_slots: answers that are computed at the same time; they share forwards.
        max_waiting: requests that may wait for a slot; one more is refused with 429.
        default_max_tokens: of an answer whose request does not say.
        speculate: as in `SamplingOptions`, for all answers.
        session_ttl_s: how long a session lives without a question; its maker may ask for less, never for more.
        max_sessions: that may be open; one more is refused with 429.
        max_body_bytes: of a request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_keys: tuple[SecretStr, ...] = ()
    preload: tuple[str, ...] = ()
    max_resident_bytes: int | None = Field(default=None, ge=1)
    num_slots: int = Field(default=16, ge=1, le=64)
    max_waiting: int = Field(default=64, ge=0)
    default_max_tokens: int = Field(default=512, ge=1)
    speculate: bool | None = None
    session_ttl_s: float = Field(default=1800.0, gt=0, allow_inf_nan=False)
    max_sessions: int = Field(default=100, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1)

    @field_validator("api_keys")
    @classmethod
    def _can_be_sent(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(keys, start=1):
            if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
                text = "API key {number} is empty, or has other characters than visible ASCII ones"
                raise PydanticCustomError("unusable_key", text, {"number": number})
        return keys
