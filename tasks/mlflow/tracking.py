"""MLflow's registry: an adapter as the version of a registered model, aliases as approval."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade.adapters.card import CARD_NAME, DELTA_NAME, WEIGHTS_NAME, load_card
from fade.errors import LineageError, RegistryError, listing, nearest
from fade.evaluation.verdicts import TO_DECIDE
from fade.files import sha256_file
from fade.requests.ledger import Ledger
from tasks.mlflow.client import fetch_files, files_of, read_file, registry, tracking_uri
from tasks.mlflow.registration import registration_of, registrations

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from tasks.mlflow.embedded import Version

MODEL_PREFIX = "erasure-"
APPROVED, CANDIDATE = "approved", "candidate"
JUDGED = ("ua", "ira", "cra", "scrambled", "surrogate")
"""Figures of an evaluation, by a judge."""
RELEASE_TAG, TOGETHER_TAG, PURGED_TAG, WITHDRAWN = "release", "together", "purged", "withdrawn"
DECISION_TAG = "gate_decision"
ADAPTER = "adapter"
"""Folder of a run that holds the adapter's files."""
logger = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RATES = ("ua", "ira", "cra")
_FIGURES = (*_RATES, "drift")
UNJUDGED = "unjudged"
"""In the place of a figure: the judge could not see what it is of. What it said stands in ``metrics.json``."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One registered adapter.

    Attributes:
        model: registered model, one for each erasure; its name holds only the erasure's id.
        aliases: among them ``candidate`` (offered) and ``approved`` (live).
        gate: ``passed``, ``failed``, ``borderline`` or ``unjudged``, as its tag says; the release flow asks what was
            measured and logged.
        release: what the release flow said last: ``live``, ``rolled back``, ``waiting: why``, ``refused: why``.
        ua, ira, cra: None of what is unjudged: a figure of a judge that could not see it would mean nothing.
        recognised: least share of an erased concept's pictures by the base in which the judge names it.
        inversion: share of pictures in which white-box inversion brings the concept back; None if not measured.
        decision: why a person lets it pass, as its page says; what counts is the ledger's row.
        fault: what is wrong with its tags, whose figures are then not a number; empty if nothing is.
    """

    model: str
    version: int
    run_id: str
    adapter_sha256: str
    base_sha256: str
    kind: str
    gate: str
    aliases: tuple[str, ...]
    ua: float | None
    ira: float | None
    cra: float | None
    drift: float
    release: str = ""
    inversion: float | None = None
    decision: str = ""
    recognised: float | None = None
    fault: str = ""

    @property
    def live(self) -> bool:
        """Whether a person approved this version."""
        return APPROVED in self.aliases

    @property
    def offered(self) -> bool:
        """Whether it waits for a person's approval."""
        return CANDIDATE in self.aliases

    @property
    def erasure(self) -> str:
        """Id of the erasure that made it."""
        return self.model.removeprefix(MODEL_PREFIX)


def page_of(version: AdapterVersion) -> str | None:
    """The address of a version's page; None without an MLflow server."""
    uri = tracking_uri()
    return f"{uri}/#/models/{version.model}/versions/{version.version}" if uri.startswith("http") else None


def offer(client: MlflowClient, model: str, number: int) -> None:
    """Set alias ``candidate``: a person may approve it."""
    client.set_registered_model_alias(model, CANDIDATE, str(number))


def withdraw(version: AdapterVersion, reason: str) -> None:
    """Take a version off offer: its alias ``candidate`` goes, and its page says why."""
    with registry(writing=True) as client:
        client.set_model_version_tag(version.model, str(version.version), RELEASE_TAG, f"{WITHDRAWN}: {reason}")
        client.delete_registered_model_alias(version.model, CANDIDATE)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All of the project's models or versions: the server gives them in pages."""
    token = None
    while True:
        page = search(filter_string=f"name LIKE '{MODEL_PREFIX}%'", max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def versions() -> list[AdapterVersion]:
    """Every registered adapter, oldest first."""
    with registry() as client:
        found = []
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in _pages(client.search_registered_models):
            for alias, number in model.aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        for version in _pages(client.search_model_versions):
            held = tuple(sorted(aliases.get((version.name, int(version.version)), [])))
            if not held and not {"adapter_sha256", "drift"} <= version.tags.keys():
                continue  # registration died half-way; the next run of the erasure registers again
            found.append((version.creation_timestamp, _parsed(version, held)))
        return [version for _, version in sorted(found, key=lambda item: (item[0], item[1].version))]


def _parsed(version: ModelVersion | Version, aliases: tuple[str, ...]) -> AdapterVersion:
    """A version by its tags, which anyone may have written: what cannot be read is said, and stops no other."""
    tags = version.tags
    faults = [name for name in ("adapter_sha256", "base_sha256") if not _SHA256.fullmatch(tags.get(name, ""))]
    figures = {name: _number(tags.get(name, "")) for name in (*_FIGURES, "inversion", "recognised")}
    unjudged = [name for name in _RATES if tags.get(name) == UNJUDGED]
    faults += [name for name in _FIGURES if math.isnan(figures[name]) and name not in unjudged]
    faults += [name for name in ("inversion", "recognised") if name in tags and math.isnan(figures[name])]
    return AdapterVersion(
        model=version.name,
        version=int(version.version),
        run_id=version.run_id or "",
        adapter_sha256=tags.get("adapter_sha256", ""),
        base_sha256=tags.get("base_sha256", ""),
        kind=tags.get("kind", ""),
        gate=tags.get("gate", ""),
        aliases=aliases,
        **{name: None if name in unjudged else figures[name] for name in _RATES},
        drift=figures["drift"],
        release=tags.get(RELEASE_TAG, ""),
        inversion=figures["inversion"] if "inversion" in tags else None,
        decision=tags.get(DECISION_TAG, ""),
        recognised=figures["recognised"] if "recognised" in tags else None,
        fault=f"Its tags are missing or no value of theirs: {listing(faults)}." if faults else "",
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def find_version(name: str, number: int | None = None) -> AdapterVersion:
    """One adapter by model name or erasure id; the newest that the ledger registered if no number is named.

    Raises:
        RegistryError: there is none; suggests the nearest.
    """
    model = name if name.startswith(MODEL_PREFIX) else MODEL_PREFIX + name
    everything = versions()
    known = [version for version in everything if version.model == model]
    if not known:
        raise RegistryError(f"No adapter {name!r} is registered. {nearest(model, {v.model for v in everything})}")
    if number is None:
        # Anyone who may write to MLflow can add a newer one.
        return ([version for version in known if is_registered(version)] or known)[-1]
    chosen = [version for version in known if version.version == number]
    if not chosen:
        raise RegistryError(f"{model} has no version {number}: it has {listing(v.version for v in known)}.")
    return chosen[0]


def is_registered(version: AdapterVersion) -> bool:
    """Whether the ledger logged this version: this adapter, of this run, on this base."""
    with Ledger() as ledger:
        rows = [row for row in registrations(ledger, version.erasure) if row.version == version.version]
    which = (version.run_id, version.adapter_sha256, version.base_sha256)
    return bool(rows) and (rows[-1].run_id, rows[-1].adapter_sha256, rows[-1].base_sha256) == which


def approve(name: str, number: int | None = None) -> AdapterVersion:
    """Set alias ``approved``: a person wants the version live. ``flows.releasing.approval`` logs who and why first.

    Raises:
        RegistryError: unknown, or its gate failed.
        LineageError: the ledger did not register it, or its files were changed since.
    """
    version = find_version(name, number)
    if version.gate not in ("passed", *TO_DECIDE):
        raise RegistryError(f"{version.model} version {version.version} did not pass its gate; it is not approved.")
    with Ledger() as ledger:
        registration_of(ledger, version)
    fetch_adapter(version)
    with registry(writing=True) as client:
        client.set_registered_model_alias(version.model, APPROVED, str(version.version))
    return find_version(version.model, version.version)


def rollback(name: str, to: int | None = None) -> AdapterVersion:
    """Take an approved adapter back: remove alias ``approved``, or move it to version ``to``.

    Raises:
        RegistryError: unknown, or nothing of this model is approved.
    """
    model = find_version(name).model
    approved = [version for version in versions() if version.model == model and version.live]
    if not approved:
        raise RegistryError(f"Nothing to roll back: no version of {model} is approved.")
    if to is not None:
        return approve(model, to)
    with registry(writing=True) as client:
        client.delete_registered_model_alias(model, APPROVED)
    return find_version(model, approved[0].version)


def fetch_adapter(version: AdapterVersion) -> Path:
    """A local folder with the registered adapter, its hash checked against the registry's tag.

    The two files of an adapter are downloaded by their names from the version's run, and nothing else: what a version
    says of its source, flavour or code is not looked at.

    Raises:
        RegistryError: MLflow does not have it.
        LineageError: its bytes are not the ones registered, or lie where this project keeps no files.
    """
    if version.fault:
        raise LineageError(f"{version.model} version {version.version}: {version.fault} Run the erasure again.")
    place = Path(_fetched().name)
    with registry() as client, tempfile.TemporaryDirectory(dir=place) as fresh:
        there = set(files_of(client, version.run_id, ADAPTER))
        wanted = [f"{ADAPTER}/{name}" for name in (CARD_NAME, WEIGHTS_NAME, DELTA_NAME)]
        fetch_files(client, version.run_id, [name for name in wanted if name in there], Path(fresh))
        folder = Path(fresh) / ADAPTER
        card = load_card(folder)
        if card["adapter_sha256"] != version.adapter_sha256:
            raise LineageError(
                f"{version.model} version {version.version} holds another adapter than was registered: "
                f"{card['adapter_sha256'][:12]} instead of {version.adapter_sha256[:12]}. It is not used."
            )
        # By the card's hash, which binds all of it: what was fetched before may be in use.
        kept = place / sha256_file(folder / CARD_NAME)
        if not kept.is_dir():
            folder.rename(kept)
    return kept


@cache
def _fetched() -> tempfile.TemporaryDirectory[str]:
    """Where this program keeps what it fetched; gone when it ends."""
    return tempfile.TemporaryDirectory(prefix="fade-fetched-")


def approved_now() -> dict[str, int]:
    """Registered model to the version that its alias ``approved`` names: one question to the server."""
    with registry() as client:
        found = _pages(client.search_registered_models)
        return {model.name: int(model.aliases[APPROVED]) for model in found if APPROVED in model.aliases}


def models() -> set[str]:
    """Names of the registered models that there are, with versions or without."""
    with registry() as client:
        return {model.name for model in _pages(client.search_registered_models)}


def run_file(version: AdapterVersion, name: str) -> bytes:
    """A file of a version's run, e.g. ``metrics.json``.

    Raises:
        RegistryError: MLflow does not have it.
        LineageError: it lies where this project keeps no files.
    """
    with registry() as client:
        return read_file(client, version.run_id, name)


def file_address(version: AdapterVersion, name: str) -> str | None:
    """Where a browser finds a file of a version's run; None without a server."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith(("http://", "https://")):
        return None
    return f"{server.rstrip('/')}/get-artifact?path={name}&run_uuid={version.run_id}"


def run_tags(version: AdapterVersion) -> dict[str, str]:
    """Tags of a version's run: commit, libraries, hashes of DVC's outputs."""
    return run_record(version).tags


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What MLflow says of a run today; anyone who may write to it can have changed it."""

    metrics: dict[str, float]
    params: dict[str, str]
    tags: dict[str, str]


def run_record(version: AdapterVersion) -> RunRecord:
    """Figures, parameters and tags of a version's run."""
    with registry() as client:
        data = client.get_run(version.run_id).data
        return RunRecord(dict(data.metrics), dict(data.params), dict(data.tags))
