"""How many free numbers an attacker has, and how many of them the retained captions pin down.

    python benchmarks/pinned.py --concepts motorcycle,oil --json FILE

The base is asked at noised pictures of the concept, times spread evenly, told the concept's captions and retained ones
in turn. What its answers do when the text's states move is sampled as gradients: of a random direction of the answer
after each of the states' numbers (positions x width). A row says

    numbers     how many there are
    directions  how many directions hold a share of these gradients' energy (each gradient of length 1): what an
                attacker can steer with. From ``--samples`` gradients; the ends of the spectrum are seen too small
    captions    different retained captions, and, by a share of their own energy, the directions that they span whole
                (``numbers``) and the share of the gradients' energy that lies there (``holds``)
    words       the same of a single position's directions, taken at all positions: keys and values are one map for all
                positions, so that who may not move these directions at one may move them at none

What lies in neither is free to be shut or taught otherwise at no price, to first order.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fade.asking.prepare import AUTO, prepare_spec
from fade.config import load_settings
from fade.files import write_json
from fade.lineage import made_on
from fade.methods.fade.examples import Examples
from fade.models.base import Base
from fade.models.denoiser import Denoiser
from fade.models.family import load_base
from fade.models.told import Told
from fade.project import load_project
from fade.seeding import torch_generator
from fade.spec import Spec, save_spec
from fade.steps.catalog import ensure_catalog
from fade.steps.encoded import encode_split
from fade.steps.split import split

SHARES = (0.5, 0.9, 0.99)
BATCH = 16


def gradients(denoiser: Denoiser, pictures: Tensor, told: Sequence[Told], samples: int, seed: int) -> Tensor:
    """Of random directions of the answers after all numbers of the states, (samples, L D) float64, each of length 1.

    Args:
        pictures: latents, (N, C, h, w), noised at times spread evenly.
        told: of these in turn, a row at random for each sample.
    """
    generator, rows = torch_generator(seed, "pinned"), []
    for number in range(-(-samples // BATCH)):
        chosen = pictures[torch.randint(len(pictures), (BATCH,), generator=generator)]
        timesteps = torch.randint(denoiser.path.steps, (BATCH,), generator=generator)
        noisy = denoiser.path.noised(chosen, torch.randn(chosen.shape, generator=generator), timesteps)
        prompts = told[number % len(told)]
        prompts = prompts[torch.randint(len(prompts), (BATCH,), generator=generator)]
        states = prompts.states.clone().requires_grad_(True)
        answer = denoiser.predict(noisy, timesteps, prompts.with_tensors({"states": states}))
        along = (answer * torch.randn(answer.shape, generator=generator)).sum()
        rows.append(torch.autograd.grad(along, states)[0].flatten(1).double())
    found = torch.cat(rows)[:samples]
    return found / found.norm(dim=1, keepdim=True)


def holding(rows: Tensor, share: float) -> Tensor:
    """The fewest orthonormal directions, (D, k), that hold a share of the rows' (N, D) squares."""
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    held = values.square().cumsum(0) / values.square().sum()
    return right[: int((held < share).sum()) + 1].T


def held_by(rows: Tensor, directions: Tensor) -> float:
    """The share of the rows' squares that lies in a span."""
    return float((rows @ directions).square().sum() / rows.square().sum())


def row_of(found: Tensor, retained: Tensor) -> dict[str, Any]:
    """A row's figures.

    Args:
        found: gradients, (N, L D).
        retained: states of retained captions, (M, L, D) float64.
    """
    length, captions = retained.shape[1], torch.unique(retained.flatten(1), dim=0)
    row: dict[str, Any] = {
        "numbers": found.shape[1],
        "samples": len(found),
        "captions": len(captions),
        "directions": {str(share): holding(found, share).shape[1] for share in SHARES},
        "spanned": {},
    }
    for share in SHARES[1:]:
        whole = holding(captions - captions.mean(dim=0), share)
        word = holding(retained.flatten(0, 1), share)
        everywhere = torch.block_diag(*[word] * length)
        row["spanned"][str(share)] = {
            name: {"numbers": span.shape[1], "holds": round(held_by(found, span), 4)}
            for name, span in {"captions": whole, "words": everywhere}.items()
        }
    return row


def measured(base: Base, spec: Spec, samples: int, seed: int) -> dict[str, Any]:
    """A concept's row."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_spec(spec, folder)
        split(folder)
        forget, retain = (encode_split(base, spec, folder, name) for name in ("forget", "retain"))
    told: Sequence[Examples] = (forget, retain)
    found = gradients(base.denoiser, forget.latents, [one.prompts for one in told], samples, seed)
    return {"concept": spec.concept, **row_of(found, retain.prompts.states.double())}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default="motorcycle,cat,oil,mosaic")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    project, rows = load_project(), []
    ensure_catalog(project)
    settings = load_settings(project.params, changes={"threads": 1, "settings": "fixed"})
    base = load_base(project.base)
    for concept in given.concepts.split(","):
        spec = prepare_spec(concept, AUTO, project=project, settings=settings)
        rows.append(measured(base, spec, given.samples, given.seed))
        print(json.dumps(rows[-1]), flush=True)
    write_json(given.json, {"rows": rows, "made_on": made_on()})


if __name__ == "__main__":
    main()
