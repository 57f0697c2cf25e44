"""A judge that anyone has: a CLIP that compares pictures with the concepts' names, calibrated on the base's   (ours).

A class is the mean of its sentences' unit vectors, E_c. What the CLIP says of a picture is how far it lies above what
it says of pictures of anything else that the base draws:

    score_c(x) = cos(E_x, E_c) - b_c,    b_c = mean of cos(E_y, E_c) over base's pictures y of other classes

The mean is over the means of the other classes, so that none counts more for having more pictures. Without it, names
that a CLIP finds in everything ("photo") would win everywhere. A picture is called by the class of the highest score,
and ``scrambled`` where sentences that say so win, or, if these do not tell shuffled patches, where that score is lower
than what they reach: each of these in at most 2 % of the base's whole pictures, and in none where it need not be.

Names that it does not find in what the base draws of them are left out of its classes: it could not miss them. Never
those of the erased concept and its surrogate: what it says of these is measured, and the gate refuses to listen where
it is too little (``unjudged``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fade.errors import LineageError
from fade.evaluation.clip_score import Clip, clip_sha256, embedded_pictures, embedded_texts, load_clip
from fade.evaluation.damage import SCRAMBLED
from fade.evaluation.judges import ZERO_SHOT, PictureJudge, Verdict, described, load_judge
from fade.files import write_json, writing
from fade.words import sentence

NOBODY = "none"
"""In the place of a CLIP: nobody judges."""
SENTENCES = {
    "object": ("a {object}", "a picture of a {object}", "an image of a {object}", "a photo of a {object}"),
    "style": (
        "an image in {style} style",
        "a {style} picture",
        "a picture in {style} style",
        "an artwork in the style of {style}",
    ),
}
DAMAGED = (f"a {SCRAMBLED} image", f"a {SCRAMBLED} picture", "random patches", "noise")
HELD = 0.02
"""Share of whole pictures that may be called scrambled."""
REMEMBERED = 20_000
"""Pictures whose vectors a CLIP keeps."""
MISSED = 0.1
"""Share of shuffled ones that sentences may miss before the height of scores is asked too, which costs whole ones."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of one domain.

    Attributes:
        names: without ``scrambled``.
        texts: a unit vector each, that of ``scrambled`` last, (C + 1, D).
        level: b_c, (C + 1,).
        least: below this score a picture is scrambled.
    """

    names: tuple[str, ...]
    texts: Tensor
    level: Tensor
    least: float

    def scores(self, pictures: Tensor) -> Tensor:
        """Of embedded pictures (N, D): (N, C + 1)."""
        return pictures @ self.texts.T - self.level

    def called(self, pictures: Tensor) -> list[str]:
        """The name of each picture's class."""
        best, which = self.scores(pictures).max(dim=1)
        named = (*self.names, SCRAMBLED)
        return [
            named[i] if score >= self.least else SCRAMBLED
            for score, i in zip(best.tolist(), which.tolist(), strict=True)
        ]


class Seen:
    """A CLIP that looks at each picture once: both judges ask it, and features are asked of the same pictures."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._vectors: dict[bytes, Tensor] = {}

    def __call__(self, pictures: NDArray[np.uint8]) -> Tensor:
        """Unit vectors of pictures (N, H, W, 3), (N, D)."""
        keys = [hashlib.sha256(one.tobytes()).digest() for one in pictures]
        new = {key: one for key, one in zip(keys, pictures, strict=True) if key not in self._vectors}
        if len(self._vectors) + len(new) > REMEMBERED:
            self._vectors.clear()
            new = dict(zip(keys, pictures, strict=True))
        if new:
            self._vectors |= dict(zip(new, embedded_pictures(self.clip, list(new.values())), strict=True))
        return torch.stack([self._vectors[key] for key in keys])


class ZeroShot:
    """A CLIP as a judge; of ``clip`` None, nobody: everything is scrambled."""

    def __init__(self, clip: Seen | None, classes: Mapping[str, Classes]) -> None:
        self.clip, self.classes = clip, dict(classes)
        self.objects, self.styles = ((*classes[kind].names, SCRAMBLED) for kind in ("object", "style"))

    def named(self, pictures: NDArray[np.uint8]) -> Verdict:
        """The object and style of pictures (N, H, W, 3) uint8."""
        if self.clip is None or len(pictures) == 0:
            return Verdict([SCRAMBLED] * len(pictures), [SCRAMBLED] * len(pictures))
        seen = self.clip(pictures)
        return Verdict(self.classes["object"].called(seen), self.classes["style"].called(seen))

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The CLIP's unit vectors, (N, D); of nobody the pictures themselves, 8 x 8."""
        found: NDArray[np.float64] = self._seen(pictures).double().numpy()
        return found

    def layers(self, pictures: NDArray[np.uint8]) -> Iterator[Tensor]:
        """The same as one layer, (N, D, 1, 1)."""
        yield self._seen(pictures)[:, :, None, None]

    def _seen(self, pictures: NDArray[np.uint8]) -> Tensor:
        if self.clip is not None:
            return self.clip(pictures)
        small = F.adaptive_avg_pool2d(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, 8)
        return small.flatten(1)


def class_texts(clip: Clip, kind: str, names: Sequence[str], *, sentences: int) -> Tensor:
    """The unit vector of each name, and of ``scrambled`` last, (C + 1, D); the mean over so many sentences."""
    said = SENTENCES[kind][:sentences]
    texts = [[sentence(one, **{kind: name}) for one in said] for name in names] + [list(DAMAGED)]
    flat = embedded_texts(clip, [one for group in texts for one in group])
    means = [part.mean(dim=0) for part in flat.split([len(group) for group in texts])]
    return F.normalize(torch.stack(means), dim=-1)


def calibrated(
    names: Sequence[str], texts: Tensor, pictures: Tensor, shown: Sequence[str], shuffled: Tensor
) -> Classes:
    """Classes with their levels and the least score, from the base's own pictures.

    Args:
        texts: of the names, that of ``scrambled`` last.
        pictures, shuffled: embedded, (N, D): whole, and the same with shuffled patches.
        shown: what was asked for in each whole picture; a name that is none of ``names`` counts as anything else.
    """
    said = pictures @ texts.T
    labels = np.asarray(shown, dtype=object)
    kinds = sorted(set(shown))
    means = torch.stack([said[torch.from_numpy(labels == kind)].mean(dim=0) for kind in kinds])
    level = torch.stack(
        [means[[kind != name for kind in kinds]].mean(dim=0)[i] if set(kinds) - {name} else means.mean(dim=0)[i]
         for i, name in enumerate((*names, SCRAMBLED))]
    )  # fmt: skip
    told = shuffled @ texts.T
    best, mush = ((one - level)[:, :-1].amax(dim=1) for one in (said, told))
    # What says "scrambled" wins as many deviations from whole pictures as from shuffled ones, and in no more whole
    # pictures than may be called so.
    whole, damage = said[:, -1] - best, told[:, -1] - mush
    spread = [one.std(correction=0).clamp(min=1e-6) for one in (whole, damage)]
    between = (whole.mean() * spread[1] + damage.mean() * spread[0]) / (spread[0] + spread[1])
    level[-1] = torch.maximum(between, whole.quantile(1 - HELD))
    missed = mush[damage <= level[-1]]
    least = float(best.min())
    if len(missed) > MISSED * len(mush):
        # What the text does not tell, the height of a score may; whole pictures stay what they are called.
        least = min(float(best.quantile(HELD)), float(missed.quantile(1 - HELD)))
    return Classes(tuple(names), texts, level, least)


def save_zero_shot(folder: Path, name: str, *, clip: str, classes: Mapping[str, Classes]) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json``."""
    tensors: dict[str, Tensor] = {}
    for kind, one in classes.items():
        tensors |= {f"{kind}.texts": one.texts.clone(), f"{kind}.level": one.level.clone()}
        tensors[f"{kind}.least"] = torch.tensor(one.least)
    with writing(folder / f"{name}.safetensors") as temporary:
        save_file(tensors, temporary)
    known: dict[str, Any] = {f"{kind}s": list(one.names) for kind, one in classes.items()}
    identity = None if clip == NOBODY else clip_sha256(clip)
    write_json(folder / f"{name}.json", {"architecture": ZERO_SHOT, "clip": clip, "clip_sha256": identity, **known})


def open_judge(folder: Path, name: str, *, called: Iterable[str] = ()) -> PictureJudge:
    """A judge of any kind: one that was trained, or a CLIP.

    Args:
        called: as ``load_judge``; a CLIP is told its names as the catalog spells them.

    Raises:
        DataError: its files are missing.
    """
    config = described(folder, name)
    if config["architecture"] == ZERO_SHOT:
        return load_zero_shot(folder, name, config)
    return load_judge(folder, name, called=called)


def load_zero_shot(folder: Path, name: str, config: Mapping[str, Any]) -> ZeroShot:
    """Read one.

    Raises:
        DataError: the CLIP is not there.
        LineageError: it is another one than was calibrated.
    """
    place, tensors = config["clip"], load_file(folder / f"{name}.safetensors")
    if place != NOBODY and (found := clip_sha256(place)) != config["clip_sha256"]:
        raise LineageError(
            f"The CLIP in {place} is not the one that was calibrated: its hash is {found[:12]}, expected "
            f"{config['clip_sha256'][:12]}. Restore it, or ask for the erasure again with this one."
        )
    classes = {
        kind: Classes(
            tuple(config[f"{kind}s"]),
            tensors[f"{kind}.texts"],
            tensors[f"{kind}.level"],
            float(tensors[f"{kind}.least"]),
        )
        for kind in ("object", "style")
    }
    return ZeroShot(None if place == NOBODY else _loaded(place, config["clip_sha256"]), classes)


@lru_cache(maxsize=1)
def _loaded(place: str, _: str) -> Seen:
    """A judge is asked several times in an evaluation."""
    return Seen(load_clip(place))
