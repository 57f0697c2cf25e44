"""Picture sets: what a loader hands to the intake, not yet decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fade.concepts import CAPTION_TEMPLATE, PARAPHRASES, PLAIN_STYLE

PHOTO_TEMPLATES = ("a photo of {object}", "a picture of {object}", "{object}")
STYLE_TEMPLATES = (CAPTION_TEMPLATE, *PARAPHRASES)


@dataclass(frozen=True, slots=True)
class Item:
    """One picture of a set, not yet decoded.

    Attributes:
        image_id: its id in the catalog, unique there; also the name of the stored file.
        name: how a report names it (a path within the set).
        source: file, bytes or pixels.
        group: pictures that must stay in one split.
        subject: opaque reference of whom it shows, for deletion requests.
    """

    image_id: str
    name: str
    source: Path | bytes | NDArray[np.uint8]
    object: str
    style: str = PLAIN_STYLE
    split: str | None = None
    group: str | None = None
    caption: str | None = None
    subject: str | None = None
    person: bool = False
    attributes: tuple[str, ...] = ()
    origin: str | None = None
    licence: str | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A picture or row that was set aside, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class PictureSet:
    """What a loader gives: the pictures in a fixed order, and what is true of all of them.

    Attributes:
        domain: what the set calls its subjects.
        person: whether its subjects are human beings.
        own_captions: whether each picture brings its caption.
        concepts: entries of concepts.json known beforehand, in order; others follow as they are seen.
    """

    items: Iterable[Item | Rejected]
    source: str
    domain: str = "object"
    person: bool = False
    templates: tuple[str, ...] = PHOTO_TEMPLATES
    own_captions: bool = False
    licence: str = "unknown"
    concepts: tuple[dict[str, Any], ...] = ()
