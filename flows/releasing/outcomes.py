"""Record the outcome of an approval: in the log first, then on the version's page and in the requests behind it.

The log says what was said last, not the page: whoever may write to MLflow can edit a page, and a version's page is gone
with its model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from fade.adapters.manifest import Manifest
from fade.errors import FadeError
from fade.requests import tables
from fade.requests.ledger import Ledger
from fade.requests.states import TRANSITIONS, State
from flows.releasing.approval import who
from tasks.mlflow import version_page
from tasks.mlflow.registration import rows_of
from tasks.mlflow.tracking import MODEL_PREFIX, AdapterVersion

LIVE, GONE = "live", "rolled back"
_LONGEST = 500
"""Characters of a reason."""
_EVENTS = ("release.live", "release.rolled_back", "release.refused", "release.waiting", "release.kept")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReleaseOutcome:
    """The latest release event that the log holds of a version.

    Attributes:
        kind: ``live``, ``rolled_back``, ``refused``, ``waiting`` or ``kept``.
        run_id: MLflow's run of the version that went live.
    """

    kind: str
    reason: str
    run_id: str
    base_sha256: str


def last_outcomes(ledger: Ledger) -> dict[str, ReleaseOutcome]:
    """The latest release event of every version, by the version's name."""
    log = tables.log.c
    asked = sa.select(log.event, log.reason, log.erasure_id, log.details).where(log.event.in_(_EVENTS))
    found: dict[str, ReleaseOutcome] = {}
    with ledger.reading() as connection:
        for event, reason, erasure, details in connection.execute(asked.order_by(log.seq)):
            row = json.loads(details)
            name = f"{MODEL_PREFIX}{erasure}/{row['version']}"
            kind = event.removeprefix("release.")
            found[name] = ReleaseOutcome(kind, reason, row["run_id"], row["base_sha256"])
    return found


def record_outcomes(
    ledger: Ledger,
    said: Mapping[str, str],
    versions: Mapping[str, AdapterVersion],
    manifest: Manifest | None,
    *,
    together: Mapping[str, str] | None = None,
    base: str = "",
) -> None:
    """Log the outcomes that differ from the latest logged ones, and show them on the versions' pages.

    A page that cannot be written stops nothing: what is live is the manifest's to say.

    Args:
        said: outcome by version name: ``live``, ``rolled back``, ``kept: why``, ``waiting: why`` or ``refused: why``.
        versions: MLflow's versions by name.
        together: result of the test with all live adapters, by version name.
    """
    before = last_outcomes(ledger)
    for name, what in said.items():
        kind, _, reason = what.replace("rolled back", "rolled_back").partition(": ")
        version, last = versions.get(name), before.get(name)
        run_id = last.run_id if last is not None and kind == "kept" else version.run_id if version else ""
        if last is None or (last.kind, last.reason) != (kind, reason) or (kind == "live" and last.run_id != run_id):
            _log(ledger, name, kind, reason, manifest, run_id=run_id, base=base)
        if version is not None:
            _page(version_page.show_release, version, LIVE if kind == "kept" else what)
    for name, what in (together or {}).items():
        if name in versions:
            _page(version_page.show_together, versions[name], what)


def _page(write: Callable[[AdapterVersion, str], None], version: AdapterVersion, what: str) -> None:
    try:
        write(version, what)
    except FadeError as error:
        logger.warning("the page of %s version %d says nothing of it: %s", version.model, version.version, error)


def _log(
    ledger: Ledger, name: str, kind: str, reason: str, manifest: Manifest | None, *, run_id: str, base: str
) -> None:
    """Append a row to the log, and bring the requests behind the erasure to their new state."""
    model, _, number = name.partition("/")
    erasure, names = model.removeprefix(MODEL_PREFIX), () if manifest is None else manifest.names
    details: dict[str, object] = {"version": int(number), "run_id": run_id, "base_sha256": base}
    if manifest is not None:
        hashes = {entry.name: entry.adapter_sha256 for entry in manifest.adapters}
        details |= {
            "base_sha256": manifest.base_sha256,
            "manifest": manifest.counter,
            "manifest_sha256": manifest.sha256,
        }
        details |= {"adapter_sha256": hashes[name]} if name in hashes else {}
    others = [one for one in names if one.partition("/")[0] == model and one != name]
    if kind == "kept":
        actor = "fade"
    elif kind == "rolled_back" and others:
        actor, reason = "fade", f"version {others[0].partition('/')[2]} is live in its place"
    else:
        actor = who(rows_of(ledger, erasure), int(number), live=kind != "rolled_back")
    ledger.append(f"release.{kind}", actor=actor, reason=reason, erasure_id=erasure, details=details)
    after = {"live": State.LIVE, "rolled_back": State.ROLLED_BACK}.get(kind)
    if after is None or (after is State.ROLLED_BACK and others):
        return
    for record in ledger.find(erasure_id=erasure):
        if after in TRANSITIONS[record.state]:
            said = "" if manifest is None else f"release {manifest.counter}"
            ledger.transition(record.id, after, actor=actor, reason=said)


def shortened(error: object) -> str:
    """A reason on one line, short enough for an MLflow tag."""
    said = " ".join(str(error).split())
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."
