"""The splits of an erasure, encoded: latents and prompts as the method takes them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fade.config import Request
from fade.data.catalog import load_pictures
from fade.method.examples import Examples
from fade.models.diffusion import autocast
from fade.models.family import Base


def encode_split(sd: Base, request: Request, folder: Path, name: str) -> Examples:
    """Examples of one split; the teacher's prompt is the surrogate caption where there is one.

    Pictures are encoded as training computes: in bfloat16 where that is fast.
    """
    table = pd.read_parquet(folder / "splits" / f"{name}.parquet")
    with autocast(request.distill.precision, sd.device.type):
        latents = sd.encode_pictures(load_pictures(request.picture_catalog(folder), table)).float()
    captions = table["caption"].tolist()
    targets = table["surrogate_caption"].tolist() if "surrogate_caption" in table else captions
    return Examples(latents, sd.encode_prompts(captions), sd.encode_prompts(targets))
