"""The splits of an erasure, encoded: latents and prompts as the method takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from fade.config import Request
from fade.data.catalog import load_pictures
from fade.method.examples import Examples
from fade.models.conditioning import Conditioning
from fade.models.diffusion import autocast
from fade.models.family import Base


@dataclass(frozen=True, slots=True)
class SplitRows:
    """Rows of splits whose pictures and captions are encoded when they are asked for.

    The teacher's prompt is the surrogate caption where there is one. Pictures are encoded as training computes:
    in bfloat16 where that is fast.
    """

    sd: Base
    request: Request
    folder: Path
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def encoded(self) -> Examples:
        """All of them."""
        pictures = load_pictures(self.request.picture_catalog(self.folder), self.table)
        with autocast(self.request.distill.precision, self.sd.device.type):
            latents = self.sd.encode_pictures(pictures).float()
        return Examples(latents, *self.captions())

    def captions(self) -> tuple[Conditioning, Conditioning]:
        """What the student and what the teacher is told, a row each."""
        told = self.table["caption"]
        taught = self.table.get("surrogate_caption", told)
        return self.sd.encode_prompts(told.tolist()), self.sd.encode_prompts(taught.tolist())

    def drawn(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` of them, with replacement."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return replace(self, table=self.table.iloc[rows.numpy()]).encoded()


def encode_split(sd: Base, request: Request, folder: Path, name: str) -> Examples:
    """All examples of one split."""
    return split_rows(sd, request, folder, name).encoded()


def split_rows(sd: Base, request: Request, folder: Path, *names: str) -> SplitRows:
    """The rows of some splits, in order; all of them with surrogate captions, or none."""
    tables = [pd.read_parquet(folder / "splits" / f"{name}.parquet") for name in names]
    return SplitRows(sd, request, folder, pd.concat(tables, ignore_index=True))
