"""What there is of an erasure that a purge removes: each object, where it lies, and how it goes.

Asked of the stores themselves: by the erasure's folder, by every lock file that ever named an output of it (its own,
the project's, those of all its runs in MLflow, those in git's history, the entries of the run-cache), by the
catalog's rows, and by the receipts and intents of earlier purges.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from fade import pipeline
from fade.asking.further import further_hashes
from fade.data.deletion import Picture, find
from fade.data.intake import draw_sheet
from fade.evaluation.measured import Combination
from fade.evaluation.records import load
from fade.files import load_yaml, read_yaml, sha256_file
from fade.spec import load_spec
from fade.steps.alike import COMBINATIONS
from fade.steps.attack import reference_path
from fade.steps.drawn import CACHE
from fade.studies.trial import TRIALS
from fade.temporary import abandoned, remove
from tasks.dvc.objects import CACHE as DVC_CACHE
from tasks.dvc.objects import Stores, is_part, md5_of, objects_of, pointers
from tasks.dvc.versioning import read_lock
from tasks.mlflow import traces
from tasks.mlflow.page import ATTACK, DOCS

RECEIPTS_NAME, BEGUN_NAME, JOURNAL_NAME = "purge.json", "purge-begun.json", "purge.journal"
PICTURE, SHEET, RUN, UNFINISHED = "picture", "catalog sheet", "run-cache", "unfinished"
OTHERS_PICTURE, OTHERS_BYTES = "another erasure needs the same picture", "another erasure needs the same bytes"


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is called in receipts (that names nobody), its hash, why it stays, how it goes."""

    place: str
    name: str
    hash: str
    bytes: int
    keep: str
    remove: Callable[[], None]


@dataclass(slots=True)
class Traces:
    """What was found.

    Attributes:
        marked: ids of the catalog's rows that are to say that their picture is gone.
    """

    things: list[Thing] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)


def traces_of(folder: Path, known: list[dict[str, Any]], stores: Stores) -> Traces:
    """Everything of an erasure that is there, in the order in which it goes.

    Args:
        known: receipts and intents of earlier purges: what they name is looked for again.
    """
    catalog = Path(load_spec(folder).catalog)
    locks = [*_locks(folder), *_run_locks(folder, stores)]
    others = needed_by_others(folder, stores)
    wanted = {one["hash"]: one["name"] for one in known if _is_object(one)}
    stays = _kept_by(folder, stores)
    wanted |= {md5: name for md5, name in _objects(locks, folder, stores).items() if md5 not in stays}
    found = Traces()
    kept = _pictures(found, catalog, _picture_hashes(folder, known, locks, stores), others, wanted)
    _sheet(found, catalog, known, wanted)
    trials = _trials_of(folder)
    judged_together = _combination_files([folder.name, *(trial.name for trial in trials)])
    own = [path for one in (folder, *trials) for path in _files(one)]
    for path in [*own, *judged_together, *_kept_aside(folder, known)]:
        wanted.setdefault(md5_of(path), _part(path, folder))
        found.things.append(_file(path, _said(path, folder)))
    _catalog_lists(catalog, wanted, kept, stores)
    for md5, name in wanted.items():
        keep = OTHERS_BYTES if md5 in others.objects or md5 in kept else ""
        for place, size in stores.places(md5):
            found.things.append(Thing(place, name, md5, size, keep, partial(stores.delete, md5, place)))
    for run in stores.runs():
        if not run.outputs or any(path.startswith(f"{folder.as_posix()}/") for path in run.outputs):
            entry = Thing(run.place, RUN, Path(run.path).name, run.bytes, "", partial(stores.delete_run, run))
            found.things.append(entry)
    for path in stores.unfinished():
        found.things.append(_file(path, UNFINISHED, place=DVC_CACHE))
    _add_served(found, folder)
    for path in abandoned():
        size = sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
        found.things.append(Thing("work tree", path.as_posix(), "", size, "", partial(remove, path)))
    return found


def _objects(locks: list[dict[str, Any]], folder: Path, stores: Stores) -> dict[str, str]:
    """MD5 of the objects of outputs that go, by what lock files say of them, and what each was part of."""
    found: dict[str, str] = {}
    for name, parts in pipeline.personal_data().items():
        found |= dict.fromkeys(objects_of(locks, stores, folder.as_posix(), name, parts), name)
    return found


def _kept_by(folder: Path, stores: Stores) -> set[str]:
    """MD5 of the catalogs' objects and of the erasure's outputs that stay.

    No lock file takes them away: those in MLflow are as trustworthy as whoever may write there.
    """
    named = {out["md5"] for path in pointers() for out in read_yaml(path).get("outs", [])}
    stages = read_lock(folder / "dvc.lock").values()
    outs = {out["path"]: out["md5"] for stage in stages for out in stage.get("outs", [])}
    gone = {f"{folder.as_posix()}/{name}": parts for name, parts in pipeline.personal_data().items()}
    named |= {md5 for path, md5 in outs.items() if path not in gone}
    kept = named | {md5 for one in named for md5 in stores.parts(one).values()}
    partly = {path: parts for path, parts in gone.items() if parts and path in outs}
    return kept | {
        md5
        for path, parts in partly.items()
        for name, md5 in stores.parts(outs[path]).items()
        if not is_part(name, parts)
    }


def _add_served(found: Traces, folder: Path) -> None:
    """What MLflow and Prefect hold."""
    for run_id in traces.runs_of(folder.name):
        for name in traces.run_files(run_id, _run_files()):
            content = traces.run_bytes(run_id, name)
            gone = partial(traces.delete_run_file, run_id, name)
            digest = hashlib.sha256(content).hexdigest()
            found.things.append(Thing("mlflow", f"{run_id}/{name}", digest, len(content), "", gone))
    for artifact in _prefect_artifacts(folder.name):
        found.things.append(Thing("prefect", f"artifact {artifact}", "", 0, "", partial(_delete_artifact, artifact)))
    for path in _prefect_results(folder.name):
        found.things.append(_file(path, f"result {path.name}", place="prefect"))


def _is_object(one: Mapping[str, Any]) -> bool:
    return one["place"].startswith("dvc") and one["name"] not in (RUN, UNFINISHED) and bool(one["hash"])


def _file(path: Path, name: str, *, place: str = "work tree", keep: str = "") -> Thing:
    gone = partial(path.unlink, missing_ok=True)
    return Thing(place, name, sha256_file(path), path.stat().st_size, keep, gone)


def _part(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0] if path.is_relative_to(folder) else path.parts[1]


def _said(path: Path, folder: Path) -> str:
    """A file's name in a receipt; what a person called another tool's file may name somebody, and is not said."""
    foreign = folder / "foreign"
    return f"{foreign.as_posix()}/{sha256_file(path)[:16]}" if path.is_relative_to(foreign) else path.as_posix()


# Lock files


def _locks(folder: Path) -> list[dict[str, Any]]:
    """What any lock file records of the erasure's outputs: its own, the project's, its runs', git's older ones.

    Raises:
        LineageError: one that is there cannot be read: then nothing is known of what it names.
    """
    own = [folder / "dvc.lock", Path("dvc.lock")]
    found = [stage for path in own for stage in read_lock(path).values()]
    runs = [run for run in traces.runs_of(folder.name) if traces.run_files(run, ["dvc.lock"])]
    texts = [traces.run_bytes(run, "dvc.lock") for run in runs]
    for text in [*texts, *_git_history(folder / "dvc.lock")]:
        content = load_yaml(text)
        found += (content.get("stages") or {}).values() if isinstance(content, dict) else []
    return found


def _git_history(path: Path) -> Iterator[bytes]:
    """Every version of a file that git has; none outside a repository."""
    if shutil.which("git") is None:
        return
    listed = subprocess.run(
        ["git", "log", "--all", "--format=%H", "--", str(path)], capture_output=True, text=True, check=False
    )
    for commit in listed.stdout.split() if listed.returncode == 0 else ():
        shown = subprocess.run(["git", "show", f"{commit}:./{path.as_posix()}"], capture_output=True, check=False)
        if shown.returncode == 0 and b"<<<<<<<" not in shown.stdout:
            yield shown.stdout


def _run_locks(folder: Path, stores: Stores) -> list[dict[str, Any]]:
    inside = f"{folder.as_posix()}/"
    return [
        {"outs": [{"path": path, "md5": md5} for path, md5 in run.outputs.items() if path.startswith(inside)]}
        for run in stores.runs()
    ]


# Pictures


@dataclass(frozen=True, slots=True)
class Needed:
    """What erasures that are not purged still use: SHA-256 of pictures, MD5 of DVC's objects."""

    pictures: frozenset[str]
    objects: frozenset[str]


def needed_by_others(folder: Path, stores: Stores) -> Needed:
    """What other erasures' splits name in the same catalog, and what their lock files record.

    One whose purge has begun needs nothing any more.
    """
    catalog = Path(load_spec(folder).catalog).resolve()
    pictures: set[str] = set()
    objects: set[str] = set()
    for other in folder.parent.iterdir():
        purged = any((other / name).is_file() for name in (RECEIPTS_NAME, BEGUN_NAME))
        if other == folder or purged or not (other / "spec.yaml").is_file():
            continue
        stages = [*read_lock(other / "dvc.lock").values()]
        if Path(load_spec(other).catalog).resolve() == catalog:
            pictures |= _split_hashes(other, "*.parquet", stages, stores)
        named = {out["md5"] for stage in stages for out in stage.get("outs", [])}
        objects |= named | {md5 for one in named for md5 in stores.parts(one).values()}
    return Needed(frozenset(pictures), frozenset(objects))


def _split_hashes(folder: Path, pattern: str, stages: Iterable[dict[str, Any]], stores: Stores) -> set[str]:
    """SHA-256 of the pictures of an erasure's splits: those in the work tree, and those that DVC holds."""
    tables: list[Any] = list((folder / "splits").glob(pattern))
    named = {out["md5"] for one in stages for out in one.get("outs", []) if out["path"] == f"{folder}/splits"}
    for md5 in {md5 for one in named for path, md5 in stores.parts(one).items() if Path(path).match(pattern)}:
        content = stores.read(md5)
        tables += [io.BytesIO(content)] if content else []
    return {digest for table in tables for digest in pd.read_parquet(table, columns=["sha256"])["sha256"]}


def _picture_hashes(
    folder: Path, known: Iterable[Mapping[str, Any]], locks: Iterable[dict[str, Any]], stores: Stores
) -> set[str]:
    """The forget pictures: by the splits, of every version, by hash once these are gone, and the further ones."""
    said = {one["hash"] for one in known if one["place"] == "work tree" and one["name"].startswith(f"{PICTURE} ")}
    return said | _split_hashes(folder, "forget.parquet", locks, stores) | further_hashes(folder)


def _pictures(found: Traces, catalog: Path, hashes: set[str], others: Needed, wanted: dict[str, str]) -> set[str]:
    """The catalog's pictures, their copies, and what is left of catalogs that were being written; MD5 of what stays."""
    kept: set[str] = set()
    for one in find(catalog, sha256=hashes):
        keep = OTHERS_PICTURE if one.sha256 in others.pictures else ""
        if not keep and not one.marked:
            found.marked.append(one.image_id)
        for path in _copies_of(one, catalog):
            if keep:
                kept.add(md5_of(path))
            else:
                wanted.setdefault(md5_of(path), PICTURE)
            found.things.append(_file(path, f"{PICTURE} {one.sha256[:16]}", keep=keep))
    return kept


def _copies_of(one: Picture, catalog: Path) -> Iterator[Path]:
    """A picture's file, and those of the catalog as it was written or put aside by whoever was killed."""
    if one.path.is_file():
        yield one.path
    for left in catalog.parent.glob(f".{catalog.name}.*"):
        if (path := left / one.path.relative_to(catalog)).is_file() and sha256_file(path) == one.sha256:
            yield path


def _sheet(found: Traces, catalog: Path, known: Iterable[Mapping[str, Any]], wanted: dict[str, str]) -> None:
    """The contact sheet is drawn anew where it may show a picture that goes, or was to go."""
    found.things += [_file(path, UNFINISHED) for path in unfinished(catalog)]
    path = catalog / "sheet.png"
    if not path.is_file():
        return
    digest = sha256_file(path)
    due = any(one["name"] == SHEET and one["hash"] == digest for one in known)
    if due or any(not one.keep and one.name.startswith(PICTURE) for one in found.things):
        wanted.setdefault(md5_of(path), SHEET)
        thing = Thing("work tree", SHEET, digest, path.stat().st_size, "", partial(draw_sheet, catalog))
        found.things.append(thing)


def _catalog_lists(catalog: Path, wanted: dict[str, str], kept: set[str], stores: Stores) -> None:
    """The cache's lists of catalogs that hold a picture which goes: the list, as it names files, and its sheet."""
    going = {md5 for md5, name in wanted.items() if name == PICTURE} - kept
    tracked = [path for path in pointers() if path != Path(f"{catalog}.dvc")]
    current = {out["md5"] for path in tracked for out in read_yaml(path).get("outs", [])}
    current |= {out["md5"] for stage in read_lock(Path("dvc.lock")).values() for out in stage.get("outs", [])}
    for md5, parts in stores.lists():
        if "catalog.parquet" in parts and not going.isdisjoint(parts.values()):
            if "sheet.png" in parts:
                wanted.setdefault(parts["sheet.png"], SHEET)
            if md5 not in current:  # its table has the rows of what goes; the one of now is recorded again
                wanted |= {one: wanted.get(one, "catalog list") for one in (md5, parts["catalog.parquet"])}


# Files


def _files(folder: Path) -> list[Path]:
    parts = [*personal_paths(folder), *unfinished(folder)]
    found = [path for part in parts for path in ([part] if part.is_file() else sorted(part.rglob("*")))]
    return [path for path in found if path.is_file()]


def personal_paths(folder: Path) -> list[Path]:
    """Files and folders of an erasure that a purge removes."""
    data = pipeline.personal_data().items()
    return [folder / name / part for name, parts in data for part in (parts or ("",))]


def _run_files() -> list[str]:
    """Artifacts of an erasure's run that hold personal data."""
    logged = [name for step in pipeline.STEPS for name in step.logged if name in step.personal]
    return [*(Path(name).name for name in logged), DOCS, ATTACK]


def unfinished(folder: Path) -> list[Path]:
    """What a writer that was killed had begun, or had moved aside."""
    return [*folder.glob(".*.partial*"), *folder.glob(".*.old")]


def _trials_of(folder: Path) -> list[Path]:
    """Studies' trials of what this erasure erases, with what several of them share."""
    erased = load_spec(folder)
    concepts = {pair.concept for pair in erased.pairs}
    found = []
    for path in sorted(TRIALS.rglob("spec.yaml")):
        trial = load_spec(path.parent)
        same = Path(trial.catalog).resolve() == Path(erased.catalog).resolve()
        if same and not concepts.isdisjoint(pair.concept for pair in trial.pairs):
            found.append(path.parent)
    return found


def _kept_aside(folder: Path, known: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Pictures that an attack found on the base from the forget pictures; by their receipt once the split is gone."""
    paths = {Path(one["name"]) for one in known if Path(one["name"]).is_relative_to(CACHE)}
    if (folder / "splits" / "forget.parquet").is_file():
        paths.add(reference_path(load_spec(folder), folder))
    return [path for path in sorted(paths) if path.is_file()]


def _combination_files(names: Collection[str]) -> list[Path]:
    """Samples and sheets of combinations that one of these, erasures or trials, was part of."""
    found = []
    for metrics in COMBINATIONS.glob("*/metrics.json"):
        if not load(Combination, metrics).adapters.keys().isdisjoint(names):
            parts = (metrics.with_name("samples.parquet"), metrics.with_name("sheet.png"))
            found += [path for path in parts if path.is_file()]
    return sorted(found)


# Prefect


def _prefect_artifacts(erasure: str) -> list[Any]:
    """Ids of Prefect's artifacts of an erasure: its sheet, by address."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    keys = [f"sheet-{erasure.replace('_', '-').lower()}"]
    with get_client(sync_client=True) as client:
        return [
            one.id for one in client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=keys)))
        ]


def _delete_artifact(artifact: Any) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.delete_artifact(artifact)
        except ObjectNotFound:
            return


def _prefect_results(erasure: str) -> list[Path]:
    """Results of an erasure's flow and tasks that Prefect was told to keep, in its folder for them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.settings import get_current_settings

    place = get_current_settings().results.local_storage_path
    named = FlowRunFilter(name=FlowRunFilterName(any_=[f"erase-{erasure}"]))
    with get_client(sync_client=True) as client:
        runs: list[Any] = [*client.read_flow_runs(flow_run_filter=named), *_task_runs(client, named)]
    keys = [getattr(run.state.data, "storage_key", None) for run in runs if run.state is not None]
    return sorted({place / key for key in keys if key and (place / key).is_file()})


def _task_runs(client: Any, flows: Any) -> Iterator[Any]:
    """All of them: the server gives them in pages."""
    offset = 0
    while page := client.read_task_runs(flow_run_filter=flows, offset=offset, limit=200):
        yield from page
        offset += len(page)
