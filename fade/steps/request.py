"""Step ``request``: turn names into a checked request, before anything expensive.

As a stage it writes the example erasure's request from the section ``example`` of params.yaml.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from fade.config import Request, Settings, load_settings, make_request, save_request
from fade.data.catalog import find_concept, load_catalog, load_concepts
from fade.errors import BaseModelError, ConfigError, DataError, ResourceError
from fade.files import read_yaml
from fade.models.sd import base_sha256

CATALOG, BASE, JUDGES = "data/catalog/canvas", "data/base/canvas", "data/judges"
NEEDED_BYTES = 200 * 2**20
"""Free disk an erasure asks for: DVC's copies, MLflow's artifacts and the base's pictures."""


def prepare_request(
    concept: str,
    surrogate: str,
    *,
    settings: Settings,
    base: str = BASE,
    expected_base_sha256: str | None = None,
    catalog: str = CATALOG,
    judges: str = JUDGES,
) -> Request:
    """Resolve names and check everything that can be checked without training.

    Raises:
        ConfigError: unknown concept or surrogate, equal, or of different kinds.
        DataError: no catalog, or it holds no picture of the concept.
        BaseModelError: the base is missing, or not the expected one.
        ResourceError: too little free disk.
    """
    concepts = load_concepts(Path(catalog))
    erased, instead = find_concept(concepts, concept), find_concept(concepts, surrogate)
    if erased.name == instead.name:
        raise ConfigError(
            f"The surrogate must differ from the concept: got {instead.name!r} for both. "
            "Name what its prompts shall give instead."
        )
    if erased.kind != instead.kind:
        raise ConfigError(
            f"Concept and surrogate must be of one kind: {erased.name!r} is an {erased.kind}, "
            f"{instead.name!r} is a {instead.kind}."
        )
    table = load_catalog(Path(catalog))
    if not (table[erased.kind] == erased.name).any():
        raise DataError(
            f"The forget set is empty: {catalog} holds 0 pictures of {erased.name!r}. Add pictures to the catalog."
        )
    found = _checked_base(Path(base), expected_base_sha256)
    check_disk(Path())
    return make_request(
        concept=erased.name,
        kind=erased.kind,
        surrogate=instead.name,
        person=erased.person,
        aliases=erased.aliases,
        base=base,
        base_sha256=found,
        catalog=catalog,
        judges=judges,
        **settings.model_dump(),
    )


def _checked_base(base: Path, expected: str | None) -> str:
    found = base_sha256(base)
    if expected is not None and found != expected:
        raise BaseModelError(
            f"The base model in {base} is another one: its hash is {found[:12]}, expected {expected[:12]}. "
            "Restore that base, or ask for this one."
        )
    return found


def check_disk(folder: Path, *, needed: int = NEEDED_BYTES) -> None:
    """Raise ResourceError if less than ``needed`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder.resolve()).free
    if free < needed:
        raise ResourceError(
            f"Too little free disk for an erasure: {free // 2**20} MiB free in {folder.resolve()}, "
            f"{needed // 2**20} MiB needed. Free some, or move the project."
        )


def main() -> None:
    """Write the example's request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    example: dict[str, Any] = read_yaml(arguments.params)["example"]
    save_request(prepare_request(**example, settings=load_settings(arguments.params)), arguments.folder)


if __name__ == "__main__":
    main()
