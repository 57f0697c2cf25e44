"""Step ``evaluate``: generate with and without the adapter, judge, and draw the before/after sheet."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.concepts import Concept, caption
from fade.config import Gate, Request, load_request
from fade.data.catalog import find_concept, load_concepts
from fade.errors import LineageError
from fade.evaluation.accuracy import canvas_protocol, drift, summary
from fade.evaluation.judges import judge_pictures, load_judge
from fade.evaluation.report import before_after_sheet
from fade.files import sha256_file, write_json, writing
from fade.models.generate import generate
from fade.models.sd import StableDiffusion, load_base, weights_sha256

CACHE = Path(".fade/cache")
JUDGES = ("development", "report")
_CODE = Path(__file__).parents[1] / "models"


def evaluate(folder: Path) -> Iterator[tuple[int, int]]:
    """Write ``evaluation/``: metrics.json, samples.parquet, sheet.png; yields (pictures done, of all).

    The base's pictures are kept under ``.fade/cache`` by the hash of what makes them, since every
    erasure of a base is compared with the same ones.

    Raises:
        LineageError: the base's weights changed while adapters came and went.
    """
    request = load_request(folder)
    settings = request.evaluate
    torch.set_num_threads(request.threads)
    concepts = load_concepts(Path(request.catalog))
    concept, surrogate = find_concept(concepts, request.concept), find_concept(concepts, request.surrogate)
    sd = load_base(Path(request.base), expected_sha256=request.base_sha256)
    untouched = weights_sha256(sd.unet)
    samples = canvas_protocol(*_domains(concepts), settings.seeds)
    total = 2 * len(samples)
    parts: list[NDArray[np.uint8]] = []
    kept = _cache_path(request, samples)
    if kept.is_file():
        before = load_file(kept)["pictures"].numpy()
    else:
        for batch in _pictures(sd, request, samples):
            parts.append(batch)
            yield sum(map(len, parts)), total
        before = np.concatenate(parts)
        with writing(kept) as temporary:
            save_file({"pictures": torch.from_numpy(before)}, temporary)
    card = apply_adapter(sd, folder / "adapter", name="candidate")
    activate(sd, {"candidate": 1.0})
    parts = []
    for batch in _pictures(sd, request, samples):
        parts.append(batch)
        yield len(before) + sum(map(len, parts)), total
    after = np.concatenate(parts)
    restore_base(sd)
    if (restored := weights_sha256(sd.unet)) != untouched:
        raise LineageError(f"Taking the adapter out left other base weights: {restored[:12]}, were {untouched[:12]}.")
    neighbours = find_neighbours(sd, concept, surrogate, concepts)
    metrics = _figures(request, samples, before, after, concept=concept, surrogate=surrogate, neighbours=neighbours)
    metrics["adapter_sha256"] = card["adapter_sha256"]
    metrics["adapter_bytes"] = sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors"))
    shown = [concept.name, surrogate.name, *neighbours][:5]
    sheet = before_after_sheet(samples, before, after, concept, list(dict.fromkeys(shown)), seed=settings.seeds[0])
    with writing(folder / "evaluation") as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "metrics.json", metrics)
        samples.to_parquet(temporary / "samples.parquet", index=False)
        sheet.save(temporary / "sheet.png")


def _domains(concepts: dict[str, Concept]) -> tuple[list[str], list[str]]:
    return (
        [c.name for c in concepts.values() if c.kind == "object"],
        [c.name for c in concepts.values() if c.kind == "style"],
    )


def _pictures(sd: StableDiffusion, request: Request, samples: pd.DataFrame) -> Iterator[NDArray[np.uint8]]:
    settings = request.evaluate
    return generate(
        sd,
        samples["prompt"].tolist(),
        samples["seed"].tolist(),
        batch=settings.batch,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        precision=settings.precision,
    )


def _cache_path(request: Request, samples: pd.DataFrame) -> Path:
    """Named by everything that decides the base's pictures: base, protocol, settings, threads and code."""
    made_by = {
        "base": request.base_sha256,
        "prompts": samples["prompt"].tolist(),
        "settings": request.evaluate.model_dump(mode="json"),
        "threads": request.threads,
        "code": [sha256_file(_CODE / name) for name in ("generate.py", "sd.py", "diffusion.py")],
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return CACHE / f"base-pictures-{digest[:16]}.safetensors"


def find_neighbours(
    sd: StableDiffusion, concept: Concept, surrogate: Concept, concepts: dict[str, Concept], *, count: int = 3
) -> list[str]:
    """The concepts an erasure is most likely to hurt; never the surrogate.

    Of a person: every other person. Else the nearest of its domain by cosine of the mean text states.
    """
    same = [c for c in concepts.values() if c.kind == concept.kind and c.name not in (concept.name, surrogate.name)]
    if concept.person and (persons := [c.name for c in same if c.person]):
        return persons

    def sentence(name: str) -> str:
        return caption(name, "photo") if concept.kind == "object" else caption("picture", name)

    states = sd.encode_prompts([sentence(concept.name), *(sentence(c.name) for c in same)]).embeds.mean(dim=1)
    nearness = torch.nn.functional.cosine_similarity(states[:1], states[1:])
    return [same[i].name for i in nearness.argsort(descending=True)[:count].tolist()]


def _figures(
    request: Request,
    samples: pd.DataFrame,
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    *,
    concept: Concept,
    surrogate: Concept,
    neighbours: Sequence[str],
) -> dict[str, Any]:
    metrics: dict[str, Any] = {"samples": len(samples), "neighbours": list(neighbours), "judges": {}}
    for name in JUDGES:
        judge = load_judge(Path(request.judges), name)
        found = {}
        for when, pictures in (("before", before), ("after", after)):
            verdict = judge_pictures(judge, pictures)
            seen = samples.assign(seen_object=verdict.objects, seen_style=verdict.styles)
            found[when] = summary(seen, concept, surrogate.name, neighbours)
            for domain in ("object", "style"):
                samples[f"{name}_{when}_{domain}"] = seen[f"seen_{domain}"]
        metrics["judges"][name] = found
    retained = (samples[concept.kind] != concept.name).to_numpy()
    metrics["drift"] = drift(before[retained], after[retained])
    metrics["change_of_concept"] = drift(before[~retained], after[~retained])
    metrics["gate"] = judge_gate(metrics["judges"]["report"], request.gate)
    return metrics


def judge_gate(figures: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether the report judge's figures pass; every reason if not."""
    before, after = figures["before"], figures["after"]
    checks = {
        "ua": (after["ua"]["value"], gate.ua),
        "ira": (after["ira"]["value"], before["ira"]["value"] - gate.ira_loss),
        "cra": (after["cra"]["value"], before["cra"]["value"] - gate.cra_loss),
    }
    reasons = [
        f"{name} is {reached:.4f}, at least {least:.4f} is asked"
        for name, (reached, least) in checks.items()
        if reached < least - 1e-9
    ]
    return {"passed": not reasons, "reasons": reasons}


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    with tqdm(desc="pictures") as bar:
        for done, total in evaluate(parser.parse_args().folder):
            bar.total = total
            bar.update(done - bar.n)


if __name__ == "__main__":
    main()
