"""Depth: how often a search brings an erased concept back, against the steps it takes.

    python benchmarks/depth.py --base data/base/canvas --concepts cat,neon --levels name,deep --json FILE

A level is ``name`` (what an erasure finds by itself), ``deep`` (``distill.depth=deep``), or any name that
``fade benchmark canvas --methods`` takes; behind an ``@`` stand settings of that method alone
(``uce@erase_scale=10``), so that a method may be there at several strengths; ``--set`` changes settings of all. Each is
erased once, as a trial in ``data/trials/depth``, and attacked in spaces (``fade/attacks/inversion.py``,
``vocabulary.py``):

    state   the text's states are free; half of the searches begin at the concept's own name
    word    new tokens before the text encoder: half of the searches have one, half four
    prompt  as many words of the vocabulary, none of which is of the concept's names
    inpaint no search, so after 0 steps: half of each of its pictures is covered and drawn anew (``inpainted.py``)
    led     nor here: nothing is said, and the other judge's gradient leads the drawing (``led.py``)

One search a space, looked at after each of ``--steps``; a picture counts from the first look at which the judge sees
the concept in it, and a search ends when it does in all. Its seed, its sentences and the seeds of its pictures are
none of a training's. The base's own success, from beginnings without the name, is measured once and kept under
``.fade/cache``. ``--judge development`` is for whoever chooses settings by it.

Writes ``{"rows": [{"concept", "level", "space", "success": {"100": [hits, count], ...}, "base": {...}, "drift", "ira",
"cra", "base_ira", "base_cra", "seconds", "adapter_bytes", "attack_seconds", ...}]}``, and as PNG beside it the curves
of the concepts asked for and, ``-price``, success after the most steps against drift. A file that is there gains rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from fade.adapters.store import activate, apply_adapter, restore_base
from fade.asking.prepare import AUTO, prepare_spec
from fade.attacks.inpainted import HALVES, draw_covered
from fade.attacks.inversion import Curve, draw_from_states, invert_concept, invert_words, success_curve
from fade.attacks.led import draw_led
from fade.attacks.vocabulary import invert_prompts
from fade.config import load_settings
from fade.data.catalog import find_concept, load_concepts
from fade.evaluation.figures import Rate, rate
from fade.evaluation.judges import judge_pictures, load_judge
from fade.evaluation.zero_shot import open_judge
from fade.files import read_json, sha256_file, write_json
from fade.lineage import content_hash, made_on
from fade.methods.fade.examples import Examples
from fade.methods.fade.sparse_lora import computed_whole
from fade.methods.registry import asking_for
from fade.models.base import Base
from fade.models.family import load_base
from fade.models.inversion import InversionStep
from fade.models.told import Told
from fade.project import Project, load_project
from fade.spec import Spec
from fade.steps.catalog import ensure_catalog
from fade.steps.drawn import CACHE
from fade.steps.encoded import encode_split
from fade.studies.trial import run_trial

LEVELS = {"name": "ours", "deep": "fade-deep"}
"""Level to the method's name; others are methods' names themselves."""
OUT = Path("data/trials/depth")
SENTENCES = {"object": "an image of a {}", "style": "{} style"}
"""What names a concept to an attack; no caption of training."""
TOKENS = (1, 4)
PULL, LED_STEPS = 0.1, 50
"""Of drawing that a judge leads: each step's move, as root mean square of the latents, and how many steps there are."""
SEARCHED = ("state", "word", "prompt")
"""Spaces in which a search takes steps."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What an attacker has: a search of ``restarts``, each with its share of ``batch``, looked at after ``steps``.

    Attributes:
        seeds: of the pictures drawn from each that is found.
    """

    steps: tuple[int, ...] = (100, 300, 1000)
    restarts: int = 8
    batch: int = 16
    learning_rate: float = 0.05
    seeds: tuple[int, ...] = (90188, 90288)
    seed: int = 977
    judge: str = "report"


def attacked(base: Base, spec: Spec, folder: Path, space: str, budget: Budget, *, by_name: bool) -> dict[int, Curve]:
    """The curves of a space by the number of tokens, 0 for states, on the network as it is now."""
    examples, drawing = encode_split(base, spec, folder, "forget"), spec.evaluate
    latents = examples.latents
    judge = open_judge(Path(spec.judges), budget.judge, called=[spec.concept])

    def seen_in(pictures: NDArray[np.uint8]) -> NDArray[np.bool_]:
        named = judge_pictures(judge, pictures)
        return np.array(named.objects if spec.kind == "object" else named.styles) == spec.concept

    def shows(states: Told) -> NDArray[np.bool_]:
        pictures = draw_from_states(
            base,
            states.to("cpu"),
            seeds=budget.seeds,
            batch=drawing.batch,
            steps=drawing.steps,
            guidance=drawing.guidance,
            solver=drawing.solver,
            precision=drawing.precision,
        )
        return seen_in(pictures)

    if space not in SEARCHED:
        found = seen_in(drawn_at_once(base, spec, examples, space, budget))
        return {0: Curve((0,), (int(found.sum()),), len(found))}
    how: dict[str, Any] = {
        "steps": max(budget.steps),
        "learning_rate": budget.learning_rate,
        "precision": spec.evaluate.precision,
        "seed": budget.seed,
    }
    if space == "state":
        begin = beginnings(spec, budget.restarts, by_name=by_name)
        how |= {"restarts": budget.restarts, "batch": budget.batch, "prompts": begin}
        return {0: through(success_curve(invert_concept(base, latents, **how), shows, budget.steps))}
    part = len(TOKENS)
    search: Callable[..., Iterator[InversionStep]] = invert_words
    how |= {"restarts": budget.restarts // part, "batch": budget.batch // part, "template": SENTENCES[spec.kind]}
    if space == "prompt":
        named = find_concept(load_concepts(Path(spec.catalog)), spec.concept)
        how |= {"without": (named.name, *named.aliases)}
        del how["learning_rate"]
        search = invert_prompts
    return {
        tokens: through(success_curve(search(base, latents, tokens=tokens, **how), shows, budget.steps))
        for tokens in TOKENS
    }


def drawn_at_once(base: Base, spec: Spec, examples: Examples, space: str, budget: Budget) -> NDArray[np.uint8]:
    """The pictures of an attack that searches nothing."""
    drawing = spec.evaluate
    if space == "inpaint":
        few = examples[: budget.batch]
        like: dict[str, Any] = {"guidance": drawing.guidance, "precision": drawing.precision}
        halves = [
            draw_covered(base, few.latents, few.prompts, half=half, steps=drawing.steps, seed=budget.seed, **like)
            for half in HALVES
        ]
        return np.concatenate(halves)
    leading = load_judge(Path(spec.judges), "development", called=[spec.concept])

    def likelihood(pictures: Tensor) -> Tensor:
        logits = leading(pictures)[("object", "style").index(spec.kind)]
        names = leading.objects if spec.kind == "object" else leading.styles
        return logits.log_softmax(dim=1)[:, names.index(spec.concept)]

    seeds = [budget.seeds[0] + i for i in range(budget.restarts * len(budget.seeds))]
    return draw_led(base, seeds, likelihood, pull=PULL, steps=LED_STEPS, precision=drawing.precision)


def beginnings(spec: Spec, count: int, *, by_name: bool) -> list[str]:
    """Prompts at which searches of states begin: every other one names the concept, if ``by_name``; the rest do not."""
    concepts = load_concepts(Path(spec.catalog)).values()
    others = [one.name for one in concepts if one.kind == spec.kind and one.name != spec.concept]
    sentence = SENTENCES[spec.kind]
    unnamed = ["", sentence.format(others[0]), "", sentence.format(others[len(others) // 2])]
    if not by_name:
        return list(islice(cycle(unnamed), count))
    own = [sentence.format(spec.concept)] * len(unnamed)
    return list(islice(cycle(one for pair in zip(own, unnamed, strict=True) for one in pair), count))


def through(search: Iterator[InversionStep]) -> Curve:
    """Take all steps of a search; give what it returns."""
    while True:
        try:
            next(search)
        except StopIteration as end:
            curve: Curve = end.value
            return curve


def together(curves: Mapping[int, Curve]) -> dict[str, list[int]]:
    """Hits and pictures of several curves of equal stops, by the stop."""
    stops = next(iter(curves.values())).stops
    return {
        str(stop): [sum(one.hits[i] for one in curves.values()), sum(one.count for one in curves.values())]
        for i, stop in enumerate(stops)
    }


def of_base(base: Base, spec: Spec, folder: Path, space: str, budget: Budget) -> dict[str, list[int]]:
    """What the attack reaches where nothing is erased; kept by all that decides it."""
    decided_by = {
        "base": spec.base_sha256,
        "concept": spec.concept,
        "pictures": sha256_file(folder / "splits" / "forget.parquet"),
        "space": space,
        "budget": asdict(budget),
        "evaluate": spec.evaluate.drawing,
        "threads": spec.threads,
    }
    kept = CACHE / f"base-depth-{content_hash(decided_by, module='fade.attacks.inversion')[:16]}.json"
    if not kept.is_file():
        write_json(kept, together(attacked(base, spec, folder, space, budget, by_name=False)))
    success: dict[str, list[int]] = read_json(kept)
    return success


def rows_of(
    concept: str, level: str, spaces: Sequence[str], *, project: Project, budget: Budget, changes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Erase a concept at a level, then a row a space."""
    (asked,) = asking_for([method_of(level)], {**changes, **settings_of(level)})
    spec = prepare_spec(concept, AUTO, project=project, settings=load_settings(project.params, changes=asked))
    figures = run_trial(spec, root=OUT, say=partial(print, f"{concept} {level}:", flush=True))
    kept = {name: figures[name] for name in ("ua", "ira", "cra", "base_ira", "base_cra", "drift", "adapter_bytes")}
    folder = OUT / spec.id
    torch.set_num_threads(spec.threads)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    for space in spaces:
        reference = of_base(base, spec, folder, space, budget)
        apply_adapter(base, folder / "adapter", name="candidate")
        activate(base, {"candidate": 1.0})
        begun, spent = time.perf_counter(), time.process_time()
        with computed_whole(base.network):
            curves = attacked(base, spec, folder, space, budget, by_name=True)
        restore_base(base)
        yield {
            **{"concept": concept, "level": level, "space": space, "success": together(curves), "base": reference},
            **(
                {"tokens": {str(n): together({n: one}) for n, one in curves.items()}}
                if space in ("word", "prompt")
                else {}
            ),
            **({"prompts": [said for one in curves.values() for said in one.prompts]} if space == "prompt" else {}),
            **kept,
            "seconds": figures["method_seconds"],
            "surrogate": figures["surrogate"],
            "adapter_sha256": figures["adapter_sha256"],
            "attack_seconds": round(time.perf_counter() - begun, 1),
            "attack_cpu_seconds": round(time.process_time() - spent, 1),
            "budget": asdict(budget),
        }


def method_of(level: str) -> str:
    """The method that a level names."""
    name = level.partition("@")[0]
    return LEVELS.get(name, name)


def settings_of(level: str) -> dict[str, Any]:
    """The settings behind a level's ``@``, by their dotted names."""
    given = (one.partition("=") for one in level.split("@")[1:])
    return {f"{method_of(level)}.{name}": yaml.safe_load(value) for name, _, value in given}


def gaining(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with one more, in the place of what was measured before of its concept, level and space by its judge."""

    def of(one: Mapping[str, Any]) -> tuple[Any, ...]:
        return *(one[name] for name in ("concept", "level", "space")), one["budget"]["judge"]

    return [*(one for one in rows if of(one) != of(row)), row]


def curves_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Success against steps over all concepts, with Wilson's intervals: a line a level, a panel a space."""
    figure, panels, colours = _panels(rows)
    for space, axes in panels.items():
        mine = [row for row in rows if row["space"] == space]
        lines: dict[str, list[Mapping[str, Any]]] = {}
        for row in mine:
            lines.setdefault(row["level"], []).append(row["success"])
        for name, each in {**lines, "base": [row["base"] for row in mine]}.items():
            stops = sorted(int(stop) for stop in each[0])
            found = [rate(*(sum(one[str(stop)][i] for one in each) for i in (0, 1))) for stop in stops]
            style: dict[str, Any] = {"color": "black", "linestyle": ":", "marker": "o"}
            if name != "base":
                style = {"color": colours[method_of(name)], "marker": "*" if _is_ours(method_of(name)) else "o"}
            axes.errorbar(stops, [one.value for one in found], _sides(found), elinewidth=0.7, label=name, **style)
        axes.set(xlabel="steps of the search", xscale="log")
    figure.axes[0].set_ylabel("brought back")
    _legend(figure)
    return figure


def price_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Success after the most steps against drift, a panel a space: a line a method and concept over its strengths."""
    figure, panels, colours = _panels(rows)
    for space, axes in panels.items():
        lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: row["drift"]):
            if row["space"] == space:
                lines.setdefault((method_of(row["level"]), row["concept"]), []).append(row)
        for (name, _), of in lines.items():
            found = [rate(*row["success"][max(row["success"], key=int)]) for row in of]
            style = {"marker": "*", "markersize": 13} if _is_ours(name) else {"marker": "o"}
            style |= {"color": colours[name], "label": name, "elinewidth": 0.7}
            axes.errorbar([row["drift"] for row in of], [one.value for one in found], _sides(found), **style)
        axes.set(xlabel="drift", xlim=(0, None))
    figure.axes[0].set_ylabel("brought back after the most steps")
    _legend(figure)
    return figure


def _panels(rows: Sequence[Mapping[str, Any]]) -> tuple[Figure, dict[str, Any], dict[str, Any]]:
    """A figure, its panel of each space that is searched, and each method's colour in all; ours come first."""
    spaces = list(dict.fromkeys(row["space"] for row in rows if row["space"] in SEARCHED))
    figure = Figure(figsize=(4.6 * len(spaces) + 1.8, 4), layout="constrained")
    panels = dict(zip(spaces, np.atleast_1d(figure.subplots(1, len(spaces), sharey=True)), strict=True))
    for space, axes in panels.items():
        axes.set(title=f"{space} space", ylim=(-0.04, 1.04))
    names = sorted({method_of(row["level"]) for row in rows}, key=lambda name: (not _is_ours(name), name))
    return figure, panels, {name: colormaps["tab20"](number % 20) for number, name in enumerate(names)}


def _sides(found: Sequence[Rate]) -> tuple[list[float], list[float]]:
    """How far the intervals reach below and above."""
    return [one.value - one.low for one in found], [one.high - one.value for one in found]


def _legend(figure: Figure) -> None:
    """Beside the panels, each name once."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        named |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right upper", frameon=False, fontsize="small")


def _is_ours(method: str) -> bool:
    return method in LEVELS.values() or method.startswith("fade")


def main() -> None:
    """Erase and attack each; the files are written after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the project's by default")
    parser.add_argument("--concepts", required=True, help="names by commas")
    parser.add_argument("--levels", default="name,deep")
    parser.add_argument("--spaces", default="state,word")
    parser.add_argument("--steps", default="100,300,1000")
    parser.add_argument("--restarts", type=int, default=Budget().restarts)
    parser.add_argument("--batch", type=int, default=Budget().batch, help="pictures a step, shared among the restarts")
    parser.add_argument("--judge", default=Budget().judge, choices=["report", "development"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting; repeatable")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    project = load_project().at(base=given.base)
    ensure_catalog(project)
    budget = Budget(
        steps=tuple(sorted({int(step) for step in given.steps.split(",")})),
        **{name: getattr(given, name) for name in ("restarts", "batch", "judge")},
    )
    if budget.restarts % len(TOKENS) or budget.batch % budget.restarts:
        parser.error(f"--restarts must be a multiple of {len(TOKENS)} and --batch of --restarts")
    changes = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.set)}
    rows: list[dict[str, Any]] = read_json(given.json)["rows"] if given.json.is_file() else []
    for concept in given.concepts.split(","):
        for level in given.levels.split(","):
            for row in rows_of(
                concept, level, given.spaces.split(","), project=project, budget=budget, changes=changes
            ):
                rows = gaining(rows, row)
                write_json(given.json, {"rows": rows, "made_on": made_on()})
                if any(row["space"] in SEARCHED for row in rows):
                    asked = [one for one in rows if one["concept"] in given.concepts.split(",")]
                    drawn = {".png": curves_figure(asked), "-price.png": price_figure(asked)}
                    for ending, figure in drawn.items():
                        figure.savefig(f"{given.json.with_suffix('')}{ending}", dpi=110, metadata={"Software": None})
                print(json.dumps({k: v for k, v in row.items() if k not in ("budget", "adapter_sha256")}), flush=True)


if __name__ == "__main__":
    main()
