"""``fade erase`` for many concepts: from a file, from an erasure with some more or fewer, and what it will hurt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fade.errors import ConfigError
from flows.cli.console import console, pair, write_figures

if TYPE_CHECKING:
    from fade.project import Project
    from fade.spec import Spec

SHOWN = 12


@dataclass(frozen=True, slots=True)
class Together:
    """What is asked of one adapter for many: a file, or an erasure's id with what is added and left out."""

    file: Path | None = None
    of: str | None = None
    add: Sequence[str] = ()
    without: Sequence[str] = ()

    @property
    def asked(self) -> bool:
        """Whether any of it was given."""
        return self.file is not None or self.of is not None or bool(self.add or self.without)


def spec_of(given: Together, project: Project, changes: dict[str, Any], **more: Any) -> Spec:
    """The spec of all concepts.

    Args:
        more: as ``flows.erasing.many.spec_for_many`` takes it; ``method`` as it was named, or None.

    Raises:
        ConfigError: a file and an erasure, or changes without one; and as reading and checking them.
    """
    from fade.asking.concepts import changed, read_concepts
    from fade.asking.prepare import Wanted
    from fade.config import Settings
    from fade.spec import load_spec
    from flows.erasing.erase import find_folder
    from flows.erasing.many import settings_for_many, spec_for_many

    method = more.pop("method")
    added = [Wanted(*pair(one)) for one in given.add]
    if given.of is None:
        if given.file is None:
            raise ConfigError("--add and --without change an erasure: name it, --of ID.")
        wanted = read_concepts(given.file)
        if added or given.without:
            raise ConfigError("--add and --without change an erasure (--of ID), not a file: edit the file.")
        settings = settings_for_many(project, len(wanted), changes, method)
        return spec_for_many(wanted, project=project, settings=settings, **more)
    if given.file is not None:
        raise ConfigError("Give either a file of concepts or an erasure (--of ID), not both.")
    before = load_spec(find_folder(given.of))
    wanted = changed(before.pairs, add=added, without=given.without)
    # As it was made: what is not touched is to come out as it was.
    settings = (
        Settings(**{name: getattr(before, name) for name in Settings.model_fields})
        if not changes
        else settings_for_many(project, len(wanted), changes, method)
    )
    asked = project.at(base=before.base, catalog=before.catalog, judges=before.judges)
    more = {**more, "expected_base_sha256": before.base_sha256, "data_free": before.data_free}
    return spec_for_many(wanted, project=asked, settings=settings, **more)


def preview(spec: Spec, json_file: Path | None) -> None:
    """Say what would be erased, what instead, and which kept concepts are most endangered; nothing is made."""
    from flows.erasing.many import foretold

    table = Table("erased", "gives", title=f"{len(spec.pairs)} concepts by {spec.method}, erasure {spec.id}")
    for one in spec.pairs:
        table.add_row(one.concept, one.surrogate)
    console.print(table)
    risks = foretold(spec)
    table = Table("kept", "moved", "neighbour", title=f"Most endangered of {len(risks)}")
    for risk in risks[:SHOWN]:
        table.add_row(risk.concept, f"{risk.moved:.3f}", "yes" if risk.near else "")
    console.print(table)
    console.print("Moved: how far the closed form moves the text states of its captions, in parts of what it moves the")
    console.print("erased ones. It ranks, and is no forecast of a rate. Nothing was made.")
    pairs = [{"concept": one.concept, "surrogate": one.surrogate} for one in spec.pairs]
    rows = [{"concept": risk.concept, "moved": risk.moved, "neighbour": risk.near} for risk in risks]
    write_figures(json_file, {"erasure": spec.id, "method": spec.method, "pairs": pairs, "kept": rows})
