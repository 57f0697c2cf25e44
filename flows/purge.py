"""Purge: the forget data and what was made from it leave every store; hashes and receipts stay.

Removed: the forget pictures, splits, saliency, samples, sheets, validation results and Data Docs, attacks' pictures,
and the same of trials of these concepts; from the work tree, DVC's cache and remotes, MLflow's artifacts, Prefect's
artifacts and stored results. Kept: request, mask, adapter,
figures, lock file. What another erasure that is not purged needs is kept and reported. Run again, it removes
again what a restored backup brought back: what to remove is in the signed receipts, by hash.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fade.config import GENERATED, load_request
from fade.data.catalog import load_catalog
from fade.data.deletion import delete
from fade.errors import ConfigError
from fade.files import read_json, sha256_file
from fade.requests.ledger import Ledger
from fade.signing import read_signed, signing_key, verifying_key, write_signed
from fade.steps.attack import reference_path
from fade.steps.evaluate import CACHE
from fade.steps.further import further_hashes
from fade.steps.trial import TRIALS
from flows.release import LIVE
from flows.released import KEYS
from flows.together import COMBINATIONS
from tasks import _tracking, _versioning
from tasks._page import ATTACK, DOCS
from tasks._tracking import AdapterVersion

RECEIPTS_KIND, RECEIPTS_NAME = "fade-purge/1", "purge.json"
DERIVED = (GENERATED, "splits", "saliency.safetensors", "validation.json", "docs", "foreign", "attacks")
RECORDED = (GENERATED, "splits", "saliency.safetensors", "validation.json")
JUDGED = ("evaluation/samples.parquet", "evaluation/sheet.png", "evaluation/report.html")
RUN_FILES = ("sheet.png", "report.html", "validation.json", DOCS, ATTACK)


@dataclass(frozen=True, slots=True)
class Receipt:
    """One object: what and where it was, and whether it is gone.

    Attributes:
        place: ``work tree``, ``dvc cache``, ``dvc remote NAME``, ``mlflow`` or ``prefect``.
        name: path or object name; it names nobody.
        hash: SHA-256 of a file, MD5 of an object of DVC.
    """

    place: str
    name: str
    hash: str
    bytes: int
    removed: bool
    reason: str
    at: str


def purge(  # noqa: C901 - a loop for each store
    version: AdapterVersion, folder: Path, ledger: Ledger, *, dry_run: bool = False
) -> list[Receipt]:
    """Purge an erasure; gives a receipt for each object that is, or with ``dry_run`` would be, removed or kept.

    Raises:
        ConfigError: it is not live: until it is, its data may be needed to make it again.
    """
    before = _before(folder)
    if version.release != LIVE and not before:
        raise ConfigError(
            f"{version.model} version {version.version} is not live ({version.release or 'never approved'}): its data "
            "may be needed to make it again. Approve it first."
        )
    catalog = Path(load_request(folder).catalog)
    book = _Book(datetime.now(UTC).isoformat(timespec="seconds"), dry_run)
    pictures, objects = _needed_by_others(folder, catalog)
    wanted = _objects(folder, before)
    for path in _pictures(folder, catalog, before):
        digest = sha256_file(path)
        wanted.setdefault(_versioning.md5_of(path), "picture")
        keep = "another erasure needs the same picture" if digest in pictures else ""
        book.remove_file(path, f"picture {digest[:16]}", keep=keep)
    for path in [
        *_files(folder),
        *_trial_files(folder),
        *_combination_files(folder.name),
        *_kept_aside(folder, before),
    ]:
        book.remove_file(path, path.as_posix())
    for md5, name in wanted.items():
        keep = "another erasure needs the same bytes" if md5 in objects else ""
        for place, size in _versioning.places_of(md5):
            if book.note(place, name, md5, size, keep=keep):
                _versioning.delete_object(md5, place)
    for name, digest, size in _tracking.run_objects(version, RUN_FILES):
        if book.note("mlflow", name, digest, size):
            _tracking.delete_run_file(version, name)
    for name in _prefect_artifacts(folder.name, delete=not dry_run):
        book.note("prefect", name, "", 0)
    for path in _prefect_results(folder.name):
        if book.note("prefect", f"result {path.name}", sha256_file(path), path.stat().st_size):
            path.unlink()
    if not dry_run:
        _tidy(folder)
        _record(folder, catalog, book.receipts, before, ledger)
        _tracking.say_purged(version, _summary(_before(folder)))
    return book.receipts


@dataclass(slots=True)
class _Book:
    """The receipts as they come."""

    at: str
    dry_run: bool
    receipts: list[Receipt] = field(default_factory=list)

    def note(self, place: str, name: str, digest: str, size: int, *, keep: str = "") -> bool:
        """Write a receipt; whether to remove the object now."""
        self.receipts.append(Receipt(place, name, digest, size, not keep, keep, self.at))
        return not keep and not self.dry_run

    def remove_file(self, path: Path, name: str, *, keep: str = "") -> None:
        """A file of the work tree."""
        if self.note("work tree", name, sha256_file(path), path.stat().st_size, keep=keep):
            path.unlink()


def _objects(folder: Path, before: Iterable[dict[str, Any]]) -> dict[str, str]:
    """MD5 of DVC's objects to purge, and what each was part of; those of earlier receipts too."""
    wanted = {one["hash"]: one["name"] for one in before if one["place"].startswith("dvc") and one["removed"]}
    for part in RECORDED:
        wanted |= dict.fromkeys(_versioning.objects_of(folder, part), part)
    judged = tuple(name.removeprefix("evaluation/") for name in JUDGED)
    return wanted | dict.fromkeys(_versioning.objects_of(folder, "evaluation", only=judged), "evaluation")


def _before(folder: Path) -> list[dict[str, Any]]:
    path = folder / RECEIPTS_NAME
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = read_signed(path, RECEIPTS_KIND, verifying_key(KEYS))["receipts"]
    return found


def _pictures(folder: Path, catalog: Path, before: Iterable[dict[str, Any]]) -> list[Path]:
    """The catalog's forget pictures that are there: by the split, or by hash once it is gone; and the further ones."""
    table = pd.read_parquet(catalog / "catalog.parquet")
    split = folder / "splits" / "forget.parquet"
    hashes = set(pd.read_parquet(split, columns=["sha256"])["sha256"]) if split.is_file() else set()
    hashes |= {one["hash"] for one in before if one["name"].startswith("picture ") and one["removed"]}
    hashes |= further_hashes(folder)
    rows = table[table["sha256"].isin(hashes)]
    return [path for path in (catalog / name for name in rows["path"]) if path.is_file()]


def _needed_by_others(folder: Path, catalog: Path) -> tuple[set[str], set[str]]:
    """SHA-256 of pictures, and MD5 of DVC's objects, that erasures which are not purged still use."""
    pictures: set[str] = set()
    objects: set[str] = set()
    for other in folder.parent.iterdir():
        if other == folder or not (other / "request.yaml").is_file() or (other / RECEIPTS_NAME).is_file():
            continue
        if (other / "splits").is_dir() and load_request(other).catalog == catalog.as_posix():
            for split in (other / "splits").glob("*.parquet"):
                pictures |= set(pd.read_parquet(split, columns=["sha256"])["sha256"])
        if (other / "dvc.lock").is_file():
            objects |= _versioning.objects_of(other)
    return pictures, objects


def _files(folder: Path) -> list[Path]:
    parts = [*(folder / name for name in (*DERIVED, *JUDGED)), *_unfinished(folder)]
    found = [path for part in parts for path in ([part] if part.is_file() else sorted(part.rglob("*")))]
    return [path for path in found if path.is_file()]


def _unfinished(folder: Path) -> list[Path]:
    """What a writer that was killed had begun, or had moved aside."""
    return [*folder.glob(".*.partial*"), *folder.glob(".*.old")]


def _trial_files(folder: Path) -> list[Path]:
    """The same of studies' trials of what this erasure erases."""
    erased = load_request(folder)
    concepts = {pair.concept for pair in erased.pairs}
    found = []
    for path in sorted(TRIALS.glob("*/request.yaml")):
        trial = load_request(path.parent)
        if trial.catalog == erased.catalog and not concepts.isdisjoint(pair.concept for pair in trial.pairs):
            found += _files(path.parent)
    return found


def _kept_aside(folder: Path, before: Iterable[dict[str, Any]]) -> list[Path]:
    """Pictures that an attack found on the base from the forget pictures; by their receipt once the split is gone."""
    paths = {Path(one["name"]) for one in before if Path(one["name"]).is_relative_to(CACHE)}
    if (folder / "splits" / "forget.parquet").is_file():
        paths.add(reference_path(load_request(folder), folder))
    return [path for path in sorted(paths) if path.is_file()]


def _combination_files(erasure: str) -> list[Path]:
    """Samples and sheets of combinations that this erasure was part of."""
    found = []
    for metrics in COMBINATIONS.glob("*/metrics.json"):
        if erasure in read_json(metrics).get("adapters", {}):
            found += [
                path
                for path in (metrics.with_name("samples.parquet"), metrics.with_name("sheet.png"))
                if path.is_file()
            ]
    return sorted(found)


def _prefect_artifacts(erasure: str, *, delete: bool) -> list[str]:
    """Prefect's artifacts of an erasure: the sheet is kept there as a small picture."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    keys = [f"sheet-{erasure.replace('_', '-').lower()}"]
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=keys)))
        if delete:
            for one in found:
                client.delete_artifact(one.id)
    return [f"artifact {one.id}" for one in found]


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


def _tidy(folder: Path) -> None:
    for path in (*(folder / name for name in DERIVED), *_unfinished(folder)):
        if path.is_dir():
            shutil.rmtree(path)


def _summary(receipts: list[dict[str, Any]]) -> str:
    """For the version's page, of all runs."""
    removed = [one["at"] for one in receipts if one["removed"]]
    kept = len({(one["place"], one["name"], one["hash"]) for one in receipts if not one["removed"]})
    said = f"on {max(removed)[:10]}: {len(removed)} objects removed" if removed else "with nothing to remove"
    return said + (f", {kept} kept for other erasures" if kept else "")


def _record(folder: Path, catalog: Path, receipts: list[Receipt], before: list[dict[str, Any]], ledger: Ledger) -> None:
    """Receipts of all runs, signed; the catalog's mark; a row of the log."""
    key = signing_key(KEYS)
    everything = [*before, *(asdict(one) for one in receipts)]
    sha256 = write_signed(folder / RECEIPTS_NAME, {"erasure": folder.name, "receipts": everything}, RECEIPTS_KIND, key)
    gone = {
        one.hash for one in receipts if one.removed and one.name.startswith("picture ") and one.place == "work tree"
    }
    table = load_catalog(catalog)
    if marked := table[table["sha256"].isin(gone)]["image_id"].tolist():
        # Such a row never comes into a split again.
        delete(catalog, image_ids=marked, subjects=(), at=datetime.fromisoformat(receipts[0].at))
    removed = sum(one.removed for one in receipts)
    if receipts:
        details = {"removed": removed, "kept": len(receipts) - removed, "receipts_sha256": sha256}
        ledger.append("purge", actor="fade", erasure_id=folder.name, details=details)
