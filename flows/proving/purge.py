"""Purge: the forget data and what was made from it leave every store; hashes and receipts stay.

Removed: the forget pictures with their copies, splits, saliency, samples, sheets, validation results and Data Docs,
attacks' pictures, of every version, and the same of trials of these concepts; the catalog's contact sheet is drawn
anew. From the work tree, DVC's cache and remotes with their run-caches, MLflow's artifacts, Prefect's artifacts and
stored results, temporary folders that killed programs left. Kept: request, mask, adapter, figures, lock file. What
another erasure that is not purged needs is kept and reported.

What is to go is signed first (``purge-begun.json``), then it goes, object by object, each with its receipt. A purge
that is cut off is gone on with from its intents: what is not there any more has gone. Run again, it removes again
what a restored backup brought back: what to remove is in the signed receipts, by hash.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fade.data.deletion import mark
from fade.errors import ConfigError, ResourceError
from fade.requests.ledger import Ledger
from fade.signing import read_signed, signing_key, verifying_key, write_signed
from fade.spec import load_spec
from flows.proving.traces import (
    BEGUN_NAME,
    JOURNAL_NAME,
    PICTURE,
    RECEIPTS_NAME,
    SHEET,
    Traces,
    personal_paths,
    traces_of,
    unfinished,
)
from flows.releasing.released import KEYS, live_versions
from flows.settings import ERASURES, STATE
from tasks.dvc import versioning
from tasks.dvc.objects import stores
from tasks.mlflow import version_page
from tasks.mlflow.tracking import AdapterVersion

RECEIPTS_KIND, BEGUN_KIND = "fade-purge/1", "fade-purge-begun/1"
WAIT_SECONDS = 600.0


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


def purge(version: AdapterVersion, folder: Path, ledger: Ledger, *, dry_run: bool = False) -> list[Receipt]:
    """Purge an erasure; gives a receipt for each object that is, or with ``dry_run`` would be, removed or kept.

    A purge that was begun and cut off is brought to its end: its receipts tell of what had gone before, too.

    Raises:
        ConfigError: it is not live: until it is, its data may be needed to make it again.
        LineageError: a lock file cannot be read; nothing was removed.
        ResourceError: another purge, or the erasure itself, has been at work for ten minutes.
    """
    with _alone(folder.name):
        receipts, begun = _signed(folder / RECEIPTS_NAME), _signed(folder / BEGUN_NAME)
        # By the signed manifest: a page can be edited, and somebody else's newer version changes nothing.
        if not live_versions(version.model) and not (receipts or begun):
            raise ConfigError(
                f"{version.model} version {version.version} is not live ({version.release or 'never approved'}): its "
                "data may be needed to make it again. Approve it first."
            )
        before: list[dict[str, Any]] = receipts.get("receipts", [])
        at = datetime.now(UTC).isoformat(timespec="seconds")
        catalog = Path(load_spec(folder).catalog)
        with stores() as opened:
            found = traces_of(folder, [*before, *begun.get("intents", [])], opened)
            if dry_run:
                return [Receipt(t.place, t.name, t.hash, t.bytes, not t.keep, t.keep, at) for t in found.things]
            begun = _begin(folder, found, begun, before, at)
            said = {_key(one) for one in before if not one["removed"]}
            written = [
                one
                for one in _carry_out(folder, catalog, found, begun["intents"], at)
                if one["removed"] or _key(one) not in said
            ]
        _tidy(folder, catalog)
        if any(one["removed"] and one["name"].startswith((PICTURE, SHEET)) for one in written):
            _track_again(catalog)
        versioning.forget_names()
        _record(folder, [*before, *written], begun["at"], ledger)
        version_page.show_purged(version, _summary([*before, *written]))
        for name in (JOURNAL_NAME, BEGUN_NAME):  # the intents last: as long as they are there, it is not over
            (folder / name).unlink(missing_ok=True)
        return [Receipt(**one) for one in written]


def purged_before() -> list[str]:
    """Erasures that were purged, or whose purge was begun."""
    found = {path.parent.name for name in (RECEIPTS_NAME, BEGUN_NAME) for path in ERASURES.glob(f"*/{name}")}
    return sorted(found)


def state_of(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """How far an erasure's purge is (``not purged``, ``begun and not ended``, ``purged``), and all its receipts.

    Raises:
        SignatureError: the receipts were changed.
    """
    receipts: list[dict[str, Any]] = _signed(folder / RECEIPTS_NAME).get("receipts", [])
    if (folder / BEGUN_NAME).is_file():
        return "begun and not ended", receipts
    return "purged" if (folder / RECEIPTS_NAME).is_file() else "not purged", receipts


@contextmanager
def _alone(erasure: str) -> Iterator[None]:
    """One purge at a time, and none of an erasure that somebody is just making."""
    STATE.mkdir(exist_ok=True)
    try:
        with ExitStack() as held:
            for name in ("purge", f"erase-{erasure}"):
                held.enter_context(FileLock(STATE / f"{name}.lock", timeout=WAIT_SECONDS))
            yield
    except Timeout:
        raise ResourceError(
            f"Another purge, or the erasure {erasure} itself, has not ended within {WAIT_SECONDS:.0f} s. "
            "Wait for it, or end it, and try again."
        ) from None


def _signed(path: Path) -> dict[str, Any]:
    """What receipts or intents say; nothing if there are none."""
    kind = RECEIPTS_KIND if path.name == RECEIPTS_NAME else BEGUN_KIND
    return read_signed(path, kind, verifying_key(KEYS)) if path.is_file() else {}


def _key(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return one["place"], one["name"], one["hash"]


def _begin(folder: Path, found: Traces, begun: dict[str, Any], before: list[dict[str, Any]], at: str) -> dict[str, Any]:
    """Sign what is to go, with what an earlier purge was to remove and has no receipt of; gives these intents."""
    since = begun.get("at", at)
    done = {_key(one) for one in before if one["removed"] and one["at"] >= since}
    intents = {_key(one): one for one in begun.get("intents", []) if _key(one) not in done}
    for thing in found.things:
        if not thing.keep:
            one = {"place": thing.place, "name": thing.name, "hash": thing.hash, "bytes": thing.bytes}
            intents.setdefault(_key(one), one)
    payload = {"erasure": folder.name, "at": since, "intents": list(intents.values())}
    if intents:
        write_signed(folder / BEGUN_NAME, payload, BEGUN_KIND, signing_key(KEYS))
    return payload


def _carry_out(folder: Path, catalog: Path, found: Traces, intents: list[Any], at: str) -> list[dict[str, Any]]:
    """Remove all that was found; gives the receipts, those of what had gone before this purge was cut off first."""
    if found.marked:  # before the files go: no split takes a picture that is about to
        mark(catalog, found.marked, at=datetime.fromisoformat(at))
    gone = _journal(folder)
    there = {(thing.place, thing.name, thing.hash) for thing in found.things}
    written = [
        gone.get(_key(one)) or asdict(Receipt(**one, removed=True, reason="", at=at))
        for one in intents
        if _key(one) not in there
    ]
    with (folder / JOURNAL_NAME).open("a", encoding="utf-8") as journal:
        for thing in found.things:
            kept = thing.keep
            receipt = asdict(Receipt(thing.place, thing.name, thing.hash, thing.bytes, not kept, kept, at))
            if not kept:
                thing.remove()
                print(json.dumps(receipt, sort_keys=True), file=journal, flush=True)
            written.append(receipt)
    return written


def _journal(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Receipts as they were written by a purge that was cut off; its last line may be, too."""
    path = folder / JOURNAL_NAME
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    found = [json.loads(line) for line in lines]
    return {_key(one): one for one in found}


def _tidy(folder: Path, catalog: Path) -> None:
    """Folders that are empty now: their names may be a person's."""
    for path in (*personal_paths(folder), *unfinished(folder)):
        if path.is_dir():
            shutil.rmtree(path)
    for top in (catalog / "pictures", *catalog.parent.glob(f".{catalog.name}.*")):
        for path in sorted((one for one in top.rglob("*") if one.is_dir()), reverse=True):
            if not any(path.iterdir()):
                path.rmdir()


def _track_again(catalog: Path) -> None:
    """DVC's record of a catalog that it keeps names what is there now."""
    if Path(f"{catalog}.dvc").is_file():
        versioning.track(catalog)


def _summary(receipts: list[dict[str, Any]]) -> str:
    """For the version's page, of all runs."""
    removed = [one["at"] for one in receipts if one["removed"]]
    kept = len({_key(one) for one in receipts if not one["removed"]})
    said = f"on {max(removed)[:10]}: {len(removed)} objects removed" if removed else "with nothing to remove"
    return said + (f", {kept} kept for other erasures" if kept else "")


def _record(folder: Path, receipts: list[dict[str, Any]], since: str, ledger: Ledger) -> None:
    """Receipts of all runs, signed, and a row of the log for those of this one; once, however often it is cut off."""
    key = signing_key(KEYS)
    sha256 = write_signed(folder / RECEIPTS_NAME, {"erasure": folder.name, "receipts": receipts}, RECEIPTS_KIND, key)
    rows = ledger.history(erasure_id=folder.name)
    if not receipts or any(row.event == "purge" and row.details["receipts_sha256"] == sha256 for row in rows):
        return
    now = [one for one in receipts if one["at"] >= since]
    removed = sum(one["removed"] for one in now)
    details = {"removed": removed, "kept": len(now) - removed, "receipts_sha256": sha256}
    ledger.append("purge", actor="fade", erasure_id=folder.name, details=details)
