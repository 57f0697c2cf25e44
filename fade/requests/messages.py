"""A deletion request as its sender writes it: the message, checked field by field.

Its JSON Schema is infra/schemas/request-1.json; `python -m fade.requests.messages` writes it.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from fade.errors import DataError
from fade.files import write_json
from fade.names import name_key

SCHEMA = Path("infra/schemas/request-1.json")
MAX_BYTES = 1 << 20
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)


def _printable(text: str) -> str:
    if bad := [char for char in text if unicodedata.category(char) in ("Cc", "Cs")]:
        raise ValueError(f"must hold no control characters or lone surrogates, got {bad[0]!r}")
    return text


def _reachable(url: str) -> str:
    """Plain http would carry the state of a request in clear: it is for this machine alone."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and host in ("127.0.0.1", "localhost"))):
        raise ValueError("must be https://..., or http:// on 127.0.0.1 or localhost")
    if parts.username or parts.password:
        raise ValueError("must hold no user name or password")
    return url


def _plausible(at: datetime) -> datetime:
    """A time that was never set is year 1 in .NET and Go and 1970 in Unix: a deadline from there would be long over."""
    if at.replace(tzinfo=UTC) < EARLIEST:  # without arithmetic on its offset, which may lead before year 1
        raise ValueError(f"must not be before {EARLIEST.year}: the sender's clock or field was not set")
    return at


_Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(_printable)
]


def is_reachable(url: str) -> str | None:
    """None for an address that webhooks may go to, else what is wrong with it."""
    try:
        _reachable(url)
    except ValueError as error:
        return str(error)
    return None


class Message(BaseModel):
    """One request for deletion, version 1 of the format."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="FADE deletion request, version 1")

    version: Literal[1] = 1
    id: UUID = Field(description="The sender's idempotency key: sent twice, it is one request.")
    external_id: _Text | None = Field(None, description="The sender's own number; no name.")
    regulation: Literal["gdpr", "ccpa", "lgpd", "other"] = "gdpr"
    legal_basis: _Text | None = Field(None, description="For example: GDPR Art. 17(1)(b).")
    kind: Literal["object", "style", "person", "pictures"]
    concept: _Text | None = Field(None, description="What is erased, as the catalog calls it.")
    aliases: tuple[_Text, ...] = Field((), max_length=50)
    surrogate: _Text = Field("auto", description="What its prompts shall give instead; auto; nothing.")
    pictures: tuple[_Text, ...] = Field((), max_length=10_000, description="Ids of pictures; opaque.")
    subject: _Text | None = Field(None, description="An opaque reference to the person; no name.")
    project: _Text | None = Field(
        None, description="Which of several projects it is for, by name: whose model, pictures and judges."
    )
    priority: int = Field(5, ge=0, le=9, description="9 is the most urgent.")
    callback_url: Annotated[_Text, AfterValidator(_reachable)] | None = Field(
        None, description="Signed webhooks go there."
    )
    received_at: Annotated[AwareDatetime, AfterValidator(_plausible)] | None = Field(
        None, description="When the legal clock began, not before 2000; now, if left out."
    )

    @model_validator(mode="after")
    def _say_what(self) -> Message:
        if self.kind != "pictures" and self.concept is None:
            raise ValueError(f"concept is missing: a request of kind {self.kind!r} names what is erased")
        if self.kind == "pictures" and not self.pictures:
            raise ValueError("pictures is empty: a request of kind 'pictures' lists their ids")
        return self

    @property
    def sha256(self) -> str:
        """Hash of the whole body, by which the same request sent twice is known."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def concept_digest(concept: str, base: str) -> str:
    """Equal for one concept on one base, however both are spelt. The ledger keeps it under its key alone."""
    text = json.dumps([name_key(concept), base.rstrip("/")])
    return hashlib.sha256(text.encode()).hexdigest()


def read_message(body: bytes | str) -> Message:
    """A message from its JSON.

    Raises:
        DataError: it is no message; names every faulty field, and repeats no value, which may be personal.
    """
    if len(body) > MAX_BYTES:
        raise DataError(f"The request is too large: {len(body)} bytes, at most {MAX_BYTES} are taken.")
    try:
        return Message.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None


def make_message(**fields: Any) -> Message:
    """A message from its fields; raises DataError as `read_message` does."""
    try:
        return Message(**fields)
    except ValidationError as error:
        raise explain(error) from None


def explain(error: ValidationError) -> DataError:
    """Every fault with its field's name, none with the value."""
    faults = []
    for fault in error.errors(include_input=False, include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            # The sender chose this name: it may be anything, so it is shown as a literal and cut.
            where, said = repr(where[:60]), f"is not a field; the fields are {', '.join(Message.model_fields)}"
        else:
            said = str(fault["msg"]).removeprefix("Value error, ")
        faults.append(f"{where}: {said}" if where else said)
    rest = len(faults) - 10
    return DataError(
        "The request is not valid: " + "; ".join(faults[:10]) + (f"; and {rest} more" if rest > 0 else "") + "."
    )


def schema() -> dict[str, Any]:
    """The message's JSON Schema (draft 2020-12)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Message.model_json_schema()}


if __name__ == "__main__":
    write_json(SCHEMA, schema())
