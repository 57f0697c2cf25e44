"""Step ``attack``: how easily the erased concept is brought back by inversion, against the base as reference.

Asked at a budget: ``inversion.steps``, in the space of text states, or of ``inversion.tokens`` new words before the
text encoder, or of as many of its vocabulary (``inversion.vocabulary``); ``inversion.stops`` adds the success after
fewer steps of the same search.

Run it on a finished erasure: ``python -m fade.steps.attacks FOLDER --kind inversion``.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.attacks.inversion import draw_from_states, invert_concept, invert_words
from fade.attacks.vocabulary import invert_prompts
from fade.data.catalog import find_concept, load_concepts
from fade.errors import ConfigError
from fade.evaluation.attacked import AttackRun, Part, Shown
from fade.evaluation.figures import rate
from fade.evaluation.judges import JUDGES, judge_pictures
from fade.evaluation.records import as_json, dump, parse
from fade.evaluation.zero_shot import open_judge
from fade.files import sha256_file, writing
from fade.lineage import content_hash
from fade.methods.fade.sparse_lora import computed_whole
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.inversion import InversionStep
from fade.sheets import labelled_sheet
from fade.spec import Spec, load_spec
from fade.steps.drawn import CACHE
from fade.steps.encoded import encode_split


def attack(folder: Path) -> Iterator[InversionStep]:
    """Write ``attacks/``: inversion.json (success rates with intervals) and sheet.png; yields each step.

    Half the restarts begin at the concept's prompts, half at the empty prompt. On the base only the latter count: there
    the concept's own prompt is no attack. New words begin at others, all of them. What the attack reaches on the base
    is kept under ``.fade/cache`` by the hash of what decides it.

    Raises:
        ConfigError: the adapter erases several concepts.
    """
    spec = load_spec(folder).as_judged(folder)
    if spec.also:
        raise ConfigError(
            f"The attack searches for one concept: {folder} erases {len(spec.pairs)}. "
            "Run it on erasures of one concept each."
        )
    torch.set_num_threads(spec.threads)
    sd = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    forget = encode_split(sd, spec, folder, "forget").latents
    prompts = _prompts(spec)
    kept = reference_path(spec, folder)
    if not kept.is_file():
        (figures, pictures), _ = yield from _search(
            sd, spec, forget, prompts, only_from_empty=not spec.inversion.tokens
        )
        said = {"figures": json.dumps(as_json(figures))}
        with writing(kept) as temporary:
            save_file({"pictures": torch.from_numpy(pictures)}, temporary, metadata=said)
    with safe_open(kept, framework="pt") as reference:
        shown_by_base = parse(Shown, reference.metadata()["figures"], str(kept))
        base_pictures = reference.get_tensor("pictures")
    apply_adapter(sd, folder / "adapter", name="candidate")
    activate(sd, {"candidate": 1.0})
    with computed_whole(sd.network):
        (still_shown, pictures), by = yield from _search(sd, spec, forget, prompts, only_from_empty=False)
    restore_base(sd)
    shown = 2 * len(prompts)
    rows = [("base", list(base_pictures.numpy()[:shown])), ("erased", list(pictures[:shown]))]
    begun = [f"from {'empty' if not prompt else 'its prompt'}" for prompt in prompts]
    words = "prompts" if spec.inversion.vocabulary else "new words"
    columns = ([words] * len(prompts) if spec.inversion.tokens else begun) * 2
    with writing(folder / "attacks" / "sheet.png") as temporary:
        labelled_sheet(rows, columns, title=f"Inversion of {spec.concept}").save(temporary)
    # Last: where the figures are, the attack is over.
    settings = spec.inversion.model_dump(mode="json")
    ran = AttackRun(settings=settings, base=shown_by_base, erased=still_shown, by=by)
    dump(ran, folder / "attacks" / "inversion.json")


SENTENCES = {"object": "a {}", "style": "an image in {} style"}
"""What names a concept, or new words in the place of its name."""


def _prompts(spec: Spec) -> list[str]:
    named = SENTENCES[spec.kind].format(spec.concept)
    return [named if i % 2 == 0 else "" for i in range(spec.inversion.restarts)]


def reference_path(spec: Spec, folder: Path) -> Path:
    """Named by everything that decides what the attack reaches on the base."""
    decided_by = {
        "base": spec.base_sha256,
        "weights": spec.weights,
        "concept": spec.concept,
        "pictures": sha256_file(folder / "splits" / "forget.parquet"),
        "inversion": spec.inversion.model_dump(mode="json"),
        "evaluate": spec.evaluate.drawing,
        "judges": [sha256_file(Path(spec.judges) / f"{name}.safetensors") for name in JUDGES],
        "threads": spec.threads,
    }
    return CACHE / f"base-inversion-{content_hash(decided_by, module='fade.attacks.inversion')[:16]}.safetensors"


def _search(
    base: Base, spec: Spec, latents: Tensor, prompts: list[str], *, only_from_empty: bool
) -> Generator[InversionStep, None, tuple[tuple[Shown, NDArray[np.uint8]], dict[str, Part]]]:
    """Yields the steps; returns what the last one's pictures show, these pictures, and what earlier stops showed."""
    by: dict[str, Part] = {}
    for step in _steps(base, spec, latents, prompts):
        yield step
        if step.step in spec.inversion.looks:
            found = _judged(base, spec, step, prompts, only_from_empty=only_from_empty)
            if step.step < spec.inversion.steps:
                by[str(step.step)] = Part(erased=found[0])
            elif step.prompts:
                by["found"] = Part(prompts=step.prompts, erased=found[0])
    return found, by


def _steps(base: Base, spec: Spec, latents: Tensor, prompts: list[str]) -> Iterator[InversionStep]:
    settings = spec.inversion
    how: dict[str, Any] = {
        **settings.model_dump(include={"restarts", "steps", "batch", "learning_rate", "seed"}),
        "precision": spec.evaluate.precision,
    }
    if not settings.tokens:
        return invert_concept(base, latents, prompts=prompts, pooled=settings.pooled, **how)
    if settings.vocabulary:
        named = find_concept(load_concepts(Path(spec.catalog)), spec.concept)
        how.pop("learning_rate")
        names = (named.name, *named.aliases)
        return invert_prompts(
            base, latents, template=SENTENCES[spec.kind], tokens=settings.tokens, without=names, **how
        )
    return invert_words(base, latents, template=SENTENCES[spec.kind], tokens=settings.tokens, **how)


def _judged(
    base: Base, spec: Spec, last: InversionStep, prompts: list[str], *, only_from_empty: bool
) -> tuple[Shown, NDArray[np.uint8]]:
    settings = spec.evaluate
    pictures = draw_from_states(
        base,
        last.states.to("cpu"),
        seeds=spec.inversion.seeds,
        batch=settings.batch,
        steps=settings.steps,
        guidance=settings.guidance,
        solver=settings.solver,
        precision=settings.precision,
    )
    counted = np.array([not (only_from_empty and prompt) for prompt in prompts] * len(spec.inversion.seeds))
    figures = {}
    for name in JUDGES:
        named = judge_pictures(open_judge(Path(spec.judges), name, called=[spec.concept]), pictures)
        seen = np.array(named.objects if spec.kind == "object" else named.styles)
        figures[name] = rate(int((seen[counted] == spec.concept).sum()), int(counted.sum()))
    return Shown(**figures, loss=last.loss), pictures
