"""What an evaluation finds out about an erasure, or about several together: their ``metrics.json``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fade.evaluation.attacked import Attacks
from fade.evaluation.figures import JudgeFigures, Judges, Rate
from fade.evaluation.records import ByName, Count, Counted, Record, Share
from fade.evaluation.verdicts import Verdict

Distance = Annotated[float, Field(ge=0)]


class FeatureDistances(Record):
    """Distances of the retained pictures in the features of a model that the spec names."""

    name: str
    fid: Distance
    kid: float

    def flat(self) -> dict[str, float]:
        """``fid_NAME`` and ``kid_NAME``."""
        return {f"fid_{self.name}": self.fid, f"kid_{self.name}": self.kid}


class ClipScores(Record):
    """Mean CLIP scores, 0 to 100, of a CLIP that the spec names; None where there are no such prompts.

    Attributes:
        retained: of the pictures whose prompts name no erased concept; ``erased`` of the others.
        retained_base, erased_base: the same of the base's pictures.
    """

    name: str
    retained: float | None = None
    erased: float | None = None
    retained_base: float | None = None
    erased_base: float | None = None

    def flat(self) -> dict[str, float]:
        """``clip_score_NAME`` with ``_erased`` and ``_base``."""
        name = f"clip_score_{self.name}"
        found = {name: self.retained, f"{name}_erased": self.erased}
        found |= {f"{name}_base": self.retained_base, f"{name}_erased_base": self.erased_base}
        return {key: value for key, value in found.items() if value is not None}


class Measured(Record):
    """What was measured of adapters that are on a base together.

    Attributes:
        samples: pictures before, and as many after, at equal prompts and ``seeds``.
        drift: RMS distance of retained pictures to the base's, 0 to 1; ``change_of_concept`` of the others.
        perceptual_drift, fid_judge, kid_judge: distances of the retained pictures in the report judge's features.
        attacks: those that the gate asks for.
    """

    samples: Counted
    seeds: tuple[int, ...]
    neighbours: tuple[str, ...]
    judges: Judges
    gate: Verdict
    attacks: Attacks = Field(default=Attacks({}), exclude_if=lambda attacks: not attacks)
    drift: Share
    change_of_concept: Share
    perceptual_drift: Distance
    fid_judge: Distance
    kid_judge: float
    features: FeatureDistances | None = None
    clip: ClipScores | None = None

    @property
    def report(self) -> JudgeFigures:
        """Figures of the judge that reports."""
        return self.judges.report

    def distances(self) -> dict[str, float]:
        """Every distance and score by the name that tables have for it."""
        found = {name: getattr(self, name) for name in ("perceptual_drift", "fid_judge", "kid_judge")}
        for given in (self.features, self.clip):
            if given is not None:
                found |= given.flat()
        return found


class Detected(Record):
    """What a further judge sees in the pictures of the erased concept's own prompts.

    Attributes:
        able: whether it could tell the concept in other pictures of the base; where not, its figures mean nothing.
        before, after: share of these pictures that show the concept.
    """

    name: str
    able: bool
    before: Rate
    after: Rate


class Evaluation(Measured):
    """An erasure's ``evaluation/metrics.json``; ``detectors``: further judges of an erasure by name."""

    adapter_sha256: str
    adapter_bytes: Count
    detectors: tuple[Detected, ...] = Field((), exclude_if=lambda found: not found)


class Combination(Measured):
    """The ``metrics.json`` of erasures judged together; ``adapters`` by the erasures' ids."""

    adapters: ByName[str]
