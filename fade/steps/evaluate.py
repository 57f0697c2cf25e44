"""Step ``evaluate``: generate with and without the adapter, judge, and draw the before/after sheet."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.concepts import CAPTION_TEMPLATE, Concept
from fade.config import Gate, Request, load_request
from fade.data.catalog import load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.errors import LineageError
from fade.evaluation.accuracy import DOMAINS, canvas_protocol, drift, naming_none, summary
from fade.evaluation.judges import Judge, judge_pictures, load_judge
from fade.evaluation.neighbours import find_neighbours
from fade.evaluation.report import erasure_sheet
from fade.files import sha256_file, write_json, writing
from fade.lineage import module_closure
from fade.models.family import Base, load_base
from fade.models.generate import generate
from fade.models.sd import weights_sha256

CACHE = Path(".fade/cache")
JUDGES = ("development", "report")


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
    pairs = find_pairs(concepts, [(pair.concept, pair.surrogate) for pair in request.pairs])
    sd = load_base(request.base, expected_sha256=request.base_sha256, weights=request.weights)
    untouched = weights_sha256(sd.unet)
    template = (load_templates(Path(request.catalog)) or (CAPTION_TEMPLATE,))[0]
    samples = canvas_protocol(*domains(concepts), settings.seeds, template=template)
    before = yield from base_pictures(sd, request, samples)
    card = apply_adapter(sd, folder / "adapter", name="candidate")
    activate(sd, {"candidate": 1.0})
    after = yield from pictures_now(sd, request, samples, done=len(before))
    restore_base(sd)
    if (restored := weights_sha256(sd.unet)) != untouched:
        raise LineageError(f"Taking the adapter out left other base weights: {restored[:12]}, were {untouched[:12]}.")
    neighbours = neighbours_of(sd, pairs, concepts)
    metrics = judged(Path(request.judges), samples, before, after, pairs=pairs, neighbours=neighbours)
    metrics["gate"] = judge_gate(metrics["judges"]["report"], request.gate)
    metrics["adapter_sha256"] = card["adapter_sha256"]
    metrics["adapter_bytes"] = sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors"))
    sheet = erasure_sheet(samples, before, after, pairs, neighbours, seed=settings.seeds[0])
    with writing(folder / "evaluation") as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "metrics.json", metrics)
        samples.to_parquet(temporary / "samples.parquet", index=False)
        sheet.save(temporary / "sheet.png")


def domains(concepts: dict[str, Concept]) -> tuple[list[str], list[str]]:
    """Names of the objects and of the styles."""
    return (
        [c.name for c in concepts.values() if c.kind == "object"],
        [c.name for c in concepts.values() if c.kind == "style"],
    )


def base_pictures(
    sd: Base, request: Request, samples: pd.DataFrame
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures by the base alone, kept by the hash of what makes them; yields progress."""
    kept = _cache_path(request, samples)
    if kept.is_file():
        return load_file(kept)["pictures"].numpy()
    before = yield from pictures_now(sd, request, samples, done=0)
    with writing(kept) as temporary:
        save_file({"pictures": torch.from_numpy(before)}, temporary)
    return before


def pictures_now(
    sd: Base, request: Request, samples: pd.DataFrame, *, done: int
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures with the adapters that are on; yields (pictures done, of before and after)."""
    settings = request.evaluate
    parts: list[NDArray[np.uint8]] = []
    for batch in generate(
        sd,
        samples["prompt"].tolist(),
        samples["seed"].tolist(),
        batch=settings.batch,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        precision=settings.precision,
    ):
        parts.append(batch)
        yield done + sum(map(len, parts)), 2 * len(samples)
    return np.concatenate(parts)


def _cache_path(request: Request, samples: pd.DataFrame) -> Path:
    """Named by everything that decides the base's pictures: base, protocol, settings, threads and code."""
    made_by = {
        "base": request.base_sha256,
        "weights": request.weights,
        "prompts": samples["prompt"].tolist(),
        "settings": request.evaluate.model_dump(mode="json"),
        "threads": request.threads,
        "code": [sha256_file(path) for path in module_closure("fade.models.generate")],
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
    return CACHE / f"base-pictures-{digest[:16]}.safetensors"


def neighbours_of(
    sd: Base, pairs: Sequence[tuple[Concept, Concept | None]], concepts: Mapping[str, Concept]
) -> list[str]:
    """Neighbours of all erased concepts that are not erased themselves."""
    erased = {concept.name for concept, _ in pairs}
    found = [
        name for concept, surrogate in pairs for name in find_neighbours(sd, concept, surrogate, concepts.values())
    ]
    return [name for name in dict.fromkeys(found) if name not in erased]


def judged(
    judges: Path,
    samples: pd.DataFrame,
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    *,
    pairs: Sequence[tuple[Concept, Concept | None]],
    neighbours: Sequence[str],
) -> dict[str, Any]:
    """Figures of both judges, JSON-ready; adds what they called each picture to the samples as columns."""
    metrics: dict[str, Any] = {"samples": len(samples), "neighbours": list(neighbours), "judges": {}}
    named = [(concept, None if surrogate is None else surrogate.name) for concept, surrogate in pairs]
    for name in JUDGES:
        judge, found = load_judge(judges, name), {}
        for when, pictures in (("before", before), ("after", after)):
            seen = named_by(judge, pictures, samples)
            found[when] = summary(seen, named, neighbours)
            for domain in DOMAINS:
                samples[f"{name}_{when}_{domain}"] = seen[f"seen_{domain}"]
        metrics["judges"][name] = found
    retained = samples.index.isin(naming_none(samples, [concept for concept, _ in pairs]).index)
    metrics["drift"] = drift(before[retained], after[retained])
    metrics["change_of_concept"] = drift(before[~retained], after[~retained])
    return metrics


def named_by(judge: Judge, pictures: NDArray[np.uint8], samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with what a judge calls each picture: ``seen_object``, ``seen_style``."""
    verdict = judge_pictures(judge, pictures)
    return samples.assign(seen_object=verdict.objects, seen_style=verdict.styles)


def judge_gate(figures: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether a judge's figures pass; every reason if not. UA is asked of each erased concept by itself."""
    before, after = figures["before"], figures["after"]
    several = len(after["erased"]) > 1
    checks = {
        **{
            # By number: a reason goes into the registry's page, where no name of a person may stand.
            f"ua of concept {number}" if several else "ua": (found["ua"]["value"], gate.ua)
            for number, found in enumerate(after["erased"].values(), start=1)
        },
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
