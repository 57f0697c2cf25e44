"""Roll one concept back of an adapter that erases several: the others stay in force.

An adapter is one piece, so what is left is made again without that concept, as it was made: on one machine it is, bit
for bit, the one that never had it. It passes its own gate before anything changes; then the requests for the other
concepts are its, and it goes live in the moment in which the old one goes out.
"""

from __future__ import annotations

from fade.asking.concepts import changed
from fade.config import Settings
from fade.errors import ConfigError, RefusedError
from fade.names import name_key
from fade.project import load_project
from fade.requests.in_force import move_to
from fade.requests.ledger import Ledger
from fade.spec import Spec, load_spec
from flows.account import this_user
from flows.erasing.erase import erase, find_folder, prepare_folder
from flows.erasing.many import spec_for_many
from flows.releasing import approval
from tasks.mlflow import tracking
from tasks.mlflow.tracking import AdapterVersion


def spec_without(spec: Spec, concepts: list[str]) -> Spec:
    """The erasure of the same concepts but some, by the same settings.

    Raises:
        ConfigError: one of them is not among them, or none would be left.
    """
    left = changed(spec.pairs, without=concepts)
    project = load_project().at(base=spec.base, catalog=spec.catalog, judges=spec.judges)
    settings = Settings(**{name: getattr(spec, name) for name in Settings.model_fields})
    return spec_for_many(
        left,
        project=project,
        settings=settings,
        expected_base_sha256=spec.base_sha256,
        data_free=spec.data_free,
    )


def roll_back_one(name: str, concept: str, *, actor: str | None = None, because: str = "") -> AdapterVersion:
    """Take one concept out of a live erasure of several; gives the version that keeps the others erased.

    It is approved and the old one taken back; ``flows.releasing.release.reconcile`` then makes it so.

    Args:
        because: as ``approval.approve`` has it, where the gate leaves the new adapter to a person.

    Raises:
        ConfigError: the erasure has no such concept, or no other.
        RefusedError: the erasure is not live, or the adapter without it may not go live: nothing was changed.
    """
    folder = find_folder(name)
    before, actor = load_spec(folder), actor or this_user()
    model = f"{tracking.MODEL_PREFIX}{folder.name}"
    if not any(one.live for one in tracking.versions() if one.model == model):
        raise RefusedError(f"{model} is not approved: nothing of it is in force that could be rolled back.")
    if len(before.pairs) == 1:
        raise ConfigError(f"{model} erases one concept: roll it back as a whole (fade rollback {folder.name}).")
    after = spec_without(before, [concept])
    prepare_folder(after)
    version = erase(after.id)
    approved = approval.approve(version.model, version.version, because=because, actor=actor)
    stays = [name_key(one) for pair in after.pairs for one in pair.names]
    with Ledger() as ledger:
        move_to(ledger, folder.name, after.id, names=stays, base=before.base, actor=actor)
    approval.rollback(folder.name, actor=actor)
    return approved
