"""Tampering: a byte changed or an end cut off at a random place, and whether anyone notices.

    python tests/chaos/tamper.py --cases 500 --json tamper.json

writes ``cases``, ``accepted`` (has to be 0), and the cases by target. A case is refused when the part of
the system that uses the file raises one of its own errors and names the file; any other exception ends
the run. The parts are made anew: a tiny base, adapters of both kinds, a mask, a release.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fade.adapters.card import load_card, weights_path
from fade.adapters.manifest import MANIFEST_NAME, check_base, permit, publish, read_adapter, read_manifest
from fade.errors import FadeError, LineageError
from fade.files import sha256_file
from fade.methods.fade.masks import load_mask, make_mask, save_mask
from fade.methods.fade.saliency import random_saliency
from fade.models.family import load_base
from fade.requests import tables
from fade.requests.evidence import REGISTERED, chain_rows, seal, verify_evidence
from fade.requests.ledger import Ledger
from fade.signing import read_signed
from tests.chaos.arguments import run_and_write
from tests.tiny import save_tiny_base
from tests.unit.adapters.test_adapters import _adapter, _delta_adapter


@dataclass(frozen=True)
class Target:
    """A file, and what uses it."""

    kind: str
    path: Path
    use: Callable[[], Any]


def build(folder: Path) -> list[Target]:
    """Every file that may not be changed, with the code that reads it."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    base = folder / "base"
    save_tiny_base(base)
    adapters = [_adapter(base, folder / "lora"), _delta_adapter(base, folder / "delta")[0]]
    release = folder / "release"
    named = [(f"erasure-{adapter.name}/1", adapter, 1.0) for adapter in adapters]
    manifest = publish(release, named, base=base, key=key)
    targets = [Target("manifest", release / MANIFEST_NAME, lambda: read_manifest(release, public))]
    targets += [Target("base", base / name, lambda: check_base(base, manifest)) for name in manifest.base_files]
    for entry, source in zip(manifest.adapters, adapters, strict=True):
        for name in (entry.file, "card.json"):
            targets.append(
                Target(
                    "adapter",
                    release / "adapters" / entry.card_sha256 / name,
                    lambda entry=entry: read_adapter(release, entry, base_sha256=manifest.base_sha256),
                )
            )
        # Also on the way to a release: the card binds the weights' bytes.
        targets.append(Target("adapter", weights_path(source, load_card(source)), lambda at=source: load_card(at)))
    permit(release, manifest, seen=9, reason="restored", key=key)
    permission = release / "permission.json"
    targets.append(
        Target("permission", permission, lambda: read_signed(permission, "fade-rollback-permission/1", public))
    )
    sd = load_base(base)
    for granularity in ("module", "neuron", "weight"):
        where = folder / f"mask-{granularity}"
        save_mask(where, make_mask(random_saliency(sd.network, granularity, seed=3), 0.3, granularity=granularity))
        sha256 = sha256_file(where / "mask.json")
        for path in sorted(where.iterdir()):
            targets.append(Target("mask", path, lambda at=where, sha256=sha256: load_mask(at, sha256=sha256)))
    targets += _proofs(folder, key)
    for target in targets:
        target.use()  # untouched, each is accepted: a refusal below is the change's doing
    return targets


def _proofs(folder: Path, key: Ed25519PrivateKey) -> list[Target]:
    """A ledger's log, kept as rows of text, and a bundle of evidence."""
    with Ledger(f"sqlite:///{folder / 'ledger.db'}") as ledger:
        for number in range(6):
            ledger.append("release.live", actor="test", erasure_id="e1", details={"manifest": number})
        registered = {name: f"of {name}" for name in REGISTERED}
        ledger.append("registered", actor="test", erasure_id="e1", details={**registered, "gate": {"ua": 0.99}})
        rows = chain_rows(ledger, erasure_id="e1")
    log = folder / "log.jsonl"
    # No byte of this text is without meaning, so that every change of a byte changes the log.
    lines = [{**row, "at": round(1e6 * datetime.fromisoformat(row["at"]).timestamp())} for row in rows]
    log.write_text("\n".join(json.dumps(line, separators=(",", ":")) for line in lines))
    bundle = folder / "evidence"
    said = {"erasure": {"id": "e1"}, "figures": {"ua": 1.0}, **registered, "gate": {"thresholds": {"ua": 0.99}}}
    seal(bundle, {**said, "chain": {"rows": rows}}, key)
    return [
        Target("ledger", log, lambda: _load_log(log, folder / "ledger.db")),
        *(Target("evidence", bundle / name, lambda: verify_evidence(bundle, key.public_key())) for name in PARTS),
    ]


PARTS = ("evidence.json", "evidence.html")


def _load_log(log: Path, database: Path) -> None:
    """Put the rows of the text into the ledger's table, as somebody with the database's password could; verify."""
    url = f"sqlite:///{database}"
    try:
        rows = [json.loads(line) for line in log.read_bytes().decode().split("\n")]
        # A table's columns have their names: a changed one is no change that a row could bear.
        if any(row.keys() != {*tables.log.c.keys()} for row in rows):
            raise KeyError("another column")
        rows = [{**row, "at": datetime.fromtimestamp(0, UTC) + timedelta(microseconds=row["at"])} for row in rows]
        with Ledger(url) as ledger, ledger.engine.begin() as connection:
            connection.execute(sa.delete(tables.log))
            connection.execute(sa.insert(tables.log), rows)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, sa.exc.SQLAlchemyError) as error:
        raise LineageError(f"{log} holds no rows of a log: {error}") from None
    try:
        with Ledger(url) as ledger:
            ledger.verify()
    except FadeError as error:
        raise LineageError(f"{log}: {error}") from None


def damaged(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """One bit flipped, one byte replaced, or the end cut off; and where."""
    at = draw.randrange(len(content))
    way = draw.choice(("bit", "byte", "cut"))
    if way == "cut":
        return content[:at], f"cut at {at}"
    new = content[at] ^ (1 << draw.randrange(8) if way == "bit" else draw.randrange(1, 256))
    return content[:at] + bytes([new]) + content[at + 1 :], f"{way} at {at}"


def run(cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Try ``cases`` changes, the kinds of file in turn; give the counts."""
    draw = random.Random(seed)
    by_kind: dict[str, list[Target]] = {}
    for target in build(folder):
        by_kind.setdefault(target.kind, []).append(target)
    accepted: list[str] = []
    counts: Counter[str] = Counter()
    kinds = sorted(by_kind)
    for case in range(cases):
        target = draw.choice(by_kind[kinds[case % len(kinds)]])
        content = target.path.read_bytes()
        changed, where = damaged(content, draw)
        target.path.write_bytes(changed)
        try:
            target.use()
            accepted.append(f"{target.kind} {target.path.name}: {where}")
        except FadeError as error:
            said = str(error)
            if target.path.name not in said and str(target.path.parent) not in said:
                accepted.append(f"{target.kind} {target.path.name}: {where}: refused without naming it: {error}")
        finally:
            target.path.write_bytes(content)
        counts[target.kind] += 1
    return {
        "cases": cases,
        "accepted": len(accepted),
        "which": accepted[:20],
        "by_target": dict(sorted(counts.items())),
    }


def main() -> None:
    """Try changes, and write what was accepted."""
    found = run_and_write(__doc__, "cases", 500, run)
    print(f"{found['cases']} cases, {found['accepted']} accepted: {found['by_target']}")
    for line in found["which"]:
        print(line)
    sys.exit(1 if found["accepted"] else 0)


if __name__ == "__main__":
    main()
