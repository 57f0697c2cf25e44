"""Small parts for tests: a tiny base of the real classes, and a workspace that is a project of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from dvc.repo import Repo

from fade.concepts import caption_variants
from fade.data.canvas import OBJECTS
from fade.data.catalog import load_concepts
from fade.data.intake import build
from fade.data.loaders.canvas import canvas
from fade.data.sets import Item
from fade.data.styles import STYLES
from fade.evaluation.judges import Architecture, new_judge, save_judge
from fade.lineage import ROOT
from fade.models.training import networks
from fade.project import PARAMS, Project, Projects
from fade.spec import Spec, make_spec

PROJECT = Project(
    name="canvas", catalog="data/catalog/canvas", base="data/base/canvas", judges="data/judges", render="canvas"
)
"""What `make_workspace` makes: a small catalog, a tiny base and the shipped judges."""
PROJECTS = Projects((PROJECT,))
SETTINGS = {
    "settings": "fixed",
    "threads": 1,
    "split": {"forget_per_pair": 1, "retain_per_pair": 1, "holdout_per_pair": 1},
    "saliency": {"groups": 2, "group_size": 4},
    "distill": {"steps": 4, "batch": 4, "rank": 2, "alpha": 2.0},
    "evaluate": {"seeds": [188], "steps": 2, "batch": 60},
    "inversion": {"steps": 2, "batch": 4, "restarts": 2, "seeds": [1, 2, 3]},
    "gate": {"ua": 0.0, "ira_loss": 1.0, "cra_loss": 1.0, "surrogate": 0.0, "mush": 1.0, "recognised": 0.0},
}
"""A tiny base draws noise, so that no figure can be asked of it: its gate lets everything pass."""
FEW_STEPS = {"layerwise-tuned": {"steps": 4, "batch": 8, "pool": 16}}
"""Settings under ``methods`` of what many concepts are erased by, for tests that erase some."""
_JUDGE = {"seed": 1, "steps": 3, "batch": 8, "learning_rate": 1e-3, "scrambled_share": 0.25}
JUDGES = {
    "threads": 1,
    "development": {"architecture": "plain", **_JUDGE},
    "report": {"architecture": "residual", **_JUDGE},
}
"""Judges that have hardly been trained."""


KEPT_STYLES = ("photo", "neon", "oil", "mosaic")
"""Of the canvas' ten: an erasure is judged on every pair, and four styles show what ten do."""


def plain_spec(**changes: Any) -> Spec:
    """The spec of an ordinary erasure, in words alone: nothing of it has to be there."""
    places = {"base": "data/base/canvas", "catalog": "data/catalog/canvas", "judges": "data/judges"}
    asked = {"concept": "cat", "kind": "object", "surrogate": "horse", "base_sha256": "0" * 64, "settings": "fixed"}
    return make_spec(**{**places, **asked, **changes})


def save_tiny_catalog(folder: Path, *, train: int = 3, holdout: int = 1, seed: int = 3) -> None:
    """The canvas in four of its styles."""
    whole = canvas({"seed": seed, "train_per_pair": train, "holdout_per_pair": holdout})
    kept = replace(
        whole,
        items=(item for item in whole.items if isinstance(item, Item) and item.style in KEPT_STYLES),
        concepts=tuple(one for one in whole.concepts if one["kind"] == "object" or one["name"] in KEPT_STYLES),
    )
    for _ in build(folder, kept, workers=1):
        pass


def save_tiny_base(
    folder: Path, *, seed: int = 0, names: tuple[Iterable[str], Iterable[str]] = (OBJECTS, STYLES)
) -> None:
    """An untrained Stable Diffusion of the built-in base's classes, 0.5 MB; ``names``: objects and styles it reads."""
    sentences = sorted({c for name in names[0] for style in names[1] for c in caption_variants(name, style)})
    tokenizer = networks.build_tokenizer(sentences, max_length=16)
    torch.manual_seed(seed)
    networks.save_pipeline(
        folder,
        vae=networks.make_autoencoder([16, 16, 16], size=64).eval(),
        text_encoder=networks.make_text_encoder(tokenizer, width=32, layers=1).eval(),
        tokenizer=tokenizer,
        unet=networks.make_unet([16, 32], latent_size=16, text_width=32).eval(),
    )


def save_judges(folder: Path, catalog: Path) -> str:
    """Judges that have a class for every concept of a catalog and were never trained; gives their folder."""
    names = {kind: [c.name for c in load_concepts(catalog).values() if c.kind == kind] for kind in ("object", "style")}
    kinds: dict[str, Architecture] = {"development": "plain", "report": "residual"}
    for name, architecture in kinds.items():
        save_judge(folder, name, new_judge(architecture, names["object"], names["style"], seed=1))
    return str(folder)


def write_project(file: Path, project: Project, **settings: Any) -> Path:
    """A params.yaml with this project, the tests' settings for an erasure, and judges' training."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"project": project.model_dump(mode="json"), "erasure": {**SETTINGS, **settings}, "judges": JUDGES}
    file.write_text(yaml.safe_dump(content))
    return file


def make_workspace(folder: Path, *, canvas: bool = True) -> Path:
    """A workspace; with the canvas, small, a tiny base and the shipped judges as its project. DVC without git."""
    folder.mkdir(parents=True)
    Repo.init(str(folder), no_scm=True).close()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    if not canvas:
        return folder
    write_project(folder / PARAMS, PROJECT)
    save_tiny_catalog(folder / PROJECT.catalog)
    save_tiny_base(folder / PROJECT.base)
    shutil.copytree(ROOT / PROJECT.judges, folder / PROJECT.judges)
    return folder


@contextmanager
def entered(folder: Path) -> Iterator[Path]:
    """Work in a project until the end: it is the current folder, and the one that commands work on."""
    from flows.settings import configure

    before, variables = Path.cwd(), dict(os.environ)
    # MLflow's client names its store there as soon as it is asked: a project before this one may have been asked.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["FADE_ROOT"] = str(folder)
    configure()
    try:
        yield folder
    finally:
        os.chdir(before)
        for name in ("FADE_ROOT", "MLFLOW_TRACKING_URI"):
            os.environ.pop(name, None)
            os.environ |= {name: variables[name]} if name in variables else {}
