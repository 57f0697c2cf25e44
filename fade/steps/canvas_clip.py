"""Stage ``canvas_clip``: a small CLIP of the canvas, as judge of what is erased there by its name alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fade.data.canvas import OBJECTS, render_all
from fade.evaluation.contrastive import train_clip
from fade.steps.arguments import stage_arguments


def build_clip(folder: Path, *, params: dict[str, Any]) -> None:
    """Train the CLIP; write ``folder`` as transformers does.

    Args:
        params: the section ``canvas_clip`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    settings = {key: value for key, value in params.items() if key not in ("threads", "pictures_per_pair")}
    train = list(render_all(split="train", per_pair=params["pictures_per_pair"], seed=params["seed"]))
    steps = train_clip(
        folder,
        np.stack([picture.pixels for picture in train]),
        [picture.object for picture in train],
        [picture.style for picture in train],
        words={name: known.aliases for name, known in OBJECTS.items()},
        **settings,
    )
    with tqdm(steps, total=params["steps"], desc="clip", mininterval=10) as bar:
        for step, loss in bar:
            if step % 100 == 0:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    params, folders = stage_arguments(__doc__, "canvas_clip", "out")
    build_clip(folders["out"], params=params)


if __name__ == "__main__":
    main()
