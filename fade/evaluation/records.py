"""Records: figures as frozen, typed values, and the one way in which they are written and read.

On disk a record is JSON with sorted keys, so that equal records are equal bytes; what was not measured is left out.
Reading is strict: a number is a number and finite, nothing is absent and nothing is there that has no name here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from fade.errors import ConfigError
from fade.files import write_json

Kind = TypeVar("Kind", bound=BaseModel)
Value = TypeVar("Value")

NUMBERED = ("erased", "neighbours", "names", "clear", "reachable")
"""Parts that hold concepts by name. Messages call these by number: they go to pages and logs, where no name may be."""


class Record(BaseModel):
    """Figures that no one changes once they are there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: object) -> object:
    """A whole number that another library wrote as 50.0 is the number 50."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _by_name(values: Mapping[str, Value]) -> Mapping[str, Value]:
    return dict(sorted(values.items()))


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Counted = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
ByName = Annotated[Mapping[str, Value], AfterValidator(_by_name)]
"""Values in the order of their names, as in the file, so that concept 1 is the same one wherever figures are told."""


def contradiction(where: str, got: object, expected: str) -> PydanticCustomError:
    """What a record's validator raises of figures that do not fit one another; ``where`` is within the record."""
    return PydanticCustomError("contradiction", "{at}", {"at": where, "got": str(got), "expected": expected})


def as_json(record: BaseModel) -> Any:
    """The record as JSON has it; what was not measured is left out."""
    return record.model_dump(mode="json", exclude_none=True)


def dump(record: BaseModel, path: Path) -> None:
    """Write a record; a file that is there is replaced."""
    write_json(path, as_json(record))


def load(kind: type[Kind], path: Path) -> Kind:
    """Read a record.

    Raises:
        ConfigError: the file is missing, or holds another thing; as ``parse``.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"Missing file {path}: expected figures there. Run the step that writes it.") from None
    return parse(kind, content, str(path))


def parse(kind: type[Kind], content: bytes | str, place: str) -> Kind:
    """A record from the content of its file.

    Args:
        place: where it was, for the message.

    Raises:
        ConfigError: it is no JSON, or no such record: names the first figure at fault, what it is and what was
            expected. Concepts are called by number.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(_explained(error, content, place)) from None


_EXPECTED = {
    "missing": "a figure",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "extra_forbidden": "nothing of this name",
}


def _explained(error: ValidationError, content: bytes | str, place: str) -> str:
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "json_invalid":
        return f"{place} is not JSON: {fault['ctx']['error']}. Restore or remove the file and run its step again."
    context = fault.get("ctx", {})
    if fault["type"] == "contradiction":
        within = [context["at"]] if context["at"] else []
        got, expected = context["got"], context["expected"]
    else:
        within, got, expected = [], _shown(fault["type"], fault["input"]), _EXPECTED.get(fault["type"], "")
        if fault["type"] in ("greater_than_equal", "less_than_equal"):
            expected = f"at least {context['ge']}" if "ge" in context else f"at most {context['le']}"
        expected = expected or ("figures" if isinstance(fault["input"], list | str | int | None) else fault["msg"])
    path = ".".join([*_numbered(fault["loc"], json.loads(content)), *within])
    return (
        f"These are no figures of an evaluation ({place}): {path or 'the whole'} is {got}, expected {expected}. They "
        "were changed, or measured by something else: evaluate the erasure again."
    )


def _shown(kind: str, value: object) -> str:
    if kind == "missing" or value is None:
        return "nothing"
    if kind == "extra_forbidden":
        return "there"
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def _numbered(path: Sequence[int | str], content: Any) -> list[str]:
    """A path with concepts by number."""
    said, at, last = [], content, ""
    for part in path:
        number = last in NUMBERED and isinstance(at, Mapping) and part in at
        said.append(str(sorted(at).index(part) + 1) if number else str(part))
        known = (isinstance(at, Mapping) and part in at) or (isinstance(at, list) and isinstance(part, int))
        at, last = at[part] if known else None, str(part)
    return said
