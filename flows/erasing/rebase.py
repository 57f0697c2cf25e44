"""Rebase: every live erasure made again on a new base, judged there; nothing is approved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from fade.asking.by_kind import settings_asked
from fade.asking.prepare import asked_again, prepare_spec
from fade.errors import ConfigError, FadeError
from fade.models.source import find_base
from fade.project import Project
from fade.spec import Spec, load_spec
from flows.erasing.erase import erase, prepare_folder
from flows.settings import ERASURES
from tasks.mlflow import tracking
from tasks.mlflow.tracking import MODEL_PREFIX, AdapterVersion


@dataclass(frozen=True, slots=True)
class Rebased:
    """One live erasure on the new base: its version there, or the reason why there is none."""

    old: str
    new: AdapterVersion | None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether it may be approved there."""
        return self.new is not None and self.new.gate == "passed"


def rebase(project: Project, base: str, say: Callable[[str], None]) -> list[Rebased]:
    """Run a project's approved erasures again on another base, with their own settings; one that fails stops no other.

    A project's erasures are those made on the base that its params.yaml names: it names the new one afterwards.

    Raises:
        ConfigError: nothing is approved on the project's base.
        BaseModelError: there is no other base that could be loaded.
    """
    approved = [version for version in tracking.versions() if version.live]
    specs = [load_spec(ERASURES / version.model.removeprefix(MODEL_PREFIX)) for version in approved]
    live = [(version, spec) for version, spec in zip(approved, specs, strict=True) if spec.base == project.base]
    if not live:
        raise ConfigError(f"Nothing is approved on the base {project.base}, so nothing has to be made again.")
    find_base(base)
    found = []
    for version, before in live:
        say(f"{version.model} version {version.version} ...")
        try:
            spec = on_base(before, project.at(base=base))
            if spec.base_sha256 == version.base_sha256:
                raise ConfigError(f"It is live on the base in {base} already.")
            prepare_folder(spec)
            found.append(Rebased(f"{version.model}/{version.version}", erase(spec.id)))
        except FadeError as error:
            found.append(Rebased(f"{version.model}/{version.version}", None, str(error)))
    return found


def on_base(spec: Spec, project: Project) -> Spec:
    """The same spec for another base: that of ``project``.

    Raises:
        ConfigError: another tool's adapter cannot be made again.
        BaseModelError: the base is missing or not supported.
    """
    if spec.imported is not None:
        raise ConfigError("Another tool made this adapter, for its own base: it cannot be made again here.")
    settings = settings_asked(spec)
    # A point is one of those that were tried on the former base: on another they are found anew.
    settings = settings.model_copy(update={"tune": settings.tune.model_copy(update={"point": None})})
    first, *also = map(asked_again, spec.pairs)
    return prepare_spec(
        **{field.name: getattr(first, field.name) for field in fields(first)},
        project=project.at(catalog=spec.catalog, judges=spec.judges),
        settings=settings,
        also=also,
        data_free=spec.data_free,
    )
