"""Step ``evaluate``: generate with and without the adapter, judge, and draw the before/after sheet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fade.adapters.card import load_card
from fade.adapters.store import activate, apply_adapter, restore_base
from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.config import Gate
from fade.data.catalog import given_names, load_concepts, load_templates
from fade.data.splits import find_pairs
from fade.errors import LineageError
from fade.evaluation.accuracy import (
    DOMAINS,
    canvas_protocol,
    drift,
    evenly_drawn,
    naming_none,
    reachable,
    summary,
)
from fade.evaluation.aliases import alias_figures, alias_samples
from fade.evaluation.attacked import Attacks
from fade.evaluation.clip_score import load_clip, mean_scores
from fade.evaluation.detectors import DETECTORS, AllCalibrated, shows
from fade.evaluation.distances import fid, judge_features, kid, perceptual_drift, scaled, shuffled_patches
from fade.evaluation.extractors import load_extractor
from fade.evaluation.figures import Accuracies, JudgeFigures, Judges, OfDomains, judge_figures, rate
from fade.evaluation.gate import surely_blind, verdict
from fade.evaluation.judges import JUDGES, PictureJudge
from fade.evaluation.measured import ClipScores, Detected, Evaluation, FeatureDistances, Measured
from fade.evaluation.neighbours import find_neighbours
from fade.evaluation.paired import paired_retention
from fade.evaluation.points import POINTS_NAME, Points
from fade.evaluation.records import dump, load
from fade.evaluation.report import erasure_sheet
from fade.evaluation.review import failures_sheet, prompt_by_prompt, review_page
from fade.evaluation.rounds import OWN, PART, Rounds
from fade.evaluation.zero_shot import open_judge
from fade.files import writing
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.denoiser import weights_sha256
from fade.models.family import load_base
from fade.spec import ATTACKED, POINTS, Spec, load_spec
from fade.steps.drawn import base_pictures, domains, named_by, pictures_now
from fade.words import spoken


def evaluate(folder: Path) -> Iterator[tuple[int, int]]:
    """Write ``evaluation/``: metrics.json, samples.parquet, sheet.png, report.html and what it shows, ``beside/``.

    Yields (pictures done, of all).

    The base's pictures are kept under ``.fade/cache`` by the hash of what makes them: whatever erasures of a base
    have in common is drawn once.

    Raises:
        LineageError: the base's weights changed while adapters came and went.
    """
    asked = load_spec(folder)
    spec = asked.as_judged(folder)
    settings = spec.evaluate
    torch.set_num_threads(spec.threads)
    concepts = load_concepts(Path(spec.catalog))
    pairs = find_pairs(concepts, spec.pairs)
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    untouched = weights_sha256(sd.network)
    template = (load_templates(Path(spec.catalog)) or (CAPTION_TEMPLATE,))[0]
    say = spoken if spec.by_name else caption
    samples = canvas_protocol(*domains(concepts), settings.seeds, template=template, say=say)
    neighbours = neighbours_of(sd, pairs, concepts)
    card = load_card(folder / "adapter")

    def switch_on() -> None:
        apply_adapter(sd, folder / "adapter", name="candidate")
        activate(sd, {"candidate": 1.0})

    run = load(Attacks, folder / ATTACKED) if spec.gate.attacks and (folder / ATTACKED).is_file() else Attacks({})
    samples, before, after, found = yield from measured(
        sd, spec, samples, switch_on, pairs=pairs, neighbours=neighbours, gate=spec.gate, attacks=run
    )
    if (restored := weights_sha256(sd.network)) != untouched:
        raise LineageError(f"Taking the adapter out left other base weights: {restored[:12]}, were {untouched[:12]}.")
    size = sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors"))
    metrics = Evaluation(
        **dict(found),
        adapter_sha256=card["adapter_sha256"],
        adapter_bytes=size,
        detectors=detected(spec, samples, before, after),
    )
    sheet = erasure_sheet(samples, before, after, pairs, neighbours, seed=settings.seeds[0])
    with writing(folder / "evaluation") as temporary:
        temporary.mkdir(parents=True)
        dump(metrics, temporary / "metrics.json")
        samples.to_parquet(temporary / "samples.parquet", index=False)
        sheet.save(temporary / "sheet.png")
        worst = failures_sheet(samples, before, after, [concept for concept, _ in pairs])
        pages = {"Before and after": sheet} | ({"What the report judge calls wrong": worst} if worst else {})
        beside = prompt_by_prompt(samples, before, after, [concept for concept, _ in pairs], neighbours)
        tried = folder / POINTS / POINTS_NAME
        points = load(Points, tried) if tried.is_file() else None
        page = review_page(asked.id, metrics, card, pages, points=points, beside=beside)
        (temporary / "report.html").write_text(page, encoding="utf-8")
        beside.save(temporary)


Pictures = NDArray[np.uint8]


def detected(spec: Spec, samples: pd.DataFrame, before: Pictures, after: Pictures) -> tuple[Detected, ...]:
    """What the further judges of an erasure by name see in the pictures of its concept's own prompts."""
    if not spec.detectors:
        return ()
    mine = (samples[spec.kind] == spec.concept).to_numpy()
    rows = []
    for one in load(AllCalibrated, Path(spec.judges) / DETECTORS).judges:
        was, now = (shows(one, list(pictures[mine])) for pictures in (before, after))
        shares = {"before": rate(int(was.sum()), len(was)), "after": rate(int(now.sum()), len(now))}
        rows.append(Detected(name=one.name, able=one.able, **shares))
    return tuple(rows)


def measured(
    sd: Base,
    spec: Spec,
    samples: pd.DataFrame,
    switch_on: Callable[[], None],
    *,
    pairs: Sequence[tuple[Concept, Concept | None]],
    neighbours: Sequence[str],
    gate: Gate,
    attacks: Attacks,
) -> Generator[tuple[int, int], None, tuple[pd.DataFrame, Pictures, Pictures, Measured]]:
    """Pictures before and after, judged, round by round until the gate is sure or has the most it may have.

    Where the gate asks bounds, the erased concepts' own prompts come first (``fade.evaluation.rounds``): an erasure
    that surely misses what is asked of these is refused after tens of pictures.

    Args:
        samples: the protocol with the spec's seeds.
        switch_on: puts the adapters that are judged on the base; they are taken out again.
        attacks: that were run before, for the gate.

    Returns:
        All samples with what the judges saw, the pictures of each, and what was measured with the gate's verdict.
    """
    rounds = _rounds(spec, samples, pairs=pairs, neighbours=neighbours, gate=gate)
    everything, befores, afters = samples.iloc[:0], *([np.empty((0,), np.uint8)] * 2)
    opened = opened_judges(Path(spec.judges), samples)
    wanted: pd.DataFrame | None = rounds.first()
    while wanted is not None:
        if len(wanted) > 0:
            before, after = yield from _before_and_after(sd, spec, wanted, switch_on)
            everything, befores, afters = _joined(everything, wanted, (befores, before), (afters, after))
        everything[PART] = everything.index.map(rounds.parts)
        judges = judged(opened, everything, befores, afters, pairs=pairs, neighbours=neighbours)
        wanted = rounds.next(judges.report)
    everything = everything[[name for name in everything if "_shuffled_" not in str(name)]].reset_index(drop=True)
    erased = [concept for concept, _ in pairs]
    names = given_names(erased, load_concepts(Path(spec.catalog)))
    if names and not surely_blind(judges.report, gate):
        asked = pd.unique(everything[everything[PART] == OWN]["seed"]).tolist()
        judges = yield from judge_names(sd, spec, names, switch_on, judges=judges, seeds=asked)
    features, clip = by_given_models(spec, everything, befores, afters, erased)
    metrics = Measured(
        samples=len(everything),
        seeds=tuple(pd.unique(everything["seed"]).tolist()),
        neighbours=tuple(neighbours),
        judges=judges,
        gate=verdict(judges.report, gate, attacks),
        attacks=attacks,
        **distances(Path(spec.judges), everything, befores, afters, erased),
        features=features,
        clip=clip,
    )
    return everything, befores, afters, metrics


def _rounds(
    spec: Spec,
    samples: pd.DataFrame,
    *,
    pairs: Sequence[tuple[Concept, Concept | None]],
    neighbours: Sequence[str],
    gate: Gate,
) -> Rounds:
    """Rounds over the protocol's seeds, and as many further ones as the gate may ask for."""
    sure, seeds = gate.sure, spec.evaluate.seeds
    most = len(seeds) if sure is None else max(sure.most, len(seeds))
    return Rounds(
        samples,
        further=further_seeds(seeds, most - len(seeds)),
        pairs=pairs,
        neighbours=neighbours,
        gate=gate,
        whole=sure is None or spec.evaluate.whole,
    )


def _before_and_after(
    base: Base, spec: Spec, samples: pd.DataFrame, switch_on: Callable[[], None]
) -> Generator[tuple[int, int], None, tuple[Pictures, Pictures]]:
    """Pictures of the base alone and with what ``switch_on`` puts on it, which is taken out again."""
    before = yield from base_pictures(base, spec, samples)
    switch_on()
    with computed_whole(base.network):
        after = yield from pictures_now(base, spec, samples, done=len(before))
    restore_base(base)
    return before, after


def _joined(
    before: pd.DataFrame, new: pd.DataFrame, *pictures: tuple[Pictures, Pictures]
) -> tuple[pd.DataFrame, Pictures, Pictures]:
    """A further round among the former ones, in the protocol's order: rows, pictures before and after."""
    rows = pd.concat([before, new])
    order = np.argsort(rows.index.to_numpy(), kind="stable")
    was, now = (np.concatenate([*([one] if len(one) else []), more])[order] for one, more in pictures)
    return rows.iloc[order], was, now


def judge_names(
    base: Base,
    spec: Spec,
    names: Sequence[tuple[Concept, str]],
    switch_on: Callable[[], None],
    *,
    judges: Judges,
    seeds: Sequence[int],
) -> Generator[tuple[int, int], None, Judges]:
    """The judges' figures with ``names``: UA by every name that the spec brings, before and after."""
    catalog = Path(spec.catalog)
    template = (load_templates(catalog) or (CAPTION_TEMPLATE,))[0]
    say = spoken if spec.by_name else caption
    samples = alias_samples(names, *domains(load_concepts(catalog)), seeds, template=template, say=say)
    before, after = yield from _before_and_after(base, spec, samples, switch_on)
    called = [concept.name for concept, _ in names]

    def named(name: str) -> JudgeFigures:
        judge, found = open_judge(Path(spec.judges), name, called=called), getattr(judges, name)

        def side(known: Accuracies, pictures: Pictures) -> Accuracies:
            return Accuracies(**{**dict(known), "names": alias_figures(named_by(judge, pictures, samples))})

        return judge_figures(
            before=side(found.before, before),
            after=side(found.after, after),
            paired=found.paired,
            shuffled=found.shuffled,
            reachable=found.reachable,
        )

    return Judges(**{name: named(name) for name in JUDGES})


def further_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """The next seeds after those of the protocol, a hundred apart as its own are."""
    return [max(seeds) + 100 * i for i in range(1, count + 1)]


def neighbours_of(
    base: Base, pairs: Sequence[tuple[Concept, Concept | None]], concepts: Mapping[str, Concept]
) -> list[str]:
    """Neighbours of all erased concepts that are not erased themselves."""
    erased = {concept.name for concept, _ in pairs}
    found = [
        name for concept, surrogate in pairs for name in find_neighbours(base, concept, surrogate, concepts.values())
    ]
    return [name for name in dict.fromkeys(found) if name not in erased]


def opened_judges(folder: Path, samples: pd.DataFrame) -> dict[str, PictureJudge]:
    """Both judges, which know a protocol's concepts by the catalog's spelling."""
    called = pd.unique(samples[list(DOMAINS)].to_numpy().ravel())
    return {name: open_judge(folder, name, called=called) for name in JUDGES}


def judged(
    judges: Mapping[str, PictureJudge],
    samples: pd.DataFrame,
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    *,
    pairs: Sequence[tuple[Concept, Concept | None]],
    neighbours: Sequence[str],
) -> Judges:
    """Figures of both judges; adds what they called each picture to the samples as columns.

    Pictures that a column says already what they were called are not judged again.
    """
    found: dict[str, JudgeFigures] = {}
    named = [(concept, None if surrogate is None else surrogate.name) for concept, surrogate in pairs]
    for name, judge in judges.items():
        looks = {
            when: _named_once(judge, pictures, samples, f"{name}_{when}")
            for when, pictures in (("before", before), ("after", after), ("shuffled", after))
        }
        shuffled = looks["shuffled"]
        found[name] = judge_figures(
            before=summary(looks["before"], named, neighbours),
            after=summary(looks["after"], named, neighbours),
            paired=paired_retention(looks["before"], looks["after"], [concept for concept, _ in pairs], neighbours),
            shuffled=OfDomains(
                **{
                    domain: rate(int((shuffled[f"seen_{domain}"] == shuffled[domain]).sum()), len(shuffled))
                    for domain in DOMAINS
                }
            ),
            reachable=reachable(looks["before"], named),
        )
    return Judges(**found)


def _named_once(judge: PictureJudge, pictures: Pictures, samples: pd.DataFrame, column: str) -> pd.DataFrame:
    """The samples with what a judge calls each picture, or its shuffled patches: the control for texture."""
    columns = {domain: f"{column}_{domain}" for domain in DOMAINS}
    for name in columns.values():
        if name not in samples:
            samples[name] = None
    new = samples[columns["object"]].isna().to_numpy()
    if new.any():
        shown = shuffled_patches(pictures[new], seed=0) if column.endswith("_shuffled") else pictures[new]
        seen = named_by(judge, shown, samples[new])
        for domain, name in columns.items():
            samples.loc[new, name] = seen[f"seen_{domain}"]
    return samples.assign(**{f"seen_{domain}": samples[name] for domain, name in columns.items()})


def distances(
    judges: Path, samples: pd.DataFrame, before: Pictures, after: Pictures, erased: Sequence[Concept]
) -> dict[str, float]:
    """Distances of the retained pictures to the base's, in pixels and in the report judge's features."""
    judge = open_judge(judges, "report")
    retained = np.asarray(samples.index.isin(evenly_drawn(samples, erased).index))
    named = ~np.asarray(samples.index.isin(naming_none(samples, erased).index))
    real, drawn = (judge_features(judge, pictures[retained]) for pictures in (before, after))
    return {
        "drift": drift(before[retained], after[retained]),
        "change_of_concept": drift(before[named], after[named]),
        "perceptual_drift": perceptual_drift(judge, before[retained], after[retained]),
        "fid_judge": fid(real, drawn),
        "kid_judge": kid(*scaled(real, drawn), paired=True),
    }


def by_given_models(
    spec: Spec, samples: pd.DataFrame, before: Pictures, after: Pictures, erased: Sequence[Concept]
) -> tuple[FeatureDistances | None, ClipScores | None]:
    """Figures by the models that the spec names: distances of the retained pictures, and CLIP scores."""
    features, scores = None, None
    names_none = np.asarray(samples.index.isin(naming_none(samples, erased).index))
    if spec.evaluate.features is not None:
        extractor = load_extractor(Path(spec.evaluate.features))
        real, drawn = (extractor.features(list(pictures[names_none])) for pictures in (before, after))
        features = FeatureDistances(name=extractor.name, fid=fid(real, drawn), kid=kid(real, drawn, paired=True))
    if spec.evaluate.clip is not None:
        clip, prompts = load_clip(Path(spec.evaluate.clip)), samples["prompt"].tolist()
        now, was = (mean_scores(clip, list(pictures), prompts, ~names_none) for pictures in (after, before))
        scores = ClipScores(name=clip.name, retained=now[0], erased=now[1], retained_base=was[0], erased_base=was[1])
    return features, scores
