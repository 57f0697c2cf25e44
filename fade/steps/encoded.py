"""The splits of an erasure, encoded: latents and prompts as the method takes them."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fade.data.catalog import load_pictures, read_concepts_file
from fade.errors import DataError
from fade.methods.fade.examples import Examples
from fade.models.base import READ_AT_ONCE, Base
from fade.models.denoiser import autocast
from fade.models.told import Told
from fade.seeding import numpy_generator
from fade.spec import Spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SplitRows:
    """Rows of splits whose pictures and captions are encoded when they are asked for.

    The teacher's prompt is the surrogate caption where there is one. Pictures are encoded as training computes:
    in bfloat16 where that is fast.
    """

    sd: Base
    spec: Spec
    folder: Path
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def at(self, shares: Tensor) -> SplitRows:
        """Those at these shares of the way from first to last, (n,) in [0, 1): without encoding the others."""
        return replace(self, table=self.table.iloc[(shares * len(self)).long().clamp(max=len(self) - 1).numpy()])

    def whose(self) -> list[str]:
        """Of the split ``forget``: the erased concept that each row shows, the first where it shows several."""
        pairs = self.spec.pairs
        place = {(pair.kind, pair.concept): number for number, pair in enumerate(pairs)}
        shown = zip(self.table["object"], self.table["style"], strict=True)
        kinds = ((("object", one), ("style", style)) for one, style in shown)
        return [pairs[min(place[one] for one in both if one in place)].concept for both in kinds]

    def encoded(self, most: int | None = None) -> Examples:
        """All of them; of more than ``most`` so many, drawn by the splits' seed."""
        if most is not None and most < len(self):
            order = numpy_generator(self.spec.split.seed, "encoded").permutation(len(self))[:most]
            return replace(self, table=self.table.iloc[np.sort(order)]).encoded()
        return Examples(self.latents(), *self.captions())

    def latents(self) -> Tensor:
        """Of their pictures, (N, C, h, w) float32."""
        pictures = load_pictures(self.spec.picture_catalog(self.folder), self.table)
        with autocast(self.spec.distill.precision, self.sd.device.type):
            return self.sd.encode_pictures(pictures).float()

    def captions(self) -> tuple[Told, Told]:
        """What the student and what the teacher is told, a row each."""
        told = self.table["caption"]
        taught = self.table.get("surrogate_caption", told)
        return self.sd.encode_prompts(told.tolist()), self.sd.encode_prompts(taught.tolist())

    def drawn(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` of them, with replacement."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return replace(self, table=self.table.iloc[rows.numpy()]).encoded()


def prompts_apart(spec: Spec, folder: Path, *, splits: str = "*", further: bool = True) -> list[str] | None:
    """Every caption that is read, for encoders that are gone before the denoiser is loaded; None: they may stay.

    They go where memory is saved: weights held in bfloat16, or gradients checkpointed, as large bases are. Reading is
    what takes time there: a step names what it does not read.

    Args:
        splits: pattern of the splits whose captions are read.
        further: whether those that have no pictures are.
    """
    if spec.weights == "fp32" and not spec.saliency.gradient_checkpointing:
        return None
    tables = [pd.read_parquet(path) for path in sorted((folder / "splits").glob(f"{splits}.parquet"))]
    columns = [table[name] for table in tables for name in ("caption", "surrogate_caption") if name in table]
    captions = pd.concat(columns, ignore_index=True).dropna().drop_duplicates().tolist()
    if further:
        captions += [*further_prompts(spec), *itertools.chain(*further_pairs(spec))]
    return list(dict.fromkeys(captions))


def further_prompts(spec: Spec) -> list[str]:
    """Prompts that must keep their answer and of which there are no pictures: an erasure by name has many words."""
    return list(read_concepts_file(Path(spec.catalog)).get("told", ())) if spec.by_name else []


def further_pairs(spec: Spec) -> list[list[str]]:
    """Captions to forget of which there are no pictures, each with what it shall give."""
    return list(read_concepts_file(Path(spec.catalog)).get("told_away", ())) if spec.by_name else []


ALIKE = 1e-6
"""Text states that differ by less than this share of their greatest entry say the same."""


def check_told_apart(sd: Base, spec: Spec, folder: Path) -> None:
    """Refuse, before anything is trained, an erasure whose captions and targets the base reads alike.

    Student and teacher are then asked the same: every loss is 0, and what training leaves is the base. That is so
    where the concept stands after the last token that the encoder reads, or where it knows neither of two names.

    Raises:
        DataError: of a concept no caption differs from its target; says how many there are, and what to do.
    """
    table = split_rows(sd, spec, folder, "forget").table
    said = list(zip(table["caption"], table["surrogate_caption"], strict=True))
    known = _read_alike(sd, list(dict.fromkeys(said)))
    shown = {kind: table[kind].tolist() for kind in ("object", "style")}
    for number, pair in enumerate(spec.pairs, start=1):
        own = {both for both, name in zip(said, shown[pair.kind], strict=True) if name == pair.concept}
        if not own:
            continue
        alike = sum(known[both] for both in own)
        if alike == len(own):
            which = f"concept {number}" if spec.also else "the concept"
            raise DataError(
                f"The base's text encoder reads all {len(own)} captions of {which} as it reads their targets: there "
                "is nothing to overwrite, and training would change nothing. Put the name early in the caption (the "
                "encoder reads so many tokens and no more), or name a surrogate that the encoder tells from it."
            )
        if alike:
            logger.warning("%d of %d captions of concept %d read as their targets do", alike, len(own), number)


def _read_alike(sd: Base, said: list[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    """Whether the base reads both captions of a pair alike; many pairs at a time, as a call takes longer than it."""
    found: dict[tuple[str, str], bool] = {}
    for start in range(0, len(said), READ_AT_ONCE):
        part = said[start : start + READ_AT_ONCE]
        read = sd.encode_prompts([both[i] for i in (0, 1) for both in part])
        found |= zip(part, _equal(read[: len(part)], read[len(part) :]).tolist(), strict=True)
    return found


def _equal(one: Told, other: Told) -> Tensor:
    """Which rows are alike, (N,) boolean."""
    found = torch.ones(len(one), dtype=torch.bool)
    for name, mine in one.tensors().items():
        apart = (mine.float() - other.tensors()[name].float()).abs().flatten(1).amax(dim=1)
        found &= (apart <= ALIKE * mine.float().abs().max()).cpu()
    return found


def encode_split(base: Base, spec: Spec, folder: Path, name: str) -> Examples:
    """All examples of one split."""
    return split_rows(base, spec, folder, name).encoded()


def split_rows(base: Base, spec: Spec, folder: Path, *names: str) -> SplitRows:
    """The rows of some splits, in order; all of them with surrogate captions, or none."""
    tables = [pd.read_parquet(folder / "splits" / f"{name}.parquet") for name in names]
    return SplitRows(base, spec, folder, pd.concat(tables, ignore_index=True))
