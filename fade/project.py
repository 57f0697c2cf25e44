"""What one project is: a base model, the catalog and judges that go with it, and what must not be chosen against.

It is the section ``project`` of a params.yaml, read once and handed down as a value. The shipped params.yaml is that
of the built-in canvas; ``fade init`` writes one for a model of one's own. Several projects share one workspace: its
ledger, its MLflow, its DVC. Erasures are named by a hash of all that is asked, the base's hash among it, so that those
of two projects never meet in a folder or a registered model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fade.errors import ConfigError, DataError, listing
from fade.files import read_yaml

PARAMS = Path("params.yaml")
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""What a project's name looks like: it stands in the ledger, in messages and in logs."""


class Project(BaseModel):
    """A base model and what is needed to erase from it. Paths are relative to the workspace's root.

    Attributes:
        params: the file it was read from; its section ``erasure`` holds the settings of each step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME, description="What messages, the ledger and logs call it")
    catalog: str = Field(min_length=1, description="Folder of the picture catalog")
    base: str = Field(
        min_length=1, description="Base model: a diffusers folder, a .safetensors file, or a Hugging Face name"
    )
    judges: str = Field(min_length=1, description="Folder of the judges that know the catalog's concepts")
    protected: tuple[str, ...] = Field((), description="Concepts that `auto` never chooses as a surrogate")
    render: Literal["canvas"] | None = Field(
        None, description="What a missing catalog is rendered from; left out where the pictures are one's own"
    )
    clip: str | None = Field(
        None,
        min_length=1,
        description="CLIP that judges what is erased by name alone: a folder or a Hugging Face name",
        exclude_if=lambda place: place is None,
    )
    params: Path = Field(PARAMS, exclude=True)

    @property
    def by_name(self) -> bool:
        """Whether there is a CLIP and no catalog, so that all there is to erase by are names."""
        has_catalog = self.render is not None or (Path(self.catalog) / "catalog.parquet").is_file()
        return self.clip is not None and not has_catalog

    def at(self, *, base: str | None = None, catalog: str | None = None, judges: str | None = None) -> Project:
        """The same project with other places for this once; None leaves one as it is."""
        places = {"base": base, "catalog": catalog, "judges": judges}
        return self.model_copy(update={name: place for name, place in places.items() if place is not None})

    def section(self, name: str) -> dict[str, Any]:
        """Another section of its params.yaml, e.g. ``judges``.

        Raises:
            ConfigError: the file has no such section.
        """
        found = read_yaml(self.params).get(name)
        if not isinstance(found, dict):
            raise ConfigError(f"{self.params} has no section {name!r}. Copy it from the params.yaml that ships.")
        return found


@dataclass(frozen=True, slots=True)
class Projects:
    """Those that a command, a worker or an intake serves; names are unique."""

    served: tuple[Project, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in the order in which they were given."""
        return tuple(one.name for one in self.served)

    def chosen(self, name: str | None) -> Project:
        """The project of a name; without a name the only one.

        Raises:
            DataError: no project of that name is served, or several are and none is named.
        """
        if name is None:
            if len(self.served) == 1:
                return self.served[0]
            raise DataError(f"No project is named, and {len(self.served)} are served. Name one: {listing(self.names)}.")
        found = next((one for one in self.served if one.name == name), None)
        if found is None:
            # The name is not repeated: a sender wrote it, and the reason of a dead letter is kept.
            raise DataError(f"The project that is named is not served here. Served: {listing(self.names)}.")
        return found


def load_project(path: Path = PARAMS) -> Project:
    """The section ``project`` of a params.yaml; ``path`` is the file, or the folder that holds it.

    Raises:
        ConfigError: there is no such file or section, or a field of it is missing or wrong.
    """
    file = path / PARAMS.name if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"There is no project in {path}: expected a params.yaml there. `fade init {path} --base MODEL` writes one."
        )
    section = read_yaml(file).get("project")
    if not isinstance(section, dict):
        raise ConfigError(
            f"{file} has no section 'project'. Expected name, catalog, base and judges; `fade init` writes one."
        )
    return make_project(section, file)


def make_project(section: dict[str, Any], file: Path) -> Project:
    """A project from its fields, which stand in a file or are about to.

    Raises:
        ConfigError: names every field that is missing or wrong.
    """
    try:
        return Project(**{**section, "params": file})
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            + ("" if fault["type"] == "missing" else f" (got {fault['input']!r})")
            for fault in error.errors(include_url=False)
        ]
        raise ConfigError(f"Section 'project' of {file}: {listing(faults, 10)}.") from None


def load_projects(paths: Sequence[Path] = (PARAMS,)) -> Projects:
    """Several projects, for what serves them all.

    Raises:
        ConfigError: as ``load_project``; or two of them have one name.
    """
    found = tuple(load_project(path) for path in paths)
    for one in found:
        if same := [str(other.params) for other in found if other.name == one.name and other is not one]:
            raise ConfigError(
                f"Two projects are called {one.name!r}: {one.params} and {same[0]}. Change `project.name` in one."
            )
    return Projects(found)
