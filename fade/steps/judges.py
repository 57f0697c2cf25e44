"""Stage ``judges``: train the two classifiers on the canvas; report their figures on holdout crops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fade.data.canvas import OBJECTS, render_all
from fade.data.styles import STYLES
from fade.evaluation.damage import SCRAMBLED, shuffle_patches
from fade.evaluation.figures import JudgeAccuracy, JudgesReport
from fade.evaluation.judges import (
    PictureJudge,
    judge_pictures,
    new_judge,
    save_judge,
    train_judge,
)
from fade.evaluation.records import dump
from fade.files import writing
from fade.models.latents import to_tensor
from fade.seeding import torch_generator
from fade.steps.arguments import stage_arguments


def build_judges(folder: Path, *, params: dict[str, Any]) -> None:
    """Train the judges ``development`` and ``report``; write them and ``metrics.json``.

    Args:
        params: the section ``judges`` of params.yaml.
    """
    torch.set_num_threads(params["threads"])
    train = list(render_all(split="train", per_pair=params["pictures_per_pair"], seed=params["seed"]))
    holdout = list(render_all(split="holdout", per_pair=params["holdout_per_pair"], seed=params["seed"]))
    pixels = np.stack([picture.pixels for picture in train])
    known: dict[str, JudgeAccuracy] = {}
    with writing(folder) as temporary:
        for name in ("development", "report"):
            settings = params[name]
            judge = new_judge(settings["architecture"], list(OBJECTS), list(STYLES), seed=settings["seed"])
            steps = train_judge(
                judge,
                pixels,
                [picture.object for picture in train],
                [picture.style for picture in train],
                steps=settings["steps"],
                batch=settings["batch"],
                learning_rate=settings["learning_rate"],
                scrambled_share=settings["scrambled_share"],
                seed=settings["seed"],
            )
            for _ in tqdm(steps, total=settings["steps"], desc=f"judge {name}", mininterval=10):
                pass
            save_judge(temporary, name, judge)
            known[name] = accuracy(judge, np.stack([p.pixels for p in holdout]), holdout, seed=settings["seed"])
        dump(JudgesReport(**known), temporary / "metrics.json")


def accuracy(judge: PictureJudge, pixels: NDArray[np.uint8], holdout: list[Any], *, seed: int) -> JudgeAccuracy:
    """How well a judge knows pictures (N, H, W, 3) whose ``object`` and ``style`` the holdout's rows name."""
    seen = judge_pictures(judge, pixels)
    shuffled = shuffle_patches(to_tensor(pixels), 16, torch_generator(seed, "shuffled control"))
    control = ((shuffled + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    named = judge_pictures(judge, control)
    return JudgeAccuracy(
        object_accuracy=float(np.mean([v == p.object for v, p in zip(seen.objects, holdout, strict=True)])),
        style_accuracy=float(np.mean([v == p.style for v, p in zip(seen.styles, holdout, strict=True)])),
        shuffled_object_accuracy=float(np.mean([v == p.object for v, p in zip(named.objects, holdout, strict=True)])),
        shuffled_called_scrambled=float(np.mean([v == SCRAMBLED for v in named.objects])),
        holdout_pictures=len(holdout),
    )


def main() -> None:
    """Run the stage with the parameters in params.yaml."""
    params, folders = stage_arguments(__doc__, "judges", "out")
    build_judges(folders["out"], params=params)


if __name__ == "__main__":
    main()
