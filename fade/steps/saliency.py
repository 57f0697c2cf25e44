"""Step ``saliency``: the score of every module of the UNet, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from fade.config import load_request
from fade.files import writing
from fade.method.saliency import accumulate_saliency, contrast, module_scores, noisy_groups
from fade.models.sd import load_base
from fade.steps.encoded import encode_split


def saliency(folder: Path) -> pd.DataFrame:
    """Write ``saliency.parquet``: module, saliency (mean over its weight), weights."""
    request = load_request(folder)
    settings = request.saliency
    torch.set_num_threads(request.threads)
    sd = load_base(Path(request.base), expected_sha256=request.base_sha256)

    def measured(split: str, against: str) -> dict[str, torch.Tensor]:
        groups = noisy_groups(
            encode_split(sd, request, folder, split),
            groups=settings.groups,
            group_size=settings.group_size,
            timestep_count=len(sd.alphas_cumprod),
            seed=settings.seed,
        )
        return accumulate_saliency(sd.unet, groups, alphas_cumprod=sd.alphas_cumprod, against=against)

    scores = measured("forget", "teacher" if settings.score == "distillation" else "noise")
    if settings.score == "contrast":
        scores = contrast(scores, measured("retain", "noise"))
    table = pd.DataFrame(module_scores(scores), columns=["module", "saliency", "weights"])
    with writing(folder / "saliency.parquet") as temporary:
        table.to_parquet(temporary, index=False)
    return table


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    saliency(parser.parse_args().folder)


if __name__ == "__main__":
    main()
