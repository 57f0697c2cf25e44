"""What erasures that are judged together must have in common; read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fade.errors import ConfigError, DataError, listing
from fade.names import name_key
from fade.spec import GENERATED, Spec, load_spec

COMBINATIONS = Path("data/combinations")
"""A folder for each combination that was judged: of what is live (r...), of trials (t...)."""
SHARED = ("base_sha256", "weights", "catalog", "judges", "evaluate", "threads")
"""What erasures must have in common to be judged together."""
SHARED_BY_NAME = ("base_sha256", "weights", "clip_sha256", "evaluate", "threads")
"""The same of erasures by name: each has concepts of its own, and the CLIP that judges learns all of them."""


def check_alike(folders: Sequence[Path]) -> list[Spec]:
    """The erasures' specs, if they can be judged together.

    Raises:
        ConfigError: erasures of different bases, catalogs, judges or evaluation settings, or one twice; or some by
            name, which no judge can know together.
        DataError: no erasure was given.
    """
    if not folders:
        raise DataError("A combination needs at least one erasure: got none.")
    specs = [load_spec(folder) for folder in folders]
    by_name = {spec.by_name for spec in specs}
    if len(by_name) > 1:
        raise ConfigError(
            f"Erased by name alone are {listing(spec.id for spec in specs if spec.by_name)}, and by a catalog the "
            "others: no judge knows the concepts of both, so they cannot be judged together. Ask for all of them in "
            "one way."
        )
    for name in SHARED_BY_NAME if specs[0].by_name else SHARED:
        if len({str(getattr(spec, name)) for spec in specs}) > 1:
            raise ConfigError(
                f"The erasures differ in {name!r}, so they cannot be judged together: "
                f"{listing(f'{spec.id}: {getattr(spec, name)}' for spec in specs)}. "
                "Ask for them again with equal settings."
            )
    if specs[0].by_name:
        _check_by_name(folders, specs)
    named = [pair.concept for spec in specs for pair in spec.pairs]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ConfigError(f"Erased twice in one combination: {listing(twice)}. Give each concept once.")
    return specs


def _check_by_name(folders: Sequence[Path], specs: Sequence[Spec]) -> None:
    """What more erasures by name need to be judged together: their pictures, and that none brings back another."""
    if len(folders) > 1 and (gone := [folder.name for folder in folders if not (folder / GENERATED).is_dir()]):
        raise ConfigError(
            f"The pictures that the base drew for {listing(gone)} are gone (`fade purge`), and a judge of the concepts "
            "of all these erasures learns from them. Ask for it again."
        )
    erased = {name_key(pair.concept) for spec in specs for pair in spec.pairs}
    if back := [spec.id for spec in specs for pair in spec.pairs if name_key(pair.surrogate) in erased]:
        raise ConfigError(
            f"What the prompts of {listing(back)} give instead is erased by another of these. Ask for it again "
            "with another --surrogate."
        )
