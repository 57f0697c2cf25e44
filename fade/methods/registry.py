"""The methods by name: a new one is a file, and a line here.

``fade erase --method NAME`` and ``fade benchmark canvas --methods NAME,...`` take these names, and also ``module:NAME``
of one that is not among them: a ``Method`` in a module that Python finds from the project's folder.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fade.config import OUR_METHOD
from fade.errors import ConfigError, nearest
from fade.lineage import module_closure, module_file
from fade.methods.method import Method
from fade.methods.plain_fade import PAPER_SETTINGS

METHODS = {
    OUR_METHOD: "fade.methods.fade.training:FADE",
    "fade-rounds": "fade.methods.fade.rounds:ROUNDS",
    "fade-retained": "fade.methods.fade.retained:RETAINED",
    "esd-x": "fade.methods.esd:ESD_X",
    "esd-u": "fade.methods.esd:ESD_U",
    "uce": "fade.methods.uce:UCE",
    "ca": "fade.methods.concept_ablation:CONCEPT_ABLATION",
    "salun": "fade.methods.salun:SALUN",
    "speed": "fade.methods.speed:SPEED",
    "rece": "fade.methods.rece:RECE",
    "mace": "fade.methods.mace:MACE",
    "spm": "fade.methods.spm:SPM",
    "stereo": "fade.methods.stereo:STEREO",
    "receler": "fade.methods.receler:RECELER",
    "adv-unlearn": "fade.methods.adv_unlearn:ADV_UNLEARN",
    "layerwise": "fade.methods.layerwise:LAYERWISE",
    "layerwise-tuned": "fade.methods.layerwise_tuned:LAYERWISE_TUNED",
}
"""Name to where the method lies; it is imported when it is asked for, so that no method's code is another's."""
_SOLVED = {
    "distill.start": "closed_form",
    "distill.steps": 0,
    "distill.rank": 1,
    "mask.within": "all",
    "mask.granularity": "none",
}
PRESETS: dict[str, dict[str, Any]] = {
    "ours": {"settings": "auto"},
    "fade-deep": {"distill.depth": "deep"},
    "fade-denied": {
        "distill.depth": "deep",
        "distill.deep.retain_weight": 4.0,
        "distill.deep.distill_batch": 12,
        "distill.deep.share": 0.6,
        "distill.deep.empty_share": 0.0,
        "distill.deep.grown": 0.33,
        "distill.deep.deny_share": 0.4,
    },
    "fade-closed-form": _SOLVED,
    "fade-shut": {**_SOLVED, "distill.rank": 2, "distill.closed_form.shut": 40},
    "plain-fade": PAPER_SETTINGS,
}
"""Names of settings of our own method: an erasure that is asked for so is one by ``fade`` with these settings."""
NAMES = (OUR_METHOD, *PRESETS, *(name for name in METHODS if name != OUR_METHOD))


def find_method(name: str) -> Method:
    """The method of a name, or of a path ``module:NAME``.

    Raises:
        ConfigError: there is none; says which there are.
    """
    path = METHODS.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ConfigError(
            f"Unknown method {name!r}. {nearest(name, list(NAMES))} A method of your own is asked for as module:NAME."
        )
    _look_in_project()
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(
            f"The method {name!r} cannot be imported: {error}. Expected a module that Python finds from {os.getcwd()}."
        ) from None
    if not isinstance(found, Method):
        raise ConfigError(f"{attribute!r} of {module} is no fade.methods.method.Method: got {type(found).__name__}.")
    return found


def asking_for(names: Sequence[str], changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Changed settings of erasures that methods make, one for each name.

    Args:
        changes: further changes by dotted name; ``esd-x.steps`` is a method's own and reaches that method alone.

    Raises:
        ConfigError: there is no such method; or a setting is of one that is not among them, or of a mask that none
            of them has.
    """
    own = [OUR_METHOD if name in PRESETS else find_method(name).name for name in names]
    if not any(name in PRESETS or find_method(name).masked for name in names):
        for key in (key for key in changes if key.partition(".")[0] == "mask"):
            raise ConfigError(
                f"{key} was set, and {' and '.join(names)} trains no mask: nothing would read it. Leave it out, or "
                f"take a method that has one, such as {OUR_METHOD}."
            )
    filed = {*METHODS, *own} - {OUR_METHOD}
    of = {key: head for key in changes if (head := key.partition(".")[0]) in filed}
    if unasked := sorted(set(of.values()) - set(own)):
        raise ConfigError(f"Settings were given for {unasked[0]!r}, which is not among the methods.")
    found = []
    for name, method in zip(names, own, strict=True):
        shared = {key: value for key, value in changes.items() if key not in of}
        mine = {f"methods.{key}": changes[key] for key, head in of.items() if head == method}
        found.append({"method": OUR_METHOD if name in PRESETS else name, **PRESETS.get(name, {}), **shared, **mine})
    return found


def steps_of(name: str | None, steps: int) -> dict[str, int]:
    """The settings, by dotted name, that give a method so many steps; None is our own.

    Raises:
        ConfigError: there is no such method.
    """
    if name is not None and name not in PRESETS and name != OUR_METHOD:
        return {f"{find_method(name).name}.steps": steps}
    # Without a step the closed form alone is asked for, which has no depth.
    return {"distill.steps": steps} | ({"distill.deep.steps": steps} if steps else {})


def method_code(name: str) -> list[Path]:
    """Source files of a method and of what it imports of the project, sorted.

    Raises:
        ConfigError: as ``find_method``.
    """
    module = METHODS.get(name, name).partition(":")[0]
    if module_file(module) is not None and module.split(".")[0] == "fade":
        return module_closure(module)
    find_method(name)
    origin = getattr(find_spec(module), "origin", None)
    return [] if origin is None else [Path(origin), *module_closure(Path(origin))]


def _look_in_project() -> None:
    """A command that was installed does not look in the current folder, where a method of one's own lies."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
