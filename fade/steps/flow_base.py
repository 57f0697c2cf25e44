"""Stage ``flow_base``: train the second built-in base, a flow transformer, on the canvas; save its diffusers folder.

Pictures and captions are those of the stage ``base``, whose autoencoder and tokenizer it takes over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS, render_all
from fade.models.training.flow import train_flow_base
from fade.steps.arguments import stage_arguments


def build_flow_base(folder: Path, *, like: Path, params: dict[str, Any]) -> None:
    """Train on rendered canvas pictures; write ``folder``.

    Args:
        like: the base of the stage ``base``.
        params: the section ``flow_base`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    rendered = render_all(split="train", per_pair=params["pictures_per_pair"], seed=params["seed"])
    pictures = list(tqdm(rendered, desc="canvas", mininterval=5))
    captions = [caption_variants(p.object, p.style, OBJECTS[p.object].aliases) for p in pictures]
    steps = train_flow_base(np.stack([p.pixels for p in pictures]), captions, folder, like=like, params=params)
    with tqdm(desc="transformer", total=params["steps"], mininterval=10) as bar:
        loss: float | None = None
        for step in steps:
            loss = step.loss if loss is None else 0.99 * loss + 0.01 * step.loss
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(step.step - bar.n)


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    params, folders = stage_arguments(__doc__, "flow_base", "like", "out")
    build_flow_base(folders["out"], like=folders["like"], params=params)


if __name__ == "__main__":
    main()
