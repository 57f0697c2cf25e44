"""The spec of an erasure: what is erased, instead of what, from which base and pictures, and all settings.

It stands in the erasure's folder as ``spec.yaml``, and its hash is the erasure's name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from fade.config import Settings, StrictModel, explained
from fade.files import read_yaml, writing
from fade.names import name_key

GENERATED = "generated"
"""In the folder of a data-free erasure: the pictures that the base drew, as a catalog."""
CALIBRATED = "judges"
"""In the folder of an erasure by name: the CLIP as its judges, and what they can tell as a catalog without pictures."""
POINTS = "points"
"""In the folder of an erasure that found its own settings: what was tried, each point with its adapter."""
ATTACKED = "attacked.json"
"""In the folder of an erasure whose gate asks for attacks: their figures."""


class Pair(StrictModel):
    """A concept that is erased, and what its prompts shall give instead: a concept's name, or ``nothing``.

    Attributes:
        aliases: other names that bring it up: the catalog's, and those that whoever asked gave.
        image_ids: pictures that must be forgotten: its forget set is these (and those of ``subjects``) alone.
        subjects: opaque references of those whose pictures must be forgotten.
        overwrite: picture id to what it gives way to instead of ``surrogate``: a concept or ``nothing``.
    """

    concept: str = Field(min_length=1)
    kind: Literal["object", "style"]
    surrogate: str = Field(min_length=1)
    person: bool = False
    aliases: tuple[str, ...] = ()
    image_ids: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    overwrite: dict[str, str] = Field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The words that bring the concept up."""
        return (self.concept, *self.aliases)

    @model_validator(mode="after")
    def _differ(self) -> Pair:
        if name_key(self.surrogate) in {name_key(name) for name in self.names}:
            raise ValueError(
                f"the surrogate must differ from the concept: got {self.surrogate!r} for both. "
                "Name what its prompts shall give instead"
            )
        return self


class Detector(StrictModel):
    """A further judge of an erasure by name (fade/evaluation/detectors.py).

    Attributes:
        place: its folder.
        label: the class that is asked for; None: it matches pictures.
        sha256: the identity of its files.
    """

    place: str = Field(min_length=1)
    label: str | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Spec(Settings, Pair):
    """One erasure, whole: what, instead of what, from which base and pictures, and how.

    Paths are relative to the project's root.

    Attributes:
        also: further concepts that the same adapter erases, each with pictures of its own where some are named.
        neighbours: concepts nearest those erased, of which ``split.neighbour_factor`` times as many are retained.
        data_free: no pictures are left: the base itself draws them (fade/steps/generate.py).
        by_name: there was neither catalog nor judge, but a name (fade/asking/by_name.py): ``catalog`` is what was
            planned, and ``judges`` the place of a CLIP, or ``none``.
        clip_sha256: the identity of that CLIP.
        detectors: further judges, each with its row; they decide nothing.
        surrogate_why: why ``auto`` took this surrogate, without a name; no part of what is asked.
        by_kind: settings, dotted, that nobody gave, so that they are the base's kind's (fade/asking/by_kind.py).
        imported: hash of another tool's adapter that is judged instead of one made here (``fade import``).
    """

    also: tuple[Pair, ...] = ()
    neighbours: tuple[str, ...] = ()
    data_free: bool = False
    by_name: bool = Field(False, exclude_if=lambda asked: not asked)
    clip_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", exclude_if=lambda found: found is None)
    detectors: tuple[Detector, ...] = Field((), exclude_if=lambda asked: not asked)
    surrogate_why: str = ""
    by_kind: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    imported: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    base: str
    base_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    catalog: str
    judges: str

    @model_validator(mode="after")
    def _apart(self) -> Spec:
        erased = [name_key(pair.concept) for pair in self.pairs]
        if twice := sorted({name for name in erased if erased.count(name) > 1}):
            raise ValueError(f"a concept is erased once: got {', '.join(twice)} more than once")
        instead = {name for pair in self.pairs for name in (pair.surrogate, *pair.overwrite.values())}
        if back := sorted(name for name in instead if name_key(name) in erased):
            raise ValueError(
                f"a surrogate must not be erased itself: got {', '.join(back)} as both. Choose another surrogate"
            )
        if self.by_name and not self.data_free:
            raise ValueError("an erasure by name has no pictures: expected data_free with by_name")
        if self.by_name and self.clip_sha256 is None and self.gate.recognised == 0:
            raise ValueError(
                "nobody judges, and gate.recognised is 0, so that everything would pass: ask for more than 0, or name "
                "a CLIP that judges"
            )
        if self.data_free and any(pair.image_ids or pair.subjects or pair.overwrite for pair in self.pairs):
            raise ValueError(
                "pictures and subjects are named where there are none: data_free draws pictures of the concept. "
                "Leave out one or the other"
            )
        return self

    def picture_catalog(self, folder: Path) -> Path:
        """The catalog whose pictures the splits are made of; of a data-free erasure its own, in its folder."""
        return folder / GENERATED if self.data_free else Path(self.catalog)

    def judges_folder(self, folder: Path) -> Path:
        """The judges' files; of an erasure by name its own, in its folder: a CLIP is calibrated for each."""
        return folder / CALIBRATED if self.by_name else Path(self.judges)

    def as_judged(self, folder: Path) -> Spec:
        """The spec as whoever judges reads it: of an erasure by name judges, and what they can see, are its own."""
        if not self.by_name:
            return self
        own = str(self.judges_folder(folder))
        return self.model_copy(update={"judges": own, "catalog": own})

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """All that is erased, the first concept first."""
        first = Pair(**{name: getattr(self, name) for name in Pair.model_fields})
        return (first, *self.also)

    @property
    def why_fixed(self) -> str:
        """Why nothing is found by itself, in words; empty if settings are."""
        if self.by_name:
            return "it is erased by its name alone, without judges that were made for its pictures"
        if self.also:
            return "several concepts are erased together"
        if self.overwrite:
            return "pictures have surrogates of their own"
        return super().why_fixed

    @property
    def id(self) -> str:
        """The erasure's name: a hash of all that is asked, so the same spec is the same erasure."""
        content = json.dumps(self.model_dump(mode="json", exclude={"surrogate_why"}), sort_keys=True)
        return "e" + hashlib.sha256(content.encode()).hexdigest()[:11]


def make_spec(**fields: Any) -> Spec:
    """Build a spec.

    Raises:
        ConfigError: names every faulty field, what was got and what is expected.
    """
    try:
        return Spec(**fields)
    except ValidationError as error:
        raise explained(error, "The spec is not valid") from None


def load_spec(folder: Path) -> Spec:
    """The spec in an erasure's folder (``spec.yaml``)."""
    return make_spec(**read_yaml(folder / "spec.yaml"))


def save_spec(spec: Spec, folder: Path) -> None:
    """Write ``spec.yaml``."""
    with writing(folder / "spec.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
