"""``drain --together``: the requests of one night become one adapter, and each keeps its own outcome.

All that is due is leased at once. What is wrong with one request is said of that one, and what is erased already is
settled; the others are one erasure, each concept once, by the method that many take (``fade.asking.concepts``). Its
gate judges the adapter as a whole; each request's outcome says besides what became of its own concept's prompts. A
request that is withdrawn meanwhile is left out, and the adapter is made anew without it. So are those whose own
prompts fail the gate or cannot be seen; they go back, and are run one by one, as all are where together is impossible.

Rolling one of them back makes the adapter of the others, bit for bit the one that never had it
(``flows.releasing.part``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from fade import logs
from fade.asking.concepts import in_order
from fade.asking.prepare import AUTO, Wanted
from fade.data.catalog import load_concepts
from fade.errors import ConfigError, DataError, LeaseLostError
from fade.evaluation.gate import amiss
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.names import name_key
from fade.project import Project, Projects
from fade.requests import leases
from fade.requests.in_force import settled_by, take_to_base
from fade.requests.leases import Lease
from fade.requests.ledger import Ledger
from fade.requests.states import State
from fade.spec import Spec
from fade.steps.catalog import ensure_catalog
from flows.erasing.erase import erase, prepare_folder
from flows.erasing.many import settings_for_many, spec_for_many
from flows.queue.drain import LOST, DrainSettings, alive, failure, finish, forgotten, settle, step_of
from flows.settings import STATE

logger = logging.getLogger(__name__)
MOST = 1000
"""Requests of one night."""
REMADE = 4
"""How often a night's adapter is made anew without those that fail by themselves; each costs its making and judging."""


@dataclass
class Group:
    """Requests of one project, each concept once with all who asked for it.

    Attributes:
        wanted: by the catalog's name of the concept.
        leases: by the same name.
        spared: concepts that others have erased: nothing may give way to them.
    """

    project: Project
    wanted: dict[str, Wanted] = field(default_factory=dict)
    leases: dict[str, list[Lease]] = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)

    @property
    def held(self) -> list[Lease]:
        """All leases."""
        return [lease for some in self.leases.values() for lease in some]

    def add(self, name: str, lease: Lease, wanted: Wanted) -> None:
        """One more request; of a concept that is there already its names and pictures join those."""
        if name in self.wanted:
            first = self.wanted[name]
            wanted = replace(
                first,
                surrogate=first.surrogate if first.surrogate != AUTO else wanted.surrogate,
                aliases=tuple(dict.fromkeys((*first.aliases, *wanted.aliases))),
                image_ids=tuple(dict.fromkeys((*first.image_ids, *wanted.image_ids))),
                subjects=tuple(dict.fromkeys((*first.subjects, *wanted.subjects))),
            )
        self.wanted[name] = wanted
        self.leases.setdefault(name, []).append(lease)

    def drop(self, gone: Sequence[Lease]) -> None:
        """Leave requests out, and concepts that nobody asks for any more."""
        for name in list(self.leases):
            self.leases[name] = [lease for lease in self.leases[name] if lease not in gone]
            if not self.leases[name]:
                del self.leases[name], self.wanted[name]


def drain_together(
    ledger: Ledger, worker: str, served: Projects, settings: DrainSettings, *, limit: int | None = None
) -> dict[str, int]:
    """Run all that is due, at most ``limit``, as one erasure a project; gives how many ended in each state."""
    taken = _taken(ledger, worker, served, settings, limit=MOST if limit is None else limit)
    outcomes: list[tuple[Lease, dict[str, Any]]] = []
    groups: dict[str, Group] = {}
    at: dict[str, Any] = {"step": "request", "name": None}

    def sign() -> None:
        for lease in taken:
            try:
                leases.renew(ledger, lease, seconds=settings.lease_seconds, step=at["step"], erasure_id=at["name"])
            except LeaseLostError:
                continue  # that one's outcome is refused; the others go on

    with alive(sign, settings.lease_seconds):
        for lease in taken:
            project = served.chosen(lease.request.project)
            group = groups.setdefault(project.name, Group(project))
            if (outcome := _joined(ledger, lease, group, settings)) is not None:
                outcomes.append((lease, outcome))
        for group in groups.values():
            outcomes += _without_conflicts(group)
            if group.wanted:
                outcomes += _erased(ledger, group, settings, at, sign)
    ended: dict[str, int] = {}
    for lease, outcome in outcomes:
        with logs.about(lease.request.id):
            state = finish(ledger, lease, outcome, settings)
        ended[state] = ended.get(state, 0) + 1
    return {state: count for state, count in ended.items() if state != State.SCHEDULED}


def _taken(ledger: Ledger, worker: str, served: Projects, settings: DrainSettings, *, limit: int) -> list[Lease]:
    """All that is due: one erasure, so that of what runs at once they count as one."""
    found: list[Lease] = []
    # What is erased by its name alone has concepts of its own, and runs by itself.
    projects = tuple(one.name for one in served.served if not one.by_name)
    while projects and len(found) < limit:
        lease = leases.take(
            ledger,
            worker,
            seconds=settings.lease_seconds,
            projects=projects,
            running_limit=settings.running + len(found),
            attempts_limit=settings.attempts,
        )
        if lease is None:
            break
        found.append(lease)
    return found


def _joined(ledger: Ledger, lease: Lease, group: Group, settings: DrainSettings) -> dict[str, Any] | None:
    """Put a request into its group; or its outcome, where it has one by itself."""
    record, project = lease.request, group.project
    try:
        if record.concept is None:
            raise DataError("The request names no concept. Give one: fade request release ID --concept NAME.")
        if record.base != project.base:
            record = take_to_base(ledger, record, project.base, actor=lease.worker)
        if (other := settled_by(ledger, record)) is not None:
            return settle(record, other)
        with FileLock(STATE / "catalog.lock", timeout=600):
            ensure_catalog(project)
        wanted = Wanted(
            record.concept or "",
            record.surrogate or AUTO,
            aliases=record.aliases,
            kind=None if record.kind == "pictures" else record.kind,
            image_ids=record.pictures,
            subjects=() if record.subject is None else (record.subject,),
        )
        group.spared |= {*forgotten(ledger, record, load_concepts(Path(project.catalog)))}
        # What is wrong with it is its own, and is not to keep the others waiting.
        alone = _spec([wanted], group)
        group.add(alone.concept, lease, wanted)
    except Exception as error:  # the process boundary of an erasure: the ledger keeps what it was
        return failure(record, error, settings)
    return None


def _without_conflicts(group: Group) -> list[tuple[Lease, dict[str, Any]]]:
    """Take out requests whose surrogate another one of the night erases, and say so of these."""
    erased = {name_key(name) for name in group.wanted}
    said = (
        "what it is to give instead is erased by another request of this night. Name another surrogate: fade request "
        "release ID --surrogate NAME"
    )
    bad = [
        lease
        for name, wanted in group.wanted.items()
        if name_key(wanted.surrogate) in erased
        for lease in group.leases[name]
    ]
    group.drop(bad)
    return [(lease, {"after": State.NEEDS_INPUT, "reason": said}) for lease in bad]


def _spec(wanted: Sequence[Wanted], group: Group) -> Spec:
    settings = settings_for_many(group.project, len(wanted), {}, None)
    mine = {name_key(one.concept) for one in wanted}
    spared = [name for name in sorted(group.spared) if name_key(name) not in mine]
    return spec_for_many(in_order(wanted), project=group.project, settings=settings, protected=spared)


def _erased(
    ledger: Ledger, group: Group, settings: DrainSettings, at: dict[str, Any], sign: Callable[[], None]
) -> list[tuple[Lease, dict[str, Any]]]:
    """The outcomes of a group's requests: one erasure, made anew without those that were withdrawn meanwhile.

    So it is, at most ``REMADE`` times, without those whose own prompts fail the gate or cannot be seen: each goes back
    and is run by itself, as what is impossible together is. One concept that is not forgotten is not to keep back a
    hundred that are. What fails together for all that is run one by one: by itself each may pass.
    """
    lost: list[tuple[Lease, dict[str, Any]]] = []
    remade = 0
    while group.wanted:
        try:
            spec = _spec(list(group.wanted.values()), group)
            folder = prepare_folder(spec)
            at.update(name=spec.id, step=step_of(folder))
            sign()  # from here on the ledger knows what is made for each request
            version = erase(spec.id, requests={lease.request.id: lease.fence for lease in group.held})
        except LeaseLostError:
            gone = [lease for lease in group.held if not _held(ledger, lease)] or group.held
            group.drop(gone)
            lost += [(lease, {"after": LOST, "reason": "withdrawn"}) for lease in gone]
            continue
        except ConfigError as error:
            # Together it is impossible, alone it may be: each goes back, and is run by itself.
            logger.warning("these requests are run one by one: %s", error)
            return [*lost, *((lease, _alone(str(error))) for lease in group.held)]
        except Exception as error:  # the process boundary of an erasure: the ledger keeps what it was
            return [*lost, *((lease, failure(lease.request, error, settings)) for lease in group.held)]
        metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
        left = amiss(metrics.report, spec.gate) if version.gate != "passed" else []
        if left and len(left) < len(group.wanted) and remade < REMADE:
            logger.warning(
                "made anew without %d of %d concepts, which fail or cannot be seen", len(left), len(group.wanted)
            )
            gone = [lease for name in left for lease in group.leases[name]]
            lost += [
                (lease, _alone("with the others of this night its own prompts failed or could not be seen"))
                for lease in gone
            ]
            group.drop(gone)
            group.spared |= {*left}  # erased yet, by themselves: nothing may give way to them
            remade += 1
            continue
        if version.gate == "failed" and len(group.wanted) > 1:
            logger.warning("%d concepts fail the gate together: they are run one by one", len(group.wanted))
            return [*lost, *((lease, _alone("with the others of this night the gate failed")) for lease in group.held)]
        return [
            *lost,
            *((lease, _outcome(spec, version, metrics, name)) for name, some in group.leases.items() for lease in some),
        ]
    return lost


def _alone(why: str) -> dict[str, Any]:
    """The outcome of a request that goes back and is run by itself."""
    back = {"after": State.SCHEDULED, "reason": f"not together: {why}"[:1000], "retry_seconds": 0.0}
    return {**back, "logged": "not together with others of this night"}


def _held(ledger: Ledger, lease: Lease) -> bool:
    try:
        leases.check(ledger, lease.request.id, lease.fence)
    except LeaseLostError:
        return False
    return True


def _outcome(spec: Spec, version: Any, metrics: Evaluation, concept: str) -> dict[str, Any]:
    """What a request's own concept came to, and what the gate says of the adapter it is in."""
    own = metrics.report.after.erased[concept].ua
    said = {
        "passed": "the gate passed",
        "borderline": "the gate is borderline: ",
        "unjudged": "the erasure is unjudged: ",
    }.get(version.gate, "the gate failed: ")
    figure = f"of its own {own.count} pictures {own.hits} no longer show it ({len(spec.pairs)} concepts together)"
    return {
        "after": State.REJECTED if version.gate == "failed" else State.CANDIDATE,
        "reason": f"{said}{'; '.join(metrics.gate.reasons)}; {figure}"[:1000],
        "logged": f"{said.removesuffix(': ')}; {figure}",
        "erasure_id": spec.id,
        "details": {
            "adapter_sha256": version.adapter_sha256,
            "version": version.version,
            "together": len(spec.pairs),
            "ua": own.value,
        },
    }
