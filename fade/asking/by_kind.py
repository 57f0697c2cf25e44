"""Settings that each kind of base has its own defaults of   (ours).

What a family declares (``Base.defaults``) holds where nobody gave the setting: neither a params.yaml nor a command.
The spec says the value, as it says all, and which came so (``Spec.by_kind``): on another base these are that kind's.
"""

from __future__ import annotations

from typing import Any

from fade.config import BY_KIND, Settings
from fade.models.base import Base
from fade.spec import Spec


def settings_of_kind(settings: Settings, kind: type[Base]) -> tuple[Settings, tuple[str, ...]]:
    """The settings with their kind's defaults where nobody gave them; and the names, dotted, of those that nobody gave.

    A setting counts as given if it stood where the settings were made from, whatever its value. ``depth: deep`` keeps
    the general defaults: against states that were searched little is left to learn from a closed form.
    """
    left = tuple(name for name in BY_KIND if not _given(settings, name))
    for name in left:
        if name in kind.defaults and settings.distill.depth == "name":
            section, _, part = name.partition(".")
            changed = getattr(settings, section).model_copy(update={part: kind.defaults[name]})
            settings = settings.model_copy(update={section: changed})
    return settings, left


def of_its_kind(spec: Spec, kind: type[Base]) -> dict[str, Any]:
    """What of a spec's settings its base's kind gave, by dotted name: those that nobody gave and other kinds lack."""
    values = {name: getattr(getattr(spec, name.partition(".")[0]), name.partition(".")[2]) for name in spec.by_kind}
    return {name: value for name, value in values.items() if kind.defaults.get(name) == value}


def settings_asked(spec: Spec) -> Settings:
    """The settings that a spec was made from: what its base's kind gave counts as not given."""
    asked: dict[str, Any] = spec.model_dump(include=set(Settings.model_fields))
    for name in spec.by_kind:
        section, _, part = name.partition(".")
        del asked[section][part]
    return Settings(**asked)


def _given(settings: Settings, name: str) -> bool:
    section, _, part = name.partition(".")
    return part in getattr(settings, section).model_fields_set
