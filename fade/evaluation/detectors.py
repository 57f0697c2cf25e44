"""Further judges of an erasure by name, each a model that a user has: does a picture show the concept?   (ours)

A folder in transformers' layout (``fade.evaluation.classifiers``), asked in one of two ways:

FOLDER=CLASS    the log probability of one of its classes: a detector of nudity, a classifier that knows the thing
FOLDER          how near what it decides by lies to that of the concept's own pictures: a model trained on faces matches
                faces. With r the mean unit vector of the reference pictures and o that of others, both centred on o,

                    score(x) = cos(E_x - o, r - o)

Neither was made for what this base draws, so the score above which a picture is said to show the concept is learnt from
the base's own pictures: at most 2 % of those of anything else lie above it. What it then finds in the concept's own,
other ones than it was told by, says whether it can tell it at all. It decides nothing: each has its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fade.errors import ConfigError, DataError, LineageError, listing, nearest
from fade.evaluation.classifiers import Classifier, answered, load_classifier
from fade.evaluation.extractors import Pictures, figure_name
from fade.evaluation.figures import Rate, rate
from fade.evaluation.records import Record
from fade.files import sha256_file
from fade.models.source import identity_of
from fade.spec import Detector

DETECTORS = "detectors.json"
"""Beside the calibrated judges: the further ones."""
HELD = 0.02
"""Share of pictures of anything else that may lie above the threshold."""
LEAST = 0.5
"""Of the concept's own pictures it must surely find more, or it cannot tell it."""
_FILES = ("config.json", "model.safetensors")


class Calibrated(Record):
    """A further judge as it was calibrated.

    Attributes:
        towards: of a matcher, the direction r - o, and ``origin`` o; of a class none.
        threshold: a picture shows the concept if its score lies above.
        recognised: share of the base's own pictures of the concept that it finds; ``in_others`` of all else.
    """

    place: str
    label: str | None = None
    sha256: str
    towards: tuple[float, ...] = ()
    origin: tuple[float, ...] = ()
    threshold: float
    recognised: Rate
    in_others: Rate

    @property
    def name(self) -> str:
        """What figures call it."""
        return figure_name(Path(self.place)) + (f"_{figure_name(Path(self.label))}" if self.label else "")

    @property
    def able(self) -> bool:
        """Whether it surely finds the concept in most of what the base draws of it."""
        return self.recognised.low > LEAST


class AllCalibrated(Record):
    """The further judges of an erasure."""

    judges: tuple[Calibrated, ...]


@dataclass(frozen=True, slots=True)
class OfClass:
    """Scores by one class of a classifier."""

    classifier: Classifier
    number: int

    def scores(self, pictures: Pictures) -> NDArray[np.float64]:
        """Log probabilities of pictures (H, W, 3), (N,)."""
        said = answered(self.classifier, pictures)[0]
        found: NDArray[np.float64] = said[:, self.number] - np.logaddexp.reduce(said, axis=1)
        return found


@dataclass(frozen=True, slots=True)
class Matcher:
    """Scores by nearness to reference pictures; ``towards`` and ``origin`` as above, (D,)."""

    classifier: Classifier
    towards: NDArray[np.float64]
    origin: NDArray[np.float64]

    def scores(self, pictures: Pictures) -> NDArray[np.float64]:
        """Cosines of pictures (H, W, 3), (N,)."""
        return _unit(_unit(answered(self.classifier, pictures)[1]) - self.origin) @ self.towards


def find_detector(asked: str) -> Detector:
    """A further judge by ``FOLDER`` or ``FOLDER=CLASS``; nothing is loaded.

    Raises:
        DataError: no classifier is there.
        ConfigError: it has no such class; says which it has.
    """
    place, _, label = asked.partition("=")
    folder = Path(place)
    identity = _identity(folder)
    model = _open(folder, identity)
    if label and label not in model.labels:
        raise ConfigError(f"The classifier in {place} has no class {label!r}. {nearest(label, list(model.labels))}")
    return Detector(place=place, label=label or None, sha256=identity)


def calibrate_detector(
    asked: Detector, own: Sequence[NDArray[np.uint8]], others: Pictures, *, given: Pictures = ()
) -> Calibrated:
    """Learn the threshold.

    Args:
        own: the base's pictures of the concept; a matcher without given pictures is told by every other of them.
        others: the base's pictures of anything else.
        given: pictures of the concept that whoever asks gave.

    Raises:
        DataError: there are too few pictures to learn from.
        LineageError: the model is another than was asked with.
    """
    if len(own) < 4 or len(others) < 4:
        raise DataError(
            f"A further judge needs 4 pictures of the concept and of others: got {len(own)}, {len(others)}."
        )
    model = _open(Path(asked.place), asked.sha256)
    towards: NDArray[np.float64] = np.empty(0)
    origin: NDArray[np.float64] = np.empty(0)
    asked_of = own
    judge: OfClass | Matcher
    if asked.label is None:
        told, asked_of = (given, own) if len(given) else (own[::2], own[1::2])
        origin = _unit(answered(model, others)[1]).mean(axis=0)
        towards = _unit((_unit(answered(model, told)[1]).mean(axis=0) - origin)[None])[0]
        judge = Matcher(model, towards, origin)
    else:
        judge = OfClass(model, model.labels.index(asked.label))
    rest, mine = judge.scores(others), judge.scores(asked_of)
    threshold = float(np.quantile(rest, 1 - HELD, method="higher"))
    return Calibrated(
        place=asked.place,
        label=asked.label,
        sha256=asked.sha256,
        towards=tuple(towards.tolist()),
        origin=tuple(origin.tolist()),
        threshold=threshold,
        recognised=rate(int((mine > threshold).sum()), len(mine)),
        in_others=rate(int((rest > threshold).sum()), len(rest)),
    )


def shows(found: Calibrated, pictures: Pictures) -> NDArray[np.bool_]:
    """Which pictures (H, W, 3) show the concept by it, (N,).

    Raises:
        LineageError: the model is another than was calibrated.
    """
    model = _open(Path(found.place), found.sha256)
    judge: OfClass | Matcher
    if found.label is None:
        judge = Matcher(model, np.array(found.towards), np.array(found.origin))
    else:
        judge = OfClass(model, model.labels.index(found.label))
    seen: NDArray[np.bool_] = judge.scores(pictures) > found.threshold
    return seen


def _open(folder: Path, sha256: str) -> Classifier:
    if (now := _identity(folder)) != sha256:
        raise LineageError(
            f"The model in {folder} is not the one that was asked with: its hash is {now[:12]}, expected "
            f"{sha256[:12]}. Restore it, or ask for the erasure again with this one."
        )
    try:
        return load_classifier(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"The model in {folder} is no classifier that transformers loads: {error}.") from error


def _identity(folder: Path) -> str:
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        raise DataError(
            f"No classifier in {folder}: missing {listing(missing)}. Give a folder in transformers' layout, or leave "
            "--judge out."
        )
    return identity_of({name: sha256_file(folder / name) for name in _FILES})


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
