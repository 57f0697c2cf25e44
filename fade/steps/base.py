"""Stage ``base``: train the built-in base model on the canvas and save it as a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS, render_all
from fade.models.training.loop import train_base
from fade.steps.arguments import stage_arguments


def build_base(folder: Path, *, params: dict[str, Any]) -> None:
    """Train on rendered canvas pictures; write ``folder``.

    Args:
        params: the section ``base`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    rendered = render_all(split="train", per_pair=params["pictures_per_pair"], seed=params["seed"])
    pictures = list(tqdm(rendered, desc="canvas", mininterval=5))
    captions = [caption_variants(p.object, p.style, OBJECTS[p.object].aliases) for p in pictures]
    losses: dict[str, float] = {}
    with tqdm(mininterval=10) as bar:
        for step in train_base(np.stack([p.pixels for p in pictures]), captions, folder, params=params):
            if step.part not in losses:
                bar.reset(total=step.steps)
                bar.set_description(step.part)
                bar.update(step.step - 1)
            loss = losses[step.part] = 0.99 * losses.get(step.part, step.loss) + 0.01 * step.loss
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    params, folders = stage_arguments(__doc__, "base", "out")
    build_base(folders["out"], params=params)


if __name__ == "__main__":
    main()
