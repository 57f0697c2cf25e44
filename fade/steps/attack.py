"""Step ``attack``: how easily the erased concept is brought back by inversion, against the base as reference.

Not a stage of the pipeline yet; run it on a finished erasure: ``python -m fade.steps.attack FOLDER``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.config import Request, load_request
from fade.evaluation.accuracy import rate
from fade.evaluation.attacks.inversion import draw_from_states, invert_concept
from fade.evaluation.judges import judge_pictures, load_judge
from fade.files import write_json, writing
from fade.models.inversion import InversionStep
from fade.models.sd import StableDiffusion, load_base
from fade.sheets import labelled_sheet
from fade.steps.encoded import encode_split


def attack(folder: Path) -> Iterator[InversionStep]:
    """Write ``attacks/``: inversion.json (success rates with intervals) and sheet.png; yields each step.

    Half the restarts begin at the concept's prompts, half at the empty prompt. On the base only the
    latter count: there the concept's own prompt is no attack.
    """
    request = load_request(folder)
    torch.set_num_threads(request.threads)
    sd = load_base(Path(request.base), expected_sha256=request.base_sha256)
    forget = encode_split(sd, request, folder, "forget").latents
    prompts = _prompts(request)
    found: dict[str, Any] = {"settings": request.inversion.model_dump(mode="json")}
    rows = []
    for network in ("base", "erased"):
        if network == "erased":
            apply_adapter(sd, folder / "adapter", name="candidate")
            activate(sd, {"candidate": 1.0})
        last = None
        for last in _search(sd, request, forget, prompts):
            yield last
        if last is None:
            raise RuntimeError("an inversion has at least one step")
        found[network], pictures = _judged(sd, request, last, prompts, only_from_empty=network == "base")
        rows.append((network, list(pictures[: 2 * len(prompts)])))
    restore_base(sd)
    columns = [f"from {'empty' if not prompt else 'its prompt'}" for prompt in prompts] * 2
    with writing(folder / "attacks") as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "inversion.json", found)
        labelled_sheet(rows, columns, title=f"Inversion of {request.concept}").save(temporary / "sheet.png")


def _prompts(request: Request) -> list[str]:
    named = f"a {request.concept}" if request.kind == "object" else f"an image in {request.concept} style"
    return [named if i % 2 == 0 else "" for i in range(request.inversion.restarts)]


def _search(sd: StableDiffusion, request: Request, latents: Tensor, prompts: list[str]) -> Iterator[InversionStep]:
    settings = request.inversion
    return invert_concept(
        sd,
        latents,
        prompts=prompts,
        restarts=settings.restarts,
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        precision=request.evaluate.precision,
        seed=settings.seed,
    )


def _judged(
    sd: StableDiffusion, request: Request, last: InversionStep, prompts: list[str], *, only_from_empty: bool
) -> tuple[dict[str, Any], Any]:
    settings = request.evaluate
    pictures = draw_from_states(
        sd,
        last.states.to("cpu"),
        seeds=request.inversion.seeds,
        batch=settings.batch,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        precision=settings.precision,
    )
    counted = np.array([not (only_from_empty and prompt) for prompt in prompts] * len(request.inversion.seeds))
    figures: dict[str, Any] = {"loss": last.loss}
    for name in ("development", "report"):
        verdict = judge_pictures(load_judge(Path(request.judges), name), pictures)
        seen = np.array(verdict.objects if request.kind == "object" else verdict.styles)
        figures[name] = asdict(rate(int((seen[counted] == request.concept).sum()), int(counted.sum())))
    return figures, pictures


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for _ in tqdm(attack(folder), total=2 * load_request(folder).inversion.steps, desc="inversion"):
        pass
    tqdm.write(json.dumps(json.loads((folder / "attacks" / "inversion.json").read_text()), indent=1))


if __name__ == "__main__":
    main()
