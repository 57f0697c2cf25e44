"""Step ``distill``: train the adapter inside the mask and save it with its card."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from fade.adapters.store import save_adapter
from fade.config import load_request
from fade.files import read_json, sha256_file, writing
from fade.method.distillation import DistillStep, distill
from fade.method.sparse_lora import adapter_tensors, add_sparse_lora
from fade.models.sd import load_base
from fade.steps.encoded import encode_split


def distill_adapter(folder: Path) -> Iterator[DistillStep]:
    """Write ``adapter/`` and ``curve.parquet`` (losses by step); yields each step.

    The files are there when the last step has been taken.
    """
    request = load_request(folder)
    settings = request.distill
    torch.set_num_threads(request.threads)
    sd = load_base(Path(request.base), expected_sha256=request.base_sha256)
    mask = read_json(folder / "mask.json")
    sets = {name: encode_split(sd, request, folder, name) for name in ("forget", "surrogate", "retain")}
    parameters = add_sparse_lora(
        sd.unet, mask["modules"], rank=settings.rank, alpha=settings.alpha, seed=settings.seed, name="student"
    )
    curve = []
    for step in distill(
        sd.unet,
        parameters,
        forget=sets["forget"],
        surrogate=sets["surrogate"],
        retain=sets["retain"],
        empty_embeds=sd.encode_prompts([""]),
        alphas_cumprod=sd.alphas_cumprod,
        **settings.model_dump(exclude={"rank", "alpha"}),
    ):
        curve.append(asdict(step))
        yield step
    card = {
        "erasure": request.id,
        "kind": request.kind,
        "base_sha256": request.base_sha256,
        "mask_sha256": sha256_file(folder / "mask.json"),
        "modules": len(mask["modules"]),
        "trained_alpha": settings.alpha,
        "rank": settings.rank,
        "parameters": settings.model_dump(mode="json"),
    }
    save_adapter(folder / "adapter", adapter_tensors(sd.unet, "student"), card)
    with writing(folder / "curve.parquet") as temporary:
        pd.DataFrame(curve).to_parquet(temporary, index=False)


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for _ in tqdm(distill_adapter(folder), total=load_request(folder).distill.steps, desc="distill"):
        pass


if __name__ == "__main__":
    main()
