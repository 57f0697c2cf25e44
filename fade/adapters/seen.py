"""What a runtime remembers over restarts: the highest counters it saw, permissions that were used, the latest time.

One small file for all runtimes of a machine that trust one key, an entry for each line of releases on each base:
counters of two bases have nothing to do with each other.

A step back that was permitted takes the older manifest over and leaves the highest counter where it was: what was
published in between is abandoned, and stays refused without a permission of its own. What is published afterwards
has a counter above it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from filelock import FileLock

from fade.adapters.manifest import Manifest, Permission
from fade.errors import ConfigError, FadeError, RefusedError, ResourceError
from fade.files import read_json, write_json
from fade.signing import key_id

KEEP_SECONDS = 60
"""The latest time is written at most so often."""
SKEW = timedelta(minutes=5)
"""How far the clocks of whoever signs and of a runtime may differ."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one line of releases on one base.

    Attributes:
        highest: the highest counter that was taken over, or that a permission stepped back from.
        sha256: of the manifest in force.
        used: permissions that were used since ``highest`` was reached, by their hash.
    """

    highest: int = 0
    sha256: str = ""
    used: tuple[str, ...] = ()

    def after(self, manifest: Manifest, permission: Permission | None) -> Seen:
        """What was seen once the manifest is in force.

        Args:
            permission: a genuine one that names this manifest.

        Raises:
            RefusedError: it is older than what was in force, or another one of the same counter, and not permitted.
        """
        passed = 0 if permission is None else permission.from_counter
        used = self.used
        if manifest.sha256 == self.sha256:
            # Nothing to step back from here, but what it abandons is to stay out here as well.
            if permission is not None and permission.sha256 not in used:
                used = (*used, permission.sha256)
            return replace(self, highest=max(self.highest, passed), used=used)
        if manifest.counter > self.highest:
            # A runtime that never saw what was abandoned is not to take it over later.
            return Seen(max(manifest.counter, passed), manifest.sha256, (permission.sha256,) if permission else ())
        if permission is not None and passed >= self.highest and permission.sha256 not in used:
            return Seen(passed, manifest.sha256, (*used, permission.sha256))
        if permission is not None and permission.sha256 in used:
            said = f"Its permission ({permission.sha256[:12]}) was used already. Sign a new one."
        elif manifest.counter == self.highest:
            said = (
                f"Two manifests have this counter, or it was abandoned: in force was {self.sha256[:12]}. Publish anew."
            )
        else:
            said = (
                "An older release could bring back what was erased since. Publish a new one, or sign a permission: "
                f"fade step-back BASE --seen {self.highest} --because REASON."
            )
        raise RefusedError(
            f"The manifest {manifest.sha256[:12]} has the counter {manifest.counter}, but {self.highest} was in force "
            f"already. {said}"
        )


class Clock:
    """UTC time that never goes back: from the latest that was seen it runs with the machine's monotonic clock."""

    def __init__(self) -> None:
        self._latest, self._at = datetime.min.replace(tzinfo=UTC), time.monotonic()

    def now(self, *, at_least: datetime | None = None) -> datetime:
        """The time; ``at_least`` is one that was seen elsewhere."""
        at = time.monotonic()
        known = [wall_time(), self._latest + timedelta(seconds=at - self._at), *([at_least] if at_least else [])]
        self._latest, self._at = max(known), at
        return self._latest


def wall_time() -> datetime:
    """What this machine's clock says now."""
    return datetime.now(UTC)


class Memory:
    """The file.

    Args:
        path: where it is; None for its place under ``$XDG_STATE_HOME/fade`` or ``~/.local/state/fade``.
        key: the key that signs the releases.
    """

    def __init__(self, path: Path | None, key: Ed25519PublicKey) -> None:
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
        self.path = path or home / "fade" / f"releases-{key_id(key)}.json"
        self._clock = Clock()
        self._kept: datetime | None = None

    def take_over(self, manifest: Manifest, permission: Permission | None) -> None:
        """Remember a manifest as the one in force.

        Args:
            permission: a signed one that names this manifest.

        Raises:
            RefusedError: as ``Seen.after``, or as ``check_age``.
            ConfigError: the file is damaged.
            ResourceError: it cannot be written.
        """
        line = f"{manifest.release}/{manifest.base_sha256}"
        self._update(lambda lines: {**lines, line: lines.get(line, Seen()).after(manifest, permission)})
        self.check_age(manifest)

    def check_age(self, manifest: Manifest) -> None:
        """Whether a manifest in force may still be used.

        Raises:
            RefusedError: its time is over, or by this machine's clock has not begun.
            ConfigError, ResourceError: as ``take_over``.
        """
        now = self._clock.now()
        if self._kept is None or (now - self._kept).total_seconds() > KEEP_SECONDS:
            self._update()
            now = self._clock.now()
        if manifest.expires is None:
            return
        if datetime.fromisoformat(manifest.issued) > now + SKEW:
            raise RefusedError(
                f"The manifest {manifest.counter} was issued at {manifest.issued}, and it is only {_told(now)} here: "
                "how long it holds cannot be told. Set this machine's clock, or the one of whoever signs."
            )
        if now > manifest.expires:
            self._update()
            back = (
                f" The clock here says {_told(wall_time())}, but {_told(now)} was seen; if that was wrong, set the "
                f"clock and take 'latest' out of {self.path}."
            )
            raise RefusedError(
                f"The manifest {manifest.counter} of {manifest.issued} was valid for {manifest.valid_seconds} s: a "
                "newer one was withheld, or nobody issues them any more. See that `fade release --watch` runs."
                + back
                * (now - wall_time() > SKEW)
            )

    def _update(self, change: Callable[[dict[str, Seen]], dict[str, Seen]] = lambda lines: lines) -> None:
        """Read, change and write the file, with the time, while no other runtime does."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                lines, latest = self._read()
                now = self._clock.now(at_least=latest)
                content = {"latest": now.isoformat(), "lines": {k: asdict(one) for k, one in change(lines).items()}}
                write_json(self.path, content)
                self._kept = now
        except OSError as error:
            if isinstance(error, FadeError):
                raise
            raise ResourceError(
                f"The highest counter seen cannot be kept in {self.path}: {error}. "
                "Give the runtime a file that it may write: state=."
            ) from None

    def _read(self) -> tuple[dict[str, Seen], datetime | None]:
        if not self.path.exists():
            return {}, None
        content: Mapping[str, Any] = read_json(self.path)
        try:
            lines = {
                name: Seen(int(one["highest"]), str(one["sha256"]), tuple(one["used"]))
                for name, one in content["lines"].items()
            }
            latest = content.get("latest")
            return lines, None if latest is None else datetime.fromisoformat(latest).astimezone(UTC)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.path} does not say which release was seen last ({error}). Restore it, or remove it by hand."
            ) from None


def _told(at: datetime) -> str:
    return at.isoformat(timespec="seconds")
