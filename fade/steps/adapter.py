"""Step ``adapter``: the erasure's method makes its change, which is saved with its card."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fade.adapters.store import save_adapter
from fade.errors import ConfigError, DataError
from fade.files import sha256_file, writing
from fade.methods.fade.masks import load_mask
from fade.methods.fade.processes import ALONE, Processes, launched
from fade.methods.fade.sparse_lora import adapter_tensors
from fade.methods.method import STUDENT, Material, Step
from fade.methods.registry import find_method
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.family import load_base
from fade.models.told import Told
from fade.spec import Spec, load_spec
from fade.steps.encoded import check_told_apart, further_pairs, further_prompts, prompts_apart, split_rows

CURVE = ("step", "forget_loss", "retain_loss")
"""Columns of a curve that has no row: nothing was trained."""


def make_adapter(folder: Path, processes: Processes = ALONE) -> Iterator[Step]:
    """Write ``adapter/`` and ``curve.csv`` (losses by step); yields each step.

    The files are there when the last step has been taken. Of several processes the first one writes.

    Raises:
        ConfigError: the method, or a setting of it, is unknown; or it cannot do what is asked.
        DataError: captions and targets read alike, training broke off, or nothing was learnt.
        FadeError: as the method itself.
    """
    spec = load_spec(folder)
    method = find_method(spec.method)
    method.check_able(spec, processes.count)
    settings = method.configured(spec)
    torch.set_num_threads(spec.threads)
    base = load_base(
        spec.base, expected_sha256=spec.base_sha256, weights=spec.weights, prompts=prompts_apart(spec, folder)
    )
    check_told_apart(base, spec, folder)
    given = material(base, spec, folder, masked=method.masked, processes=processes)
    curve = []
    for step in method.make(base, given, settings, precision=spec.distill.precision, seed=spec.distill.seed):
        curve.append(step)
        yield step
    tensors = adapter_tensors(base.denoiser, STUDENT)
    check_changes(tensors)
    if not processes.first:
        return
    card = {
        "erasure": spec.id,
        "kind": spec.kind,
        "base_sha256": spec.base_sha256,
        "pipeline": type(base.pipeline).__name__,
        "method": method.name,
        "citation": method.citation,
        "steps": len(curve),
        "parameters": settings.model_dump(mode="json"),
        **_sizes(base, tensors, masked=method.masked),
        **({"mask_sha256": sha256_file(folder / "mask" / "mask.json")} if method.masked else {}),
        **({"processes": processes.count} if processes.count > 1 else {}),
        **given.notes,
    }
    save_adapter(folder / "adapter", tensors, card)
    with writing(folder / "curve.csv") as temporary:
        rows = [step.figures() for step in curve]
        pd.DataFrame(rows, columns=list(rows[0] if rows else CURVE)).to_csv(temporary, index=False)


def material(base: Base, spec: Spec, folder: Path, *, masked: bool = False, processes: Processes = ALONE) -> Material:
    """What an erasure's method learns from: the splits in its folder, encoded when they are asked for; and its mask."""
    mask = load_mask(folder / "mask") if masked else None
    further = further_prompts(spec)
    told = partial(base.encode_prompts, further) if further else None
    pairs = further_pairs(spec)

    def told_away() -> tuple[Told, Told]:
        concept, surrogate = (base.encode_prompts([pair[i] for pair in pairs]) for i in (0, 1))
        return concept, surrogate

    return Material(
        partial(split_rows, base, spec, folder),
        base.unconditional(),
        mask,
        processes,
        told,
        told_away=told_away if pairs else None,
    )


def check_changes(tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that is the base: of low rank all its ``lora_B``, else all its values are 0 as stored.

    Raises:
        DataError: it changes nothing that float16 holds.
    """
    changing = [tensor for name, tensor in tensors.items() if name.endswith((".lora_B.weight", ".values"))]
    if not any(bool(tensor.to(torch.float16).any()) for tensor in changing):
        raise DataError(
            "The adapter changes no weight that float16 can hold; it was not saved. Give the method more steps or a "
            "larger learning rate (our own: distill.steps, distill.learning_rate)."
        )


def _sizes(base: Base, tensors: Mapping[str, Tensor], *, masked: bool) -> dict[str, Any]:
    """How many modules are changed; without a mask also how many weights, and their bytes if whole ones were stored."""
    component = f"{base.denoiser.component}."
    modules = {key.removeprefix(component).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    sparse = {key.removeprefix(component).removesuffix(".values") for key in tensors if key.endswith(".values")}
    if masked or not sparse:
        return {"modules": len(modules | sparse)}
    weights = plain_modules(base.network)
    return {
        "modules": len(sparse),
        "changed_weights": sum(len(tensor) for key, tensor in tensors.items() if key.endswith(".values")),
        "dense_bytes": 2 * sum(weights[name].weight.numel() for name in sparse),
    }


def main() -> None:
    """Run the step for erasures' folders: alone, or as one of the processes that a launcher started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="one after the other")
    folders = parser.parse_args().folders
    with launched() as processes:
        for folder in folders:
            spec = load_spec(folder)
            if not spec.why_fixed:
                raise ConfigError("This erasure finds its settings, in one process: ask for it with --settings fixed.")
            total = find_method(spec.method).steps(spec)
            for _ in tqdm(make_adapter(folder, processes), total=total, desc=spec.method, disable=not processes.first):
                pass


if __name__ == "__main__":
    main()
