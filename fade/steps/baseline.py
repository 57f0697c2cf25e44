"""Step ``baseline``: a published method's erasure by the same spec, stored as an adapter like any other.

``baseline.json`` beside ``spec.yaml`` names the method and its settings. Evaluation, attacks and exports work on
the folder as on any erasure's. ``python -m fade.steps.baseline FOLDER`` runs the whole trial of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from fade.adapters.store import save_adapter
from fade.errors import AdapterFormatError, ConfigError, FadeError, nearest
from fade.files import read_json, sha256_file, write_json, writing
from fade.lineage import library_versions, module_closure
from fade.methods.concept_ablation import ConceptAblationSettings, concept_ablation
from fade.methods.esd import EsdSettings, EsdUSettings, esd
from fade.methods.salun import SalunSettings, salun
from fade.methods.trained_difference import BaselineStep, Material, difference_tensors
from fade.methods.uce import UceSettings, uce
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.family import load_base
from fade.models.told import Told
from fade.spec import Spec, load_spec, save_spec
from fade.steps.encoded import check_told_apart, split_rows
from fade.steps.split import split
from fade.steps.trial import BASELINE, TRIALS, emptied_if_other, finish, report_progress, step_modules, timed

BASELINE_NAME = "baseline.json"
SPLITS = ("forget", "surrogate", "retain")


@dataclass(frozen=True, slots=True)
class Method:
    """A baseline: what makes it, its settings' class, the file it lies in, its paper, and whose pictures it reads."""

    make: Callable[..., Iterator[BaselineStep]]
    settings: type[Any]
    module: str
    paper: str
    pictures: tuple[str, ...] = ()


METHODS = {
    "esd-x": Method(partial(esd, part="x"), EsdSettings, "esd", "arXiv:2303.07345"),
    "esd-u": Method(partial(esd, part="u"), EsdUSettings, "esd", "arXiv:2303.07345"),
    "uce": Method(uce, UceSettings, "uce", "arXiv:2308.14761"),
    "ca": Method(concept_ablation, ConceptAblationSettings, "concept_ablation", "arXiv:2303.13516", ("surrogate",)),
    "salun": Method(salun, SalunSettings, "salun", "arXiv:2310.12508", ("forget", "retain")),
}


def baseline_settings(method: str, changes: Mapping[str, Any] | None = None) -> Any:
    """A method's settings with some of them changed.

    Raises:
        ConfigError: unknown method or setting, or a value of another type; says what is known.
    """
    if method not in METHODS:
        raise ConfigError(f"Unknown baseline {method!r}. {nearest(method, METHODS)}")
    kind = METHODS[method].settings
    known = {field.name: field.default for field in fields(kind)}
    for name, value in (changes or {}).items():
        if name not in known:
            raise ConfigError(f"Baseline {method!r} has no setting {name!r}. {nearest(name, known)}")
        if isinstance(value, bool) or not isinstance(value, int if isinstance(known[name], int) else int | float):
            raise ConfigError(f"{method}.{name} must be a {type(known[name]).__name__}: got {value!r}.")
        if value <= 0:
            raise ConfigError(f"{method}.{name} must be positive: got {value!r}.")
    return kind(**(changes or {}))


def baseline_id(spec: Spec, method: str, settings: Any) -> str:
    """Name of a baseline's trial: a hash of the spec and the method with its settings."""
    content = json.dumps([spec.id, method, asdict(settings)], sort_keys=True)
    return "b" + hashlib.sha256(content.encode()).hexdigest()[:11]


def save_baseline(folder: Path, spec: Spec, method: str, settings: Any) -> None:
    """Write what a baseline's trial is asked: ``spec.yaml`` and ``baseline.json``."""
    save_spec(spec, folder)
    write_json(folder / BASELINE_NAME, {"method": method, "settings": asdict(settings)})


def baseline_adapter(folder: Path) -> Iterator[BaselineStep]:
    """Write ``adapter/`` and ``curve.csv``; yields each step, and the files are there after the last.

    Raises:
        ConfigError: the spec erases several concepts; or what ``baseline.json`` says is no baseline.
        AdapterFormatError: the method changed nothing that float16 can hold, or what it made is not finite.
    """
    spec = load_spec(folder)
    if spec.also:
        raise ConfigError(f"A baseline erases one concept: {folder} asks for {len(spec.pairs)}.")
    asked = read_json(folder / BASELINE_NAME)
    method, settings = asked["method"], baseline_settings(asked["method"], asked["settings"])
    torch.set_num_threads(spec.threads)
    base = load_base(spec.base, expected_sha256=spec.base_sha256, weights=spec.weights)
    check_told_apart(base, spec, folder)
    curve = []
    given = material(base, spec, folder, pictures=METHODS[method].pictures)
    for step in METHODS[method].make(base, given, settings, precision=spec.distill.precision, seed=spec.distill.seed):
        curve.append(asdict(step))
        yield step
    tensors = difference_tensors(base.denoiser)
    if not tensors:
        raise AdapterFormatError(f"The baseline {method!r} changed no weight; nothing was saved. Raise its steps.")
    changed = {
        key.removeprefix(f"{base.denoiser.component}.").removesuffix(".values")
        for key in tensors
        if key.endswith(".values")
    }
    weights = plain_modules(base.network)
    card = {
        "erasure": spec.id,
        "kind": spec.kind,
        "base_sha256": spec.base_sha256,
        "baseline": method,
        "paper": METHODS[method].paper,
        "modules": len(changed),
        "changed_weights": sum(len(tensor) for key, tensor in tensors.items() if key.endswith(".values")),
        "dense_bytes": 2 * sum(weights[name].weight.numel() for name in changed),
        "steps": len(curve),
        "parameters": asdict(settings),
    }
    save_adapter(folder / "adapter", tensors, card)
    with writing(folder / "curve.csv") as temporary:
        pd.DataFrame(curve).to_csv(temporary, index=False)


def material(base: Base, spec: Spec, folder: Path, *, pictures: Collection[str] = SPLITS) -> Material:
    """The splits that our own method would learn from; of those not in ``pictures`` the captions alone."""

    def read(name: str) -> tuple[Tensor, Told, Told]:
        rows = split_rows(base, spec, folder, name)
        latents = rows.encoded().latents if name in pictures else torch.empty(0, *base.denoiser.latent_shape)
        return latents, *rows.captions()

    retain, retain_prompts, _ = read("retain")
    return Material(*read("forget"), *read("surrogate"), retain, retain_prompts, base.unconditional())


def made_by(method: str) -> str:
    """Hash of the code that a method's trial runs, other baselines' files left out, and of the libraries."""
    digest = hashlib.sha256(str(library_versions()).encode())
    own = {METHODS[method].module, "common"}
    for path in module_closure("fade.steps.baseline", *step_modules()):
        if path.parent.name != "baselines" or path.stem in own:
            digest.update(f"{path.name}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def run_baseline_trial(
    spec: Spec,
    method: str,
    settings: Any,
    *,
    attacks: tuple[str, ...] = (),
    root: Path = TRIALS,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run what is not there yet of a baseline's trial; give its figures, as those of our own trials."""
    folder = emptied_if_other(root / baseline_id(spec, method, settings), made_by(method))
    save_baseline(folder, spec, method, settings)
    timed(folder, "split", [folder / "splits"], lambda: split(folder), say)
    timed(folder, BASELINE, [folder / "curve.csv"], lambda: list(baseline_adapter(folder)), say)
    return finish(folder, attacks=attacks, say=say)


def main() -> None:
    """Run the trial whose ``spec.yaml`` and ``baseline.json`` lie in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attack", action="append", default=[])
    parser.add_argument("--adapter-only", action="store_true", help="splits are there; make the adapter alone")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        asked = read_json(folder / BASELINE_NAME)
        settings = baseline_settings(asked["method"], asked["settings"])
        if arguments.adapter_only:
            for _ in tqdm(baseline_adapter(folder), desc=asked["method"]):
                pass
            return
        run_baseline_trial(
            load_spec(folder),
            asked["method"],
            settings,
            attacks=tuple(arguments.attack),
            root=folder.parent,
            say=report_progress,
        )
    except FadeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
