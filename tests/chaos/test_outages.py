"""A database that restarts and a disk that is full: each is said, loses nothing, and is gone on from.

What whole erasures do when a service is away: python tests/chaos/outages.py
"""

from __future__ import annotations

import json
import resource
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.fs import LocalFileSystem
from dvc.repo import Repo
from dvc.rwlock import RWLockFileCorruptedError, _edit_rwlock

from fade.errors import RegistryError
from fade.pipeline import steps_of
from fade.requests import leases
from fade.requests.intake import take_in, transport
from fade.requests.ledger import Ledger
from fade.requests.messages import make_message
from fade.requests.states import State
from fade.spec import save_spec
from flows.queue import drain as drained
from flows.queue.drain import DrainSettings, alive
from tasks.dvc import versioning
from tests.databases import cluster
from tests.servers import free_port
from tests.tiny import PROJECT, PROJECTS, plain_spec


def test_postgresql_that_restarts_costs_no_lease_and_no_outcome() -> None:
    with cluster(free_port()) as server, Ledger(server.url) as ledger:
        name = ledger.submit(make_message(id=uuid.uuid4(), kind="object", concept="cat"), PROJECT, actor="test")[0].id
        lease = leases.take(ledger, "worker", seconds=60)
        assert lease is not None

        def sign() -> None:
            leases.renew(ledger, lease, seconds=60, step="mask")

        with alive(sign, 0.4):
            server.stop()
            with pytest.raises(RegistryError, match="Nothing of this transaction was kept"):
                ledger.submit(make_message(id=uuid.uuid4(), kind="object", concept="horse"), PROJECT, actor="test")
            time.sleep(0.5)  # a sign of life falls into the outage
            back = threading.Timer(0.5, server.start)
            back.start()
            outcome = {"after": State.CANDIDATE, "reason": "the gate passed", "erasure_id": "e0"}
            assert drained.finish(ledger, lease, outcome, DrainSettings(lease_seconds=60)) == "candidate"
            back.join()
        assert [record.id for record in ledger.find()] == [name]
        assert ledger.get(name).state is State.CANDIDATE
        ledger.verify()


def test_a_dvc_that_was_killed_while_it_wrote_its_locks_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(".", no_scm=True).close()
    (tmp_path / ".dvc/tmp").mkdir(exist_ok=True)
    cut_off = tmp_path / ".dvc/tmp/rwlock"
    for content in ("", '{"read": {'):
        cut_off.write_text(content)
        with pytest.raises(RWLockFileCorruptedError), _edit_rwlock(str(cut_off.parent), LocalFileSystem(), False):
            pass
        with versioning.open_repo():
            assert not cut_off.exists()
    whole = '{"read": {}, "write": {}}'
    cut_off.write_text(whole)
    with versioning.open_repo():
        assert cut_off.read_text() == whole


@contextmanager
def file_sizes_limited(limit: int) -> Iterator[None]:
    """As on a full disk: no file grows beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_messages_in_the_queue_and_the_chain_whole(tmp_path: Path) -> None:
    asked = [{"id": str(uuid.uuid4()), "kind": "object", "concept": f"concept {i}"} for i in range(300)]
    with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger, transport(f"folder:{tmp_path / 'queue'}") as source:
        for one in asked:
            source.send(json.dumps(one).encode())
        assert take_in(ledger, source, PROJECTS, limit=5, seconds=0).new == 5
        with file_sizes_limited((tmp_path / "ledger.db-wal").stat().st_size + 8192):
            with pytest.raises(RegistryError, match="Nothing of this transaction was kept"):
                take_in(ledger, source, PROJECTS, limit=295, seconds=0)
            assert len(list((tmp_path / "queue").glob("*.json"))) == 295
            assert len(ledger.find()) == 5
        ledger.verify()
        assert take_in(ledger, source, PROJECTS, limit=1000, seconds=0).new == 295
        assert {record.id for record in ledger.find()} == {one["id"] for one in asked}
        ledger.verify()


def test_a_record_that_was_cut_off_is_as_if_it_had_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Repo.init(".", no_scm=True).close()
    folder = Path("erasure")
    save_spec(plain_spec(), folder)
    steps = [step.name for step in steps_of(plain_spec())]
    stages = {}
    for name in steps[:2]:
        (folder / name).write_text(name)
        stages[name] = {"cmd": "true", "wdir": "..", "outs": [f"erasure/{name}"]}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    first, second = stages
    lock = folder / "dvc.lock"

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def killed(stage: str) -> None:
        """Before the lock file is written, and when all of it is written but its name."""
        for place in ("tasks.dvc.versioning.to_lockfile", "fade.files.os.replace"):
            with monkeypatch.context() as patched:
                patched.setattr(place, die)
                with pytest.raises(KeyboardInterrupt):
                    versioning.record(folder, stage)

    killed(first)
    assert not lock.exists()
    assert drained.step_of(folder) == first
    assert not versioning.is_current(folder, first)
    versioning.record(folder, first)
    whole = lock.read_text()
    killed(second)
    assert lock.read_text() == whole
    assert drained.step_of(folder) == second
    assert versioning.is_current(folder, first)
    assert not versioning.is_current(folder, second)
    versioning.record(folder, second)
    assert versioning.is_current(folder, second)
    assert sorted(path.name for path in folder.glob("*dvc.*")) == ["dvc.lock", "dvc.yaml"]


def test_a_record_is_what_dvc_itself_would_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: of a stage that is new, of one that is recorded anew, with figures and names that YAML quotes."""
    monkeypatch.chdir(tmp_path)
    Repo.init(".", no_scm=True).close()
    stages = {}
    for name in ("first", "second", "third"):
        (tmp_path / name).write_text(name)
        figures = {"rate": 1e-05, "word": "yes", "none": None, "many": [1, 0.5, "1.0"], "long": "word " * 40}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(figures))
        stages[name] = {"cmd": f"echo {'long ' * 40}", "params": [*figures], "outs": [name]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))

    def by_dvc(stage: str) -> bytes:
        with Repo(".") as repo:
            repo.commit(stage, force=True)
        return Path("dvc.lock").read_bytes()

    for name in (*stages, "second"):
        if name == "second":
            (tmp_path / name).write_text("other")
        before = Path("dvc.lock").read_bytes() if Path("dvc.lock").is_file() else None
        expected = by_dvc(name)
        assert expected != before or name == "second"
        Path("dvc.lock").unlink() if before is None else Path("dvc.lock").write_bytes(before)
        versioning.record(Path(), name)
        assert Path("dvc.lock").read_bytes() == expected
