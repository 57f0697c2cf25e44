"""Step ``evaluate``: generate with and without the adapter, judge, and draw the before/after sheet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fade.adapters.card import load_card
from fade.adapters.store import activate, apply_adapter, restore_base
from fade.concepts import CAPTION_TEMPLATE, Concept
from fade.config import Gate
from fade.data.catalog import given_names, load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.errors import LineageError
from fade.evaluation.accuracy import DOMAINS, canvas_protocol, drift, naming_none, rate, summary
from fade.evaluation.aliases import alias_figures, alias_samples
from fade.evaluation.clip_score import load_clip, score_figures
from fade.evaluation.distances import fid, judge_features, kid, perceptual_drift, scaled, shuffled_patches
from fade.evaluation.extractors import load_extractor
from fade.evaluation.gate import of_the_concept, recognition, undecided, verdict
from fade.evaluation.judges import JUDGES, Judge, judge_pictures, load_judge
from fade.evaluation.neighbours import find_neighbours
from fade.evaluation.paired import paired_retention
from fade.evaluation.report import erasure_sheet
from fade.evaluation.review import failures_sheet, review_page
from fade.files import read_json, write_json, writing
from fade.lineage import content_hash
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.denoiser import weights_sha256
from fade.models.family import load_base
from fade.models.generate import generate
from fade.spec import ATTACKED, Spec, load_spec

CACHE = Path(".fade/cache")


def evaluate(folder: Path) -> Iterator[tuple[int, int]]:
    """Write ``evaluation/``: metrics.json, samples.parquet, sheet.png; yields (pictures done, of all).

    The base's pictures are kept under ``.fade/cache`` by the hash of what makes them, since every
    erasure of a base is compared with the same ones.

    Raises:
        LineageError: the base's weights changed while adapters came and went.
    """
    spec = load_spec(folder)
    settings = spec.evaluate
    torch.set_num_threads(spec.threads)
    concepts = load_concepts(Path(spec.catalog))
    pairs = find_pairs(concepts, spec.pairs)
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    untouched = weights_sha256(sd.network)
    template = (load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,))[0]
    samples = canvas_protocol(*domains(concepts), settings.seeds, template=template)
    neighbours = neighbours_of(sd, pairs, concepts)
    card = load_card(folder / "adapter")

    def switch_on() -> None:
        apply_adapter(sd, folder / "adapter", name="candidate")
        activate(sd, {"candidate": 1.0})

    samples, before, after, metrics = yield from measured(
        sd, spec, samples, switch_on, pairs=pairs, neighbours=neighbours, gate=spec.gate
    )
    if (restored := weights_sha256(sd.network)) != untouched:
        raise LineageError(f"Taking the adapter out left other base weights: {restored[:12]}, were {untouched[:12]}.")
    if spec.gate.attacks and (folder / ATTACKED).is_file():
        metrics["attacks"] = read_json(folder / ATTACKED)
        metrics["gate"] = judge_gate({**metrics["judges"]["report"], "attacks": metrics["attacks"]}, spec.gate)
    metrics["adapter_sha256"] = card["adapter_sha256"]
    metrics["adapter_bytes"] = sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors"))
    sheet = erasure_sheet(samples, before, after, pairs, neighbours, seed=settings.seeds[0])
    with writing(folder / "evaluation") as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "metrics.json", metrics)
        samples.to_parquet(temporary / "samples.parquet", index=False)
        sheet.save(temporary / "sheet.png")
        worst = failures_sheet(samples, before, after, [concept for concept, _ in pairs])
        pages = {"Before and after": sheet} | ({"What the report judge calls wrong": worst} if worst else {})
        page = review_page(spec.id, metrics, card, pages)
        (temporary / "report.html").write_text(page, encoding="utf-8")


Pictures = NDArray[np.uint8]


def measured(
    sd: Base,
    spec: Spec,
    samples: pd.DataFrame,
    switch_on: Callable[[], None],
    *,
    pairs: Sequence[tuple[Concept, Concept | None]],
    neighbours: Sequence[str],
    gate: Gate,
) -> Generator[tuple[int, int], None, tuple[pd.DataFrame, Pictures, Pictures, dict[str, Any]]]:
    """Pictures before and after, judged, with more seeds until the gate is sure or has the most it may have.

    Args:
        samples: the protocol with the spec's seeds.
        switch_on: puts the adapters that are judged on the base; they are taken out again.

    Returns:
        All samples with what the judges saw, the pictures of each, and the metrics with the gate's verdict.
    """
    rounds: list[tuple[pd.DataFrame, Pictures, Pictures]] = []
    wanted, seeds = samples, list(spec.evaluate.seeds)
    while True:
        before = yield from base_pictures(sd, spec, wanted)
        switch_on()
        with computed_whole(sd.network):
            after = yield from pictures_now(sd, spec, wanted, done=len(before))
        restore_base(sd)
        rounds.append((wanted, before, after))
        everything = pd.concat([part for part, _, _ in rounds], ignore_index=True)
        befores, afters = (np.concatenate([one[i] for one in rounds]) for i in (1, 2))
        metrics = judged(Path(spec.judges), everything, befores, afters, pairs=pairs, neighbours=neighbours)
        metrics["gate"] = judge_gate(metrics["judges"]["report"], gate)
        unsure = undecided(metrics["judges"]["report"], gate)
        if not unsure or gate.sure is None or len(seeds) >= gate.sure.most:
            metrics["seeds"] = seeds
            if names := given_names([concept for concept, _ in pairs], load_concepts(Path(spec.catalog))):
                yield from judge_names(sd, spec, names, switch_on, metrics=metrics, seeds=seeds)
                metrics["gate"] = judge_gate(metrics["judges"]["report"], gate)
            metrics |= by_given_models(spec, everything, befores, afters, [concept for concept, _ in pairs])
            return everything, befores, afters, metrics
        more = further_seeds(spec.evaluate.seeds, len(seeds), min(gate.sure.round, gate.sure.most - len(seeds)))
        seeds += more
        wanted = pd.concat([samples[samples["seed"] == samples["seed"].iloc[0]].assign(seed=one) for one in more])
        if all(map(of_the_concept, unsure)):
            # Only the concepts' own prompts are in doubt; those of the rest stay evenly drawn.
            named = ~wanted.index.isin(naming_none(wanted, [concept for concept, _ in pairs]).index)
            wanted = wanted[named]
        wanted = wanted.reset_index(drop=True)


def judge_names(
    base: Base,
    spec: Spec,
    names: Sequence[tuple[Concept, str]],
    switch_on: Callable[[], None],
    *,
    metrics: dict[str, Any],
    seeds: Sequence[int],
) -> Iterator[tuple[int, int]]:
    """Add to each judge's figures ``names``: UA by every name that the spec brings, before and after."""
    catalog = Path(spec.catalog)
    template = (load_templates(catalog) or (CAPTION_TEMPLATE,))[0]
    samples = alias_samples(names, *domains(load_concepts(catalog)), seeds, template=template)
    before = yield from base_pictures(base, spec, samples)
    switch_on()
    with computed_whole(base.network):
        after = yield from pictures_now(base, spec, samples, done=len(before))
    restore_base(base)
    for name, found in metrics["judges"].items():
        judge = load_judge(Path(spec.judges), name, called=[concept.name for concept, _ in names])
        for when, pictures in (("before", before), ("after", after)):
            found[when]["names"] = alias_figures(named_by(judge, pictures, samples))
        found["recognised"] = recognised(found)


def further_seeds(seeds: Sequence[int], used: int, count: int) -> list[int]:
    """The next seeds after those of the protocol, a hundred apart as its own are."""
    done = used - len(seeds)
    return [max(seeds) + 100 * (done + i) for i in range(1, count + 1)]


def domains(concepts: dict[str, Concept]) -> tuple[list[str], list[str]]:
    """Names of the objects and of the styles."""
    return (
        [c.name for c in concepts.values() if c.kind == "object"],
        [c.name for c in concepts.values() if c.kind == "style"],
    )


def base_pictures(sd: Base, spec: Spec, samples: pd.DataFrame) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures by the base alone, kept by the hash of what makes them; yields progress."""
    kept = _cache_path(spec, samples)
    if kept.is_file():
        return load_file(kept)["pictures"].numpy()
    before = yield from pictures_now(sd, spec, samples, done=0)
    with writing(kept) as temporary:
        save_file({"pictures": torch.from_numpy(before)}, temporary)
    return before


def pictures_now(
    base: Base, spec: Spec, samples: pd.DataFrame, *, done: int
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """The protocol's pictures with the adapters that are on; yields (pictures done, of before and after)."""
    settings = spec.evaluate
    parts: list[NDArray[np.uint8]] = []
    for batch in generate(
        base,
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


def _cache_path(spec: Spec, samples: pd.DataFrame) -> Path:
    """Named by everything that decides the base's pictures: base, protocol, settings, threads and code."""
    made_by = {
        "base": spec.base_sha256,
        "weights": spec.weights,
        "prompts": samples["prompt"].tolist(),
        "seeds": samples["seed"].tolist(),
        "settings": spec.evaluate.drawing,
        "threads": spec.threads,
    }
    return CACHE / f"base-pictures-{content_hash(made_by, module='fade.models.generate')[:16]}.safetensors"


def neighbours_of(
    base: Base, pairs: Sequence[tuple[Concept, Concept | None]], concepts: Mapping[str, Concept]
) -> list[str]:
    """Neighbours of all erased concepts that are not erased themselves."""
    erased = {concept.name for concept, _ in pairs}
    found = [
        name for concept, surrogate in pairs for name in find_neighbours(base, concept, surrogate, concepts.values())
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
        judge, found = load_judge(judges, name, called=pd.unique(samples[list(DOMAINS)].to_numpy().ravel())), {}
        looks: dict[str, pd.DataFrame] = {}
        for when, pictures in (("before", before), ("after", after)):
            seen = looks[when] = named_by(judge, pictures, samples)
            found[when] = summary(seen, named, neighbours)
            for domain in DOMAINS:
                samples[f"{name}_{when}_{domain}"] = seen[f"seen_{domain}"]
        found["paired"] = paired_retention(
            looks["before"], looks["after"], [concept for concept, _ in pairs], neighbours
        )
        found["recognised"] = recognised(found)
        found["shuffled"] = shuffled_control(judge, after, samples)
        metrics["judges"][name] = found
    retained = samples.index.isin(naming_none(samples, [concept for concept, _ in pairs]).index)
    metrics["drift"] = drift(before[retained], after[retained])
    metrics |= distances(judges, before[retained], after[retained])
    metrics["change_of_concept"] = drift(before[~retained], after[~retained])
    return metrics


def recognised(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a judge names as asked in the base's own pictures, JSON-ready; concepts, neighbours and names by number."""
    return {name: asdict(rate(*counts)) for name, counts in recognition(figures).items()}


def distances(judges: Path, before: Pictures, after: Pictures) -> dict[str, float]:
    """Distances of the retained pictures to the base's, in the report judge's features."""
    judge = load_judge(judges, "report")
    real, drawn = (judge_features(judge, pictures) for pictures in (before, after))
    return {
        "perceptual_drift": perceptual_drift(judge, before, after),
        "fid_judge": fid(real, drawn),
        "kid_judge": kid(*scaled(real, drawn), paired=True),
    }


def by_given_models(
    spec: Spec, samples: pd.DataFrame, before: Pictures, after: Pictures, erased: Sequence[Concept]
) -> dict[str, float]:
    """Figures by the models that the spec names: distances of the retained pictures, and CLIP scores.

    ``fid_NAME``, ``kid_NAME``; ``clip_score_NAME`` of the retained prompts and ``clip_score_NAME_erased`` of the
    others, each with ``_base`` for the base's pictures.
    """
    found: dict[str, float] = {}
    names_none = np.asarray(samples.index.isin(naming_none(samples, erased).index))
    if spec.evaluate.features is not None:
        extractor = load_extractor(Path(spec.evaluate.features))
        real, drawn = (extractor.features(list(pictures[names_none])) for pictures in (before, after))
        found |= {f"fid_{extractor.name}": fid(real, drawn), f"kid_{extractor.name}": kid(real, drawn, paired=True)}
    if spec.evaluate.clip is not None:
        clip, prompts = load_clip(Path(spec.evaluate.clip)), samples["prompt"].tolist()
        for ending, pictures in (("", after), ("_base", before)):
            scores = score_figures(clip, list(pictures), prompts, ~names_none)
            found |= {f"{name}{ending}": value for name, value in scores.items()}
    return found


def shuffled_control(judge: Judge, pictures: Pictures, samples: pd.DataFrame) -> dict[str, Any]:
    """How often a judge names what was asked in the pictures' shuffled patches: what its accuracies owe to texture."""
    seen = named_by(judge, shuffled_patches(pictures, seed=0), samples)
    return {domain: asdict(rate(int((seen[f"seen_{domain}"] == seen[domain]).sum()), len(seen))) for domain in DOMAINS}


def named_by(judge: Judge, pictures: NDArray[np.uint8], samples: pd.DataFrame) -> pd.DataFrame:
    """The samples with what a judge calls each picture: ``seen_object``, ``seen_style``."""
    verdict = judge_pictures(judge, pictures)
    return samples.assign(seen_object=verdict.objects, seen_style=verdict.styles)


def judge_gate(figures: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Whether a judge's figures pass, with every reason if not (``fade.evaluation.gate.verdict``)."""
    return verdict(figures, gate)
