"""What bodies of requests are made of. A value of another JSON type is refused, never turned into the one that was
meant: `"stream": "false"` is no boolean."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_FIELDS = 64  # of one object: each that nobody knows is a mistake to be told


def _encodable(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_unicode", "the text holds an unpaired surrogate") from None
    return text


def _whole(number: Any) -> Any:
    """JSON has one kind of number: 20.0 is an integer."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Text = Annotated[str, AfterValidator(_encodable)]
Integer = Annotated[int, BeforeValidator(_whole)]


class Body(BaseModel):
    """A JSON object; fields that nobody knows are ignored."""

    model_config = ConfigDict(strict=True)


class ClosedBody(Body):
    """A JSON object; a field that nobody knows is an error."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_FIELDS:
            raise PydanticCustomError("many_fields", "an object has at most {most} fields", {"most": MAX_FIELDS})
        return body
