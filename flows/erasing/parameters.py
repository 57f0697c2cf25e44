"""The settings of an erasure as a Markdown table, for docs/settings.md: python -m flows.erasing.parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fade.config import Settings
from fade.files import read_yaml
from fade.lineage import ROOT

_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def table(shipped: Path = ROOT / "params.yaml") -> str:
    """Every setting with the value in ``params.yaml``, what it takes by ``fade/config.py``, and what it is."""
    rows = ["| setting | as shipped | takes | what it is |", "|---|---|---|---|"]
    schema = Settings.model_json_schema()
    for name, given, spec in _walk(schema, schema["$defs"], read_yaml(shipped)["erasure"], ""):
        rows.append(f"| `{name}` | `{_shown(given)}` | {_takes(spec)} | {spec.get('description', '')} |")
    return "\n".join(rows) + "\n"


def _walk(
    section: dict[str, Any], known: dict[str, Any], given: dict[str, Any], prefix: str
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Dotted name, value in params.yaml and schema of each setting; sections are entered."""
    for name, spec in section["properties"].items():
        kinds = [known[one["$ref"].rpartition("/")[2]] for one in [spec, *spec.get("anyOf", ())] if "$ref" in one]
        if kinds:
            yield from _walk(kinds[0], known, given[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", given[name], spec


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _takes(spec: dict[str, Any]) -> str:
    """What a value must be, in words."""
    return " or ".join(_kind(one) for one in spec.get("anyOf", [spec]))


def _kind(spec: dict[str, Any]) -> str:
    if "enum" in spec:
        return ", ".join(f"`{one}`" for one in spec["enum"])
    if spec["type"] == "array":
        return f"a list, each {_kind(spec['items'])}"
    if spec["type"] == "object":
        return "names and numbers"
    word = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "null": "`null`"}
    limits = [f"{said} {spec[key]:g}" for key, said in _LIMITS.items() if key in spec]
    return " ".join([word.get(spec["type"], "text"), ", ".join(limits)]).strip()


if __name__ == "__main__":
    sys.stdout.write(table())
