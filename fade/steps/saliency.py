"""Step ``saliency``: how much each module, neuron or weight of the UNet has to do with the concept."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fade.config import load_request
from fade.files import writing
from fade.method.saliency import accumulate_saliency, contrast, noisy_groups, random_saliency
from fade.models.sd import load_base
from fade.steps.encoded import encode_split


def saliency(folder: Path) -> dict[str, Tensor]:
    """Write ``saliency.safetensors``, at the granularity that the mask asks for."""
    request = load_request(folder)
    settings, granularity = request.saliency, request.mask.granularity
    torch.set_num_threads(request.threads)
    sd = load_base(Path(request.base), expected_sha256=request.base_sha256)

    def measured(split: str, against: str) -> dict[str, Tensor]:
        groups = noisy_groups(
            encode_split(sd, request, folder, split),
            groups=settings.groups,
            group_size=settings.group_size,
            timestep_count=len(sd.alphas_cumprod),
            seed=settings.seed,
        )
        return accumulate_saliency(
            sd.unet,
            groups,
            alphas_cumprod=sd.alphas_cumprod,
            against=against,
            granularity=granularity,
            prediction_type=sd.prediction_type,
            at_once=settings.at_once,
        )

    if settings.score == "random":
        scores = random_saliency(sd.unet, granularity, seed=settings.seed)
    else:
        scores = measured("forget", "teacher" if settings.score == "distillation" else "noise")
    if settings.score == "contrast":
        scores = contrast(scores, measured("retain", "noise"))
    with writing(folder / "saliency.safetensors") as temporary:
        save_file({name: scores[name].contiguous() for name in sorted(scores)}, temporary, metadata={"format": "pt"})
    return scores


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    saliency(parser.parse_args().folder)


if __name__ == "__main__":
    main()
