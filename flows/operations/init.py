"""What ``fade init`` writes: a params.yaml for a model of one's own, and the commands that come after it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fade.errors import BaseModelError, ConfigError
from fade.evaluation.clip_score import find_clip
from fade.files import read_yaml, writing
from fade.models.family import family_of
from fade.models.source import find_base, is_hub_name
from fade.project import PARAMS, Project, make_project

SECTIONS = ("erasure", "judges", "base", "base_report")
"""What a project takes over from the workspace's params.yaml: how it erases, and how judges and a base are trained."""
LARGE = 256
"""Pictures of this side or more ask for the settings below."""
FOR_LARGE: dict[str, Any] = {
    "weights": "auto",
    "saliency.gradient_checkpointing": True,
    "saliency.at_once": 1,
    "distill.gradient_checkpointing": True,
    "distill.micro_batch": 1,
    "evaluate.batch": 1,
}
"""How drawing, saliency and distillation of a full-size base fit into memory (docs/how-to/own-checkpoint.md)."""


def write_params(
    folder: Path,
    *,
    name: str,
    base: str,
    catalog: str | None,
    judges: str | None,
    protected: Sequence[str],
    clip: str | None = None,
) -> tuple[Project, dict[str, Any]]:
    """Write ``params.yaml`` into a folder; gives the project, and what it sets otherwise because its base is large.

    Raises:
        ConfigError: there is one already, or a field is not what it may be.
        DataError: the CLIP is none.
    """
    file = folder / PARAMS
    if file.exists():
        raise ConfigError(f"{file} is there already, and is left as it is. Edit it, or name another folder.")
    places = {"catalog": catalog or f"data/catalog/{name}", "base": base, "judges": judges or f"data/judges-{name}"}
    section = {"name": name, **places, "protected": list(protected)}
    if clip is not None:
        find_clip(clip)
        section["clip"] = clip
    project, shipped = make_project(section, file), read_yaml(PARAMS)
    content: dict[str, Any] = {
        "project": section,
        **{section: shipped[section] for section in SECTIONS if section in shipped},
    }
    changed = FOR_LARGE if (picture_size(base) or 0) >= LARGE else {}
    for setting, value in changed.items():
        *parents, last = setting.split(".")
        at = content.setdefault("erasure", {})
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    with writing(file) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return project, changed


def picture_size(base: str) -> int | None:
    """The side of the pictures that a base draws, in pixels; None while it is not here or does not say."""
    try:
        return find_base(base).picture_size
    except BaseModelError:
        return None


def _denoiser(base: str) -> str:
    """The name of a base's denoiser in its pipeline; a U-Net's while it is not here."""
    try:
        return family_of(base).denoiser_type.component
    except BaseModelError:
        return "unet"


def next_commands(project: Project, folder: Path, *, size: int | None) -> list[str]:
    """What comes next for a project, in order: what is there already is left out."""
    unet = _denoiser(project.base) == "unet"
    given, place = shlex.quote(str(folder)), shlex.quote(project.catalog)
    if project.by_name:
        return [
            f"fade erase --project {given} --concept NAME",
            "fade approve ID",
            # Of a transformer kohya's names hold less than an erasure changes.
            "fade export ID --layout kohya -o erasure.safetensors" if unet else "fade export ID -o erasure",
        ]
    commands = []
    if not (Path(project.catalog) / "catalog.parquet").is_file():
        commands.append(f"fade catalog build folder PICTURES -o {place} --size {size or 'SIZE'}")
        commands.append(f"fade catalog check {place}")
    if not is_hub_name(project.base) and not Path(project.base).exists():
        commands.append(f"fade base train --project {given}    # or put your model there: {project.base}")
    if not Path(project.judges).is_dir():
        commands.append(f"fade classifier train --project {given}")
    return [
        *commands,
        f"fade doctor --base {shlex.quote(project.base)}",
        f"fade erase --project {given} --concept NAME",
        f"fade up --project {given}    # the queue; or FADE_PROJECT={given} in .fade/environment for every command",
    ]
