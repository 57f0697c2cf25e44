"""Keys that are made or replaced by reading, counters that two bases share, permissions and clocks that go back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fade.adapters import seen
from fade.adapters.manifest import MANIFEST_NAME, PERMISSION_NAME, permit, publish, read_manifest
from fade.adapters.runtime import Runtime
from fade.adapters.seen import Memory
from fade.errors import ConfigError, FadeError, RefusedError
from fade.files import read_json
from fade.signing import KEY_VARIABLE, PRIVATE_NAME, PUBLIC_NAME, public_key, signing_key, verifying_key
from flows.releasing import manifests, released
from tests.tiny import save_tiny_base
from tests.unit.adapters.test_runtime import Release


@pytest.fixture
def line(tmp_path: Path, tiny_base: Path) -> Release:
    return Release(tmp_path, tiny_base, Ed25519PrivateKey.generate())


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a release and its keys."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    before = Path.cwd()
    os.chdir(tmp_path)
    key = signing_key(released.KEYS)
    publish(released.release_folder("a" * 64), [], base=tiny_base, key=key)
    yield tmp_path
    os.chdir(before)


def _all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


# --- keys ---


def test_reading_with_the_public_key_alone_makes_and_replaces_no_key(project: Path) -> None:
    (released.KEYS / PRIVATE_NAME).unlink()
    before = _all(released.KEYS)
    assert set(before) == {PUBLIC_NAME}
    (manifest,) = released.released().values()
    assert manifest.counter == 1
    assert _all(released.KEYS) == before
    for _ in range(2):  # nor does signing, which the public key cannot do
        with pytest.raises(ConfigError, match=f"Restore {PRIVATE_NAME} from a backup"):
            signing_key(released.KEYS)
    with pytest.raises(ConfigError, match="nothing can be signed"):
        manifests.reissue(valid_seconds=60, now=lambda _: True)
    assert _all(released.KEYS) == before
    (released.KEYS / PUBLIC_NAME).unlink()
    with pytest.raises(ConfigError, match="No public key in"):
        released.released()
    assert not _all(released.KEYS)


def test_a_public_key_is_never_replaced_by_another_ones(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _all(released.KEYS)
    other = signing_key(project / "other")
    assert _all(project / "other")[PUBLIC_NAME] != before[PUBLIC_NAME]
    monkeypatch.setenv(KEY_VARIABLE, (project / "other" / PRIVATE_NAME).read_text())
    with pytest.raises(ConfigError, match="runtimes that trust the first would refuse everything"):
        signing_key(released.KEYS)
    assert _all(released.KEYS) == before
    assert released.released(), "what was signed is still read with the key that signed it"
    # With no file at all the variable is the key, for reading too, and only signing writes its public half.
    assert verifying_key(project / "none").public_bytes_raw() == other.public_key().public_bytes_raw()
    assert not (project / "none").exists()
    signing_key(project / "none")
    assert public_key(project / "none" / PUBLIC_NAME) == other.public_key()


# --- counters ---


def test_two_bases_on_one_machine_have_counters_of_their_own(line: Release, tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "second", seed=1)
    second = Release(tmp_path / "two", tmp_path / "second", line.key)
    for _ in range(3):
        line.publish()
    assert second.publish().counter == 1
    second.state = line.state
    with closing(line.runtime()), closing(second.runtime()) as runtime:
        assert runtime.manifest
        old = (second.folder / MANIFEST_NAME).read_bytes()
        second.publish()
        runtime.refresh()
        (second.folder / MANIFEST_NAME).write_bytes(old)
        with pytest.raises(RefusedError, match="counter 1, but 2 was in force"):
            runtime.refresh()
    assert sorted(one["highest"] for one in read_json(line.state)["lines"].values()) == [2, 3]


def _publish(line: Release, count: int) -> list[bytes]:
    return [(line.publish(), (line.folder / MANIFEST_NAME).read_bytes())[1] for _ in range(count)]


def test_what_a_permitted_step_back_abandons_stays_out_and_its_permission_works_once(line: Release) -> None:
    path = line.folder / MANIFEST_NAME
    manifests = _publish(line, 5)

    def offered(runtime: Runtime, data: bytes) -> int:
        path.write_bytes(data)
        return runtime.refresh().manifest.counter

    with closing(line.runtime()) as runtime:
        assert offered(runtime, manifests[4]) == 5
        path.write_bytes(manifests[2])
        back = read_manifest(line.folder, line.key.public_key())
        with pytest.raises(ConfigError, match="no step back"):
            permit(line.folder, back, seen=2, reason="restored", key=line.key)
        permit(line.folder, back, seen=5, reason="restored", key=line.key)
        permission = (line.folder / PERMISSION_NAME).read_bytes()
        assert offered(runtime, manifests[2]) == 3
        for abandoned in (manifests[3], manifests[4]):
            with pytest.raises(RefusedError, match=r"but 5 was in force already"):
                offered(runtime, abandoned)
        assert offered(runtime, manifests[2]) == 3
        # A runtime that stayed behind, and one that never saw anything, are told as well.
        for behind in (None, manifests[3]):
            other = Release(line.folder.parent / str(behind is None), line.base, line.key)
            other.folder, other.state = line.folder, line.folder.parent / f"{behind is None}.json"
            if behind is not None:
                path.write_bytes(behind)
                other.runtime().close()
            path.write_bytes(manifests[2])
            with closing(other.runtime()) as third, pytest.raises(RefusedError, match="5 was in force"):
                offered(third, manifests[4])
        path.write_bytes(manifests[2])
        # Another one to 4; the first does not work again, although 5 is still the highest.
        path.write_bytes(manifests[3])
        permit(line.folder, read_manifest(line.folder, line.key.public_key()), seen=5, reason="again", key=line.key)
        assert offered(runtime, manifests[3]) == 4
        (line.folder / PERMISSION_NAME).write_bytes(permission)
        with pytest.raises(RefusedError, match="was used already"):
            offered(runtime, manifests[2])
        # What comes next is above all of them, and ends every permission.
        path.write_bytes(manifests[3])
        assert line.publish().counter == 6
        assert runtime.refresh().manifest.counter == 6
        with pytest.raises(RefusedError, match="but 6 was in force"):
            offered(runtime, manifests[2])


def test_a_step_back_is_permitted_on_the_command_line_and_logged(project: Path) -> None:
    from fade.requests.ledger import Ledger

    folder = released.release_folder("a" * 64)
    base = read_manifest(folder, verifying_key(released.KEYS)).base_sha256
    with pytest.raises(ConfigError, match="0 releases are of a base 'zzz'"):
        manifests.permit_step_back("zzz", seen=4, reason="restored", actor="test")
    permission = manifests.permit_step_back(base[:12], seen=4, reason="restored", actor="test")
    assert (permission.from_counter, permission.to_counter) == (4, 1)
    with Ledger() as ledger:
        assert ledger.history()[-1].event == "release.step_back"


# --- clocks ---


class _Times:
    """A machine's clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = datetime.now(UTC)
        monkeypatch.setattr(seen, "wall_time", lambda: self.now)

    def go(self, **by: float) -> None:
        self.now += timedelta(**by)


def test_an_expired_manifest_stays_expired_when_the_clock_goes_back(
    line: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = _Times(monkeypatch)
    publish(line.folder, [], base=line.base, key=line.key, valid_seconds=600)
    with closing(line.runtime()) as runtime:
        times.go(minutes=11)
        with pytest.raises(RefusedError, match="was valid for 600 s"):
            runtime.refresh()
        times.go(minutes=-11)
        with pytest.raises(RefusedError, match=r"The clock here says .* was seen; if that was wrong"):
            runtime.refresh()
    with pytest.raises(RefusedError, match="was valid for 600 s"):  # nor after a restart
        line.runtime()
    line.state.unlink()
    line.runtime().close()  # that alone kept it out
    publish(line.folder, [], base=None, key=line.key, valid_seconds=600)
    line.runtime().close()


def test_the_time_is_kept_while_it_runs_and_a_clock_before_the_issue_tells_nothing(
    line: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = _Times(monkeypatch)
    manifest = publish(line.folder, [], base=line.base, key=line.key, valid_seconds=600)
    memory = Memory(line.state, line.key.public_key())
    memory.take_over(manifest, None)
    kept = read_json(line.state)["latest"]
    times.go(seconds=30)
    memory.check_age(manifest)
    assert read_json(line.state)["latest"] == kept, "not at every request"
    times.go(seconds=seen.KEEP_SECONDS)
    memory.check_age(manifest)
    latest = datetime.fromisoformat(read_json(line.state)["latest"])
    assert abs(latest - times.now) < timedelta(seconds=10), "the machine's own clock runs beside"
    line.state.unlink()
    times.go(days=-30)
    with pytest.raises(RefusedError, match="how long it holds cannot be told"):
        line.runtime()
    line.state.write_text('{"lines": {"x": {}}}')
    with pytest.raises(FadeError, match="does not say which release was seen last"):
        line.runtime()
