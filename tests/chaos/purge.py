"""Kill a purge at random places, go on with it, and look for what is left.

    python tests/chaos/purge.py --kills 20 --rounds 2 --json purge.json

writes before which operation each kill fell, and of all ``left`` (findings of the scan), ``missing`` (objects
without a receipt) and ``unmarked`` (rows of the catalog that do not say that their picture is gone): all have to be 0.
A process is killed by SIGKILL just before the n-th operation of its own on the file system, n drawn by the seed.

The erasure is put together from real parts, less the training: catalog, splits, DVC's records, cache, run-cache and
a remote, runs of two versions and of one that was cut off in MLflow, a trial, and what killed writers left. Prefect,
which keeps no picture, is left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

import numpy as np
import pandas as pd

from fade.config import Gate
from fade.evaluation.measured import Combination
from fade.evaluation.records import dump
from fade.files import read_json, write_json
from fade.pipeline import Step, personal_data, steps_of
from fade.spec import load_spec
from tests.figures import evaluation, judged_figures
from tests.tiny import PROJECT, make_workspace

ERASURES = Path("data/erasures")
PERSONS = ("astronaut", "cameraman")
EFFECTS = frozenset({"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"})
PAGE = b"<html><p>astronaut</p></html>"
FIGURES = "evaluation/metrics.json"
"""It names what was erased, and may: docs/security.md."""


@dataclass(frozen=True, slots=True)
class Place:
    """A project with a finished erasure and a remote, and its copy."""

    folder: Path

    @property
    def project(self) -> Path:
        """The project's root."""
        return self.folder / "work/project"

    def enter(self) -> None:
        """Work in the project."""
        os.environ["FADE_ROOT"] = str(self.project)
        from flows.settings import configure

        configure()

    def keep(self) -> None:
        """Copy project and remote."""
        shutil.copytree(self.folder / "work", self.folder / "kept", symlinks=True)

    def bring_back(self) -> None:
        """Project and remote as they were kept."""
        shutil.rmtree(self.folder / "work")
        shutil.copytree(self.folder / "kept", self.folder / "work", symlinks=True)


def make_erasure(place: Place) -> None:
    """A project with an erasure that is live: run in a process of its own."""
    make_workspace(place.project)
    place.enter()
    from dvc.repo import Repo

    from fade.asking.prepare import prepare_spec
    from fade.config import load_settings
    from fade.steps.split import split
    from flows.erasing.erase import prepare_folder
    from tasks.dvc import versioning

    versioning.track(Path("data/catalog/canvas"))
    folder = prepare_folder(prepare_spec(*PERSONS, project=PROJECT, settings=load_settings(Path("params.yaml"))))
    split(folder)
    noise = np.random.default_rng(1)
    versioning.record(folder, "split")
    made = [step for step in steps_of(load_spec(folder)) if step.name != "split"]
    for version in (1, 2):  # a second version: the first one's objects are in its run's lock file alone
        for step in made:
            for name in _files(step):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                names_somebody = any(Path(name).is_relative_to(one) for one in (*step.personal, FIGURES))
                (folder / name).write_bytes((PAGE if names_somebody else b"") + noise.bytes(64))
            versioning.record(folder, step.name)
        with Repo(".") as repo:
            repo.commit(
                f"{folder.as_posix()}/dvc.yaml", force=True
            )  # as by hand, or `dvc repro`: into the run-cache too
        _add_run(folder, version, [name for step in made for name in step.logged])
    with Repo(".") as repo, repo.config.edit() as settings:
        settings["remote"]["store"] = {"url": str(place.folder / "work/remote")}
    with Repo(".") as repo:
        repo.push(remote="store", run_cache=True)
    _add_leftovers(folder)


def _files(step: Step) -> list[str]:
    """What a step leaves beside its erasure's spec: files by name, and one in each folder that goes as a whole."""
    names = {*step.outputs, *step.personal, *step.unrecorded, *step.logged}
    whole = {name for name in names if not any(other.startswith(f"{name}/") for other in names)}
    return sorted(name if Path(name).suffix else f"{name}/file" for name in whole)


def _add_run(folder: Path, version: int, logged: list[str]) -> None:
    """A run as registration leaves it: its files; the one of version 2 was deleted in MLflow's page."""
    from tasks.mlflow.client import EXPERIMENT, experiment, mlflow_client

    with mlflow_client() as client:
        run = client.create_run(experiment(client, EXPERIMENT), tags={"erasure": folder.name}).info.run_id
        for name in ("dvc.lock", *logged):
            client.log_artifact(run, str(folder / name))
        client.log_artifacts(run, str(folder / "docs"), "data-docs")
        if version == 2:
            client.delete_run(run)


def _add_leftovers(folder: Path) -> None:
    """What others left who were killed, and trials of the same concept."""
    picture = Path("data/catalog/canvas") / pd.read_parquet(folder / "splits/forget.parquet")["path"][0]
    for place in (".fade/tmp/audit-1/clone", "data/catalog/.canvas.1.partial"):
        target = Path(place) / picture.relative_to("data/catalog/canvas")
        target.parent.mkdir(parents=True)
        shutil.copyfile(picture, target)
    shutil.copytree(folder / "splits", folder / ".splits.1.old")
    Path(".dvc/cache/files/md5/00").mkdir(exist_ok=True)
    shutil.copyfile(picture, ".dvc/cache/files/md5/00/.half.tmp")
    for trial in (Path("data/trials/ta1"), Path("data/trials/shared/ts1")):
        trial.mkdir(parents=True)
        for name in ("spec.yaml", "saliency.safetensors"):
            shutil.copyfile(folder / name, trial / name)
    together = Path("data/combinations/t1")  # of a contest's trials: it knows the erasure by the trial's name alone
    figures = dict(evaluation(judged_figures({PERSONS[0]: (50, 0, 50)}), gate=Gate()))
    judged = {name: figures[name] for name in Combination.model_fields if name in figures}
    dump(Combination(**judged, adapters={"ta1": "0" * 64, "ta2": "1" * 64}), together / "metrics.json")
    for name in ("samples.parquet", "sheet.png"):
        shutil.copyfile(picture, together / name)


def purge_once(place: Place, out: Path, fatal: int | None) -> None:
    """Purge in this process; it kills itself before its operation of the number ``fatal``.

    Writes how many operations there were, what the scan found, and what the receipts say.
    """
    place.enter()
    from fade.requests.ledger import Ledger
    from flows.proving import purge as purging
    from flows.proving import traces
    from flows.proving.scan import scan_erasure

    for name in ("_prefect_artifacts", "_prefect_results"):
        setattr(traces, name, lambda _: [])
    purging.version_page.show_purged = lambda *_: None
    purging.live_versions = lambda _: [2]
    (folder,) = ERASURES.iterdir()
    needles = _needles(folder)
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if counting and (event in EFFECTS or (event == "open" and _writes(arguments))) and _inside(arguments, place):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    counting = True
    sys.addaudithook(hook)
    with Ledger() as ledger:
        receipts = purging.purge(_live(folder.name), folder, ledger)
        counting = False
        rows = [row.details for row in ledger.history(erasure_id=folder.name) if row.event == "purge"]
    write_json(out, {
        "operations": count,
        "removed": len(receipts),
        "rows": len(rows),
        "left": [f"{one.where}: {one.what}" for one in scan_erasure(folder)] + _still_there(needles, place),
        "state": purging.state_of(folder)[0],
        "receipts": [[one["place"], one["name"], one["hash"]] for one in purging.state_of(folder)[1] if one["removed"]],
        "unmarked": _unmarked(),
    })  # fmt: skip


def _needles(folder: Path) -> list[bytes]:
    """Bytes of each forget picture and of what was made from them, as far as they are there."""
    split = folder / "splits/forget.parquet"
    paths = pd.read_parquet(split)["path"] if split.is_file() else []
    made = [
        path
        for name, parts in personal_data().items()
        for place in ([folder / name / part for part in parts] or [folder / name])
        for path in ([place] if place.is_file() else place.rglob("*"))
        if name != "splits"
    ]
    there = [*(Path("data/catalog/canvas") / path for path in paths), *made]
    return [path.read_bytes() for path in there if path.is_file()]


def _still_there(needles: list[bytes], place: Place) -> list[str]:
    files = [path for path in (place.folder / "work").rglob("*") if path.is_file()]
    return [
        f"{path}: bytes" for path in files for content in [path.read_bytes()] if any(one in content for one in needles)
    ]


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


def _inside(arguments: tuple[Any, ...], place: Place) -> bool:
    path = arguments[0]
    if not isinstance(path, str | Path):
        return False
    return os.path.abspath(path).startswith(str(place.folder / "work"))


def _unmarked() -> int:
    """Rows of the catalog whose picture is gone and that do not say so."""
    catalog = Path("data/catalog/canvas")
    table = pd.read_parquet(catalog / "catalog.parquet", columns=["path", "deleted_at"])
    return sum(not (catalog / row.path).is_file() for row in table[table["deleted_at"].isna()].itertuples())


def _live(erasure: str) -> Any:
    from tasks.mlflow.tracking import AdapterVersion

    return AdapterVersion(
        model=f"erasure-{erasure}", version=2, run_id="", adapter_sha256="", base_sha256="", kind="person",
        gate="passed", aliases=(), ua=1.0, ira=1.0, cra=1.0, drift=0.0, release="live",
    )  # fmt: skip


class Children:
    """Processes forked from one that has loaded the libraries."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["flows.proving.purge", "flows.proving.scan", "flows.erasing.erase"])

    def run(self, work: Any, *arguments: Any) -> int:
        """Its exit code."""
        child = self.context.Process(target=work, args=arguments)
        child.start()
        child.join()
        return int(child.exitcode or 0)


def one_round(place: Place, children: Children, draw: random.Random, kills: int) -> list[dict[str, Any]]:
    """Purge without a kill, to know what there is to do; then kill, and go on, so many times."""
    out = place.folder / "out.json"
    place.bring_back()
    if code := children.run(purge_once, place, out, None):
        sys.exit(f"The purge that nobody kills ended with {code}.")
    plain = read_json(out)
    operations, expected = plain["operations"], {tuple(one) for one in plain["receipts"]}
    found = [_outcome(plain, None, operations, expected)]
    while len(found) <= kills:
        place.bring_back()
        fatal = draw.randrange(1, operations + 1)
        code = children.run(purge_once, place, out, fatal)
        if code == 0:  # DVC needs some operations less where it knows a file from before: not so many were done
            operations = fatal - 1
            continue
        if code != -signal.SIGKILL:
            sys.exit(f"The purge was to be killed before operation {fatal} of {operations}, and ended with {code}.")
        if children.run(purge_once, place, out, None):
            sys.exit(f"Killed before operation {fatal}, the purge does not go on.")
        found.append(_outcome(read_json(out), fatal, operations, expected))
    return found


def _outcome(
    ended: dict[str, Any], fatal: int | None, operations: int, expected: set[tuple[str, ...]]
) -> dict[str, Any]:
    missing = expected - {tuple(one) for one in ended["receipts"]}
    said = {name: ended[name] for name in ("left", "unmarked", "rows", "state")}
    return {"before_operation": fatal, "of": operations, "missing": sorted(map(list, missing)), **said}


def run(folder: Path, *, kills: int, rounds: int, seed: int) -> dict[str, Any]:
    """Make the erasure, then so many rounds."""
    place, children = Place(folder), Children()
    if children.run(make_erasure, place):
        sys.exit("The erasure was not made.")
    place.keep()
    found = [one for number in range(rounds) for one in one_round(place, children, random.Random(seed + number), kills)]
    return {
        "kills": kills * rounds,
        "operations": found[0]["of"] or found[-1]["of"],
        "left": sum(len(one["left"]) for one in found),
        "missing": sum(len(one["missing"]) for one in found),
        "unmarked": sum(one["unmarked"] for one in found),
        "not_ended": sum(one["state"] != "purged" or one["rows"] != 1 for one in found),
        "each": found,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Kill, go on, look, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    out = given.json.resolve() if given.json else None
    with tempfile.TemporaryDirectory(prefix="purge-") as folder:
        found = run(Path(folder), kills=given.kills, rounds=given.rounds, seed=given.seed)
        os.chdir(ROOT)
    print({name: value for name, value in found.items() if name != "each"})
    for one in found["each"]:
        if one["left"] or one["missing"]:
            print(one)
    if out:
        where = [one["before_operation"] for one in found["each"]]
        write_json(out, {**{name: value for name, value in found.items() if name != "each"}, "before_operation": where})
    sys.exit(1 if found["left"] + found["missing"] + found["unmarked"] + found["not_ended"] else 0)


if __name__ == "__main__":
    main()
