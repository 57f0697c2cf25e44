"""A person whose name the base does not know, erased from ten pictures: do other names and inversion still show them?

    python -m benchmarks.by_looks --json FILE

A person of the canvas (``--person``) stands for somebody private: she is erased under a word that means nothing
(``--token``), from ten pictures that the base was not trained on, and none of the words that ship knows her. So nobody
tells the erasure the names by which the base does draw her. Asked afterwards, of the judge ``report``: how many
pictures by those names show her, how many that white-box inversion draws (a few steps of Adam from the empty prompt),
and how many of all other subjects and styles are still what they are. ``development`` says the first two by the judge
that settings are chosen by. A row before, one after; ``--json`` has a run for each person and ``--set``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from benchmarks.by_name import OUT, erased, switched_on
from fade.asking import by_name, planned
from fade.asking.planned import Asked
from fade.attacks.inversion import draw_from_states, invert_concept
from fade.data.canvas import OBJECTS, render
from fade.data.catalog import load_concepts
from fade.data.styles import STYLES
from fade.evaluation.accuracy import canvas_protocol
from fade.evaluation.judges import JUDGES, PictureJudge, judge_pictures, load_judge
from fade.files import read_json, write_json
from fade.models.base import Base
from fade.models.family import load_base
from fade.names import name_key
from fade.project import load_project
from fade.steps.catalog import ensure_catalog
from fade.steps.drawn import base_pictures, domains, ended, pictures_now
from fade.words import kept_prompts, vocabulary

GIVEN = ("photo", "sketch", "neon", "oil", "thermal")
"""Styles of the pictures that are given, two crops of each."""


def given_pictures(folder: Path, person: str) -> Path:
    """Ten pictures of the person, none of which anything was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(2):
        shown = render(person, index, split="holdout", seed=77)
        for style in GIVEN:
            Image.fromarray(shown[style]).save(folder / f"{style}-{index}.png")
    return folder


def unknown(asked: Asked, person: str, **given: Any) -> Any:
    """Erase somebody whom no word that ships means."""
    keys = {name_key(name) for name in (person, *OBJECTS[person].aliases)}
    words = tuple(word for word in vocabulary() if not word.keys & keys)
    kept = tuple(one for one in kept_prompts() if not any(key in name_key(one[1]) for key in keys))
    with (
        mock.patch.object(by_name, "vocabulary", return_value=words),
        mock.patch.object(planned, "vocabulary", return_value=words),
        mock.patch.object(planned, "kept_prompts", return_value=kept),
    ):
        return erased(asked, **given)


def inverted(base: Base, spec: Any, pictures: NDArray[np.uint8], *, steps: int) -> NDArray[np.uint8]:
    """Pictures of what inversion finds from the empty prompt."""
    search = invert_concept(
        base, base.encode_pictures(pictures), prompts=[""], restarts=2, steps=steps, batch=8, learning_rate=0.05,
        precision=spec.distill.precision, seed=42,
    )  # fmt: skip
    *_, last = search
    drawing = {name: getattr(spec.evaluate, name) for name in ("steps", "guidance", "solver", "precision")}
    return draw_from_states(base, last.states, seeds=range(1, 13), batch=24, **drawing)


def showing(judges: Mapping[str, PictureJudge], pictures: NDArray[np.uint8], person: str) -> dict[str, float]:
    """Share of pictures that show the person, by each judge."""
    seen = {name: judge_pictures(judge, pictures).objects for name, judge in judges.items()}
    return {name: float(np.mean([one == person for one in objects])) for name, objects in seen.items()}


def main() -> None:
    """Erase, then ask before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--person", default="astronaut")
    parser.add_argument("--token", default="zyxqv")
    parser.add_argument("--budget", default="small")
    parser.add_argument("--inversion-steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; repeatable")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    project, begun = load_project(), time.perf_counter()
    ensure_catalog(project)
    folder = given_pictures(OUT / "given" / given.person, given.person)
    asked = Asked(given.token, kind="person", clip="none", pictures=folder, budget=given.budget)
    changes = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.set)}
    spec, place = unknown(asked, given.person, project=project, changes=changes)
    seconds = time.perf_counter() - begun
    torch.set_num_threads(spec.threads)
    judges = {name: load_judge(Path(project.judges), name) for name in JUDGES}
    base = load_base(spec.base, expected_sha256=spec.base_sha256)
    told = spec.model_copy(update={"catalog": project.catalog, "judges": project.judges, "by_name": False})
    rest = canvas_protocol(*domains(load_concepts(Path(project.catalog))), (1188,))
    names = (given.person, *OBJECTS[given.person].aliases)
    own = canvas_protocol(names, tuple(STYLES), (1188, 1288))
    files = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    pictures = np.stack([np.asarray(one) for one in files])
    rows: list[dict[str, Any]] = []
    kept = read_json(given.json) if given.json.is_file() else {}
    known = kept.get("runs", [])
    earlier = [one for one in known if (one.get("person"), one["set"]) != (given.person, given.set)]
    for when, draw in (("before", base_pictures), ("after", pictures_now)):
        further = {} if when == "before" else {"done": 0}
        with switched_on(base, None if when == "before" else place / "adapter"):
            mine, drawn = (ended(draw(base, told, one, **further)) for one in (own, rest))
            again = inverted(base, spec, pictures, steps=given.inversion_steps)
        named, found, others = (
            showing(judges, mine, given.person),
            showing(judges, again, given.person),
            judge_pictures(judges["report"], drawn),
        )
        stays = (rest["object"] != given.person).to_numpy()
        rows.append({
            "when": when,
            "by_other_names": named["report"],
            "by_inversion": found["report"],
            "development": {"by_other_names": named["development"], "by_inversion": found["development"]},
            "ira": float(np.mean(np.array(others.objects)[stays] == rest["object"].to_numpy()[stays])),
            "cra": float(np.mean(np.array(others.styles)[stays] == rest["style"].to_numpy()[stays])),
        })  # fmt: skip
        said = {
            "person": given.person,
            "token": given.token,
            "surrogate": spec.surrogate,
            "seconds": round(seconds, 1),
            "set": given.set,
        }
        counts = {"by_other_names": len(own), "by_inversion": 24, "kept": int(stays.sum())}
        write_json(given.json, {**kept, "runs": [*earlier, {**said, "pictures": counts, "rows": rows}]})
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
