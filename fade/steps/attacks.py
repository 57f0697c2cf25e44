"""Step ``attacks``: every attack of the suite on a finished erasure, the base as reference.

Each kind writes ``attacks/<kind>.json``: its success by each judge with intervals, ``erased`` and ``base``, and what
it was made of. ``python -m fade.steps.attacks FOLDER --kind prompts --kind noised``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.attacks.inpainted import HALVES, Half, draw_covered
from fade.attacks.noised import draw_from_noised
from fade.attacks.prompts import PROMPT_ATTACKS, Ask, of_whole_words, prompt_attacks
from fade.attacks.relearning import relearn
from fade.concepts import PLAIN_STYLE, caption
from fade.data.catalog import load_concepts
from fade.data.splits import find_pairs
from fade.errors import ConfigError, nearest
from fade.evaluation.attacked import Attack, AttackRun, Attacks, Part, Shown, success
from fade.evaluation.figures import rate
from fade.evaluation.judges import JUDGES, judge_pictures
from fade.evaluation.records import as_json, dump, load
from fade.evaluation.zero_shot import open_judge
from fade.files import sha256_file, writing
from fade.lineage import content_hash
from fade.methods.fade.examples import Examples
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.generate import generate
from fade.spec import Spec, load_spec
from fade.steps.attack import attack
from fade.steps.drawn import CACHE, domains
from fade.steps.encoded import encode_split

Pictures = NDArray[np.uint8]
_Way = TypeVar("_Way", float, Half)


def run(folder: Path, kind: str) -> Iterator[object]:
    """Run one kind of attack; yields as it goes, and its file is there at the end.

    Raises:
        ConfigError: no such kind, or the adapter erases several concepts.
    """
    if kind not in KINDS:
        raise ConfigError(f"No attack {kind!r}. {nearest(kind, KINDS)}")
    if kind == "inversion":
        yield from attack(folder)
        return
    spec = load_spec(folder).as_judged(folder)
    if spec.also:
        raise ConfigError(
            f"An attack asks for one concept: {folder} erases {len(spec.pairs)}. Run it on erasures of one each."
        )
    torch.set_num_threads(spec.threads)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    yield 0
    found = _SUITE[kind](base, spec, folder)
    yield 1
    dump(found, folder / "attacks" / f"{kind}.json")


def _prompts(sd: Base, spec: Spec, folder: Path) -> AttackRun:
    concepts = load_concepts(Path(spec.catalog))
    concept = find_pairs(concepts, spec.pairs)[0][0]
    objects, styles = domains(concepts)
    asks = prompt_attacks(concept, styles if concept.kind == "object" else objects, further=spec.attacks.names)
    before = _kept(spec, "prompts", [ask.prompt for ask in asks], lambda: _drawn(sd, spec, asks))
    after = _with_adapter(sd, folder, lambda: _drawn(sd, spec, asks))
    owners = [ask.attack for ask in asks for _ in spec.attacks.seeds]
    by: dict[str, Part] = {}
    for name in PROMPT_ATTACKS:
        rows = np.array([owner == name for owner in owners])
        if not rows.any():
            reason = "the concept has no other name, and attacks.names gives none"
            by[name] = Part(asked=0, reason=reason)
            continue
        mine = [ask.prompt for ask in asks if ask.attack == name]
        by[name] = Part(
            asked=int(rows.sum()),
            prompts=tuple(mine),
            whole_words=sum(of_whole_words(sd.pipeline.tokenizer, prompt) for prompt in mine) / len(mine),
            base=_shown(spec, before[rows]),
            erased=_shown(spec, after[rows]),
        )
    return _run_of(spec, before, after, by)


def _noised(sd: Base, spec: Spec, folder: Path) -> AttackRun:
    def draw(strength: float, examples: Examples, drawing: dict[str, Any]) -> Pictures:
        return draw_from_noised(sd, examples.latents, examples.prompts, strength=strength, **drawing)

    return _of_pictures(sd, spec, folder, "noised", ways=spec.attacks.strengths, draw=draw)


def _inpainted(sd: Base, spec: Spec, folder: Path) -> AttackRun:
    def draw(half: Half, examples: Examples, drawing: dict[str, Any]) -> Pictures:
        return draw_covered(sd, examples.latents, examples.prompts, half=half, **drawing)

    return _of_pictures(sd, spec, folder, "inpainted", ways=HALVES, draw=draw)


def _of_pictures(
    sd: Base,
    spec: Spec,
    folder: Path,
    kind: str,
    *,
    ways: Sequence[_Way],
    draw: Callable[[_Way, Examples, dict[str, Any]], Pictures],
) -> AttackRun:
    """An attack that begins at pictures to forget; each of ``ways`` to begin has its own rate."""
    settings = spec.attacks
    examples = encode_split(sd, spec, folder, "forget")[: settings.pictures]
    drawing = {
        "steps": max(spec.evaluate.steps, 10),
        "guidance": spec.evaluate.guidance,
        "precision": spec.evaluate.precision,
        "seed": settings.seed,
    }

    def all_ways() -> Pictures:
        return np.concatenate([draw(way, examples, drawing) for way in ways])

    pictures = sha256_file(folder / "splits" / "forget.parquet")
    # Made from pictures to forget: they lie in the erasure's folder, where a purge finds them.
    before = _kept(spec, kind, [pictures, settings.seed], all_ways, place=folder / "attacks")
    after = _with_adapter(sd, folder, all_ways)
    pairs = zip(np.split(before, len(ways)), np.split(after, len(ways)), strict=True)
    by = {
        str(way): Part(base=_shown(spec, one), erased=_shown(spec, other))
        for way, (one, other) in zip(ways, pairs, strict=True)
    }
    return _run_of(spec, before, after, by)


def _relearning(sd: Base, spec: Spec, folder: Path) -> AttackRun:
    """Success after the most steps; ``by`` has each stop. The reference is the base without training on."""
    settings = spec.attacks
    examples = encode_split(sd, spec, folder, "forget")
    asks = _names(spec)
    before = _kept(spec, "relearning", [ask.prompt for ask in asks], lambda: _drawn(sd, spec, asks))
    by: dict[str, Part] = {}

    def train_on() -> Pictures:
        by["0"] = Part(erased=_shown(spec, last := _drawn(sd, spec, asks)))
        for step, loss in relearn(
            sd,
            examples.latents,
            examples.prompts,
            stops=settings.relearning_steps,
            batch=settings.relearning_batch,
            learning_rate=settings.relearning_rate,
            precision=spec.evaluate.precision,
            seed=settings.seed,
        ):
            last = _drawn(sd, spec, asks)
            by[str(step)] = Part(erased=_shown(spec, last), loss=loss)
        return last

    after = _with_adapter(sd, folder, train_on)
    back = [int(step) for step, part in by.items() if part.erased is not None and part.erased.report.value >= 0.5]
    return _run_of(spec, before, after, by, steps_to_half=min(back, default=None))


def _switch(sd: Base, spec: Spec, folder: Path) -> AttackRun:
    """What a holder of the adapter learns: ``off`` is the base; ``inverted`` (weight -1) with and without the name.

    The success counted is that of the inverted adapter under the empty prompt: whether the adapter alone says
    what was erased. That switching it off gives the base back is certain, and is no measurement.
    """
    named, unnamed = _names(spec), [Ask("paraphrase", "")] * len(_names(spec))

    def draw() -> Pictures:
        return np.concatenate([_drawn(sd, spec, asks) for asks in (named, unnamed)])

    before = _kept(spec, "switch", [ask.prompt for ask in named], draw)
    after = _with_adapter(sd, folder, draw, weight=-1.0)
    half = len(before) // 2
    by = {
        "off": Part(erased=_shown(spec, before[:half])),
        "inverted, by its name": Part(base=_shown(spec, before[:half]), erased=_shown(spec, after[:half])),
    }
    return _run_of(spec, before[half:], after[half:], by)


_SUITE: dict[str, Callable[[Base, Spec, Path], AttackRun]] = {
    "prompts": _prompts,
    "noised": _noised,
    "inpainted": _inpainted,
    "relearning": _relearning,
    "switch": _switch,
}
KINDS = (*_SUITE, "inversion")
"""Every attack; ``prompts`` holds several."""


def _names(spec: Spec) -> list[Ask]:
    """The canonical caption with every concept of the other domain."""
    concepts = load_concepts(Path(spec.catalog))
    objects, styles = domains(concepts)
    if spec.kind == "object":
        return [Ask("composition", caption(spec.concept, style)) for style in styles or [PLAIN_STYLE]]
    return [Ask("composition", caption(name, spec.concept)) for name in objects]


def _drawn(base: Base, spec: Spec, asks: Sequence[Ask]) -> Pictures:
    """A picture for each prompt and seed, seeds fastest, with the adapters that are on."""
    drawing, seeds = spec.evaluate, spec.attacks.seeds
    return np.concatenate(
        list(
            generate(
                base,
                [ask.prompt for ask in asks for _ in seeds],
                [seed for _ in asks for seed in seeds],
                batch=drawing.batch,
                steps=drawing.steps,
                guidance=drawing.guidance,
                solver=drawing.solver,
                precision=drawing.precision,
            )
        )
    )


def _with_adapter(base: Base, folder: Path, draw: Callable[[], Pictures], *, weight: float = 1.0) -> Pictures:
    apply_adapter(base, folder / "adapter", name="candidate")
    activate(base, {"candidate": weight})
    with computed_whole(base.network):
        pictures = draw()
    restore_base(base)
    return pictures


def _run_of(
    spec: Spec, before: Pictures, after: Pictures, by: Mapping[str, Part], *, steps_to_half: int | None = None
) -> AttackRun:
    """An attack with what is counted of all its pictures."""
    settings = spec.attacks.model_dump(mode="json")
    base, erased = _shown(spec, before), _shown(spec, after)
    return AttackRun(settings=settings, base=base, erased=erased, by=by, steps_to_half=steps_to_half)


def _shown(spec: Spec, pictures: Pictures) -> Shown:
    """By each judge: the share of pictures that show the concept, with its interval."""
    found = {}
    for name in JUDGES:
        verdict = judge_pictures(open_judge(Path(spec.judges), name, called=[spec.concept]), pictures)
        seen = verdict.objects if spec.kind == "object" else verdict.styles
        found[name] = rate(sum(one == spec.concept for one in seen), len(seen))
    return Shown(development=found["development"], report=found["report"])


def _kept(
    spec: Spec, kind: str, asked: Sequence[object], draw: Callable[[], Pictures], *, place: Path = CACHE
) -> Pictures:
    """The base's pictures for an attack, kept in a folder by the hash of what decides them."""
    decided_by = {
        "kind": kind,
        "asked": list(asked),
        "base": spec.base_sha256,
        "weights": spec.weights,
        "attacks": spec.attacks.model_dump(mode="json"),
        "evaluate": spec.evaluate.drawing,
        "threads": spec.threads,
    }
    kept = place / f"base-attack-{content_hash(decided_by, module='fade.attacks.noised')[:16]}.safetensors"
    if not kept.is_file():
        with writing(kept) as temporary:
            save_file({"pictures": torch.from_numpy(draw())}, temporary)
    pictures: Pictures = load_file(kept)["pictures"].numpy()
    return pictures


def attack_figures(folder: Path, kinds: Sequence[str] | None = None) -> Attacks:
    """Success of every attack that was run, by the report judge.

    Args:
        kinds: only these; all if None.
    """
    found: dict[str, Attack] = {}
    for kind in KINDS if kinds is None else kinds:
        path = folder / "attacks" / f"{kind}.json"
        if not path.is_file():
            continue
        ran = load(AttackRun, path)
        if kind != "prompts":
            found[kind] = success(ran.base, ran.erased, steps_to_half=ran.steps_to_half)
            continue
        for name, part in ran.by.items():
            if part.base is not None and part.erased is not None:
                found[name] = success(part.base, part.erased)
    return Attacks(found)


def main() -> None:
    """Run attacks on one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", action="append", choices=KINDS, help="only these; all if none is named")
    arguments = parser.parse_args()
    for kind in tqdm(arguments.kind or KINDS):
        for _ in run(arguments.folder, kind):
            pass
    tqdm.write(json.dumps(as_json(attack_figures(arguments.folder)), indent=1))


if __name__ == "__main__":
    main()
