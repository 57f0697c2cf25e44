"""Watch the registry: what is approved or taken back in MLflow's page is live or out within seconds.

MLflow is asked every second (one question), and a signed webhook of MLflow cuts even that short. A hook says
only that something happened: what is approved is always read from MLflow, so that a lost, repeated or forged
hook changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import uvicorn
from fastapi import FastAPI, HTTPException, Request

from fade.adapters.manifest import Manifest
from fade.errors import ConfigError, FadeError, RegistryError
from flows import release, together
from flows.approval import check_version, named
from flows.release import Change
from tasks import _tracking
from tasks._tracking import AdapterVersion

logger = logging.getLogger(__name__)
SECRET_VARIABLE = "FADE_MLFLOW_WEBHOOK_SECRET"
WEBHOOK_SECONDS = 300
"""Age at which a hook is no longer believed, as in the Standard Webhooks' specification."""
LOOK_AGAIN_SECONDS = 60.0
"""After this long everything is checked anew, although no alias moved: a refusal's reason may be gone."""


class Changed(Exception):
    """Something was approved that the test under way is not about."""


class Watch:
    """The release flow, for as long as the program runs.

    Args:
        valid_seconds: how long a manifest holds; it is signed anew after half of that. 0 for without end.
        poll_seconds: time between two questions to MLflow.
        rehearse: test candidates together with what is live before anyone approves them, so that an
            approval need not wait for it.
    """

    def __init__(self, *, valid_seconds: int, poll_seconds: float = 1.0, rehearse: bool = True) -> None:
        self.valid_seconds, self.poll_seconds, self.rehearse = valid_seconds, poll_seconds, rehearse
        self.woken, self.ended = threading.Event(), threading.Event()
        self.trouble = ""
        self._seen: dict[str, int] | None = None
        self._rehearsed: set[frozenset[str]] = set()
        self._looked = 0.0

    def run(self) -> Iterator[list[Change]]:
        """Look until ``ended`` is set; yields what each look came to."""
        while not self.ended.is_set():
            try:
                changes = self.look()
                self.trouble = ""
            except FadeError as error:
                # Nothing is signed anew meanwhile: runtimes with a time limit stop by themselves.
                if str(error) != self.trouble:
                    logger.error("%s", error)
                self.trouble, changes = str(error), []
            if changes:
                yield changes
            self.woken.wait(self.poll_seconds)
            self.woken.clear()

    def look(self) -> list[Change]:
        """One look: reconcile if an alias moved or it is time, else rehearse one candidate."""
        now = _tracking.approved_now()
        if now != self._seen or time.monotonic() - self._looked > LOOK_AGAIN_SECONDS:
            changes = release.reconcile(valid_seconds=self.valid_seconds, between=lambda: self._between(None))
            self._seen, self._looked = now, time.monotonic()
            self._heartbeat()
            return changes
        self._heartbeat()
        if self.rehearse:
            self._rehearse(now)
        return []

    def _heartbeat(self) -> None:
        release.reissue(valid_seconds=self.valid_seconds, now=self._is_stale)

    def _is_stale(self, manifest: Manifest) -> bool:
        if not self.valid_seconds:
            return False
        age = (datetime.now(UTC) - datetime.fromisoformat(manifest.issued)).total_seconds()
        return age > self.valid_seconds / 2 or manifest.valid_seconds != self.valid_seconds

    def _between(self, tested: set[str] | None) -> None:
        """While pictures are drawn: what was taken back goes out now; an approval of something else comes first."""
        now = _tracking.approved_now()
        release.withdraw(now, valid_seconds=self.valid_seconds)
        self._heartbeat()
        if tested is not None and any(f"{model}/{version}" not in tested for model, version in now.items()):
            raise Changed

    def _rehearse(self, approved: dict[str, int]) -> None:
        """Test the first candidate that was not tested yet with what is live now."""
        everything = _tracking.versions()
        for candidate in everything:
            if _tracking.CANDIDATE not in candidate.aliases or candidate.model in approved:
                continue
            live = [one for one in everything if one.live and one.base_sha256 == candidate.base_sha256]
            tested = frozenset(named(one) for one in [*live, candidate])
            if tested in self._rehearsed:
                continue
            try:
                self._rehearse_one(candidate, live, tested)
            except Changed:
                return
            except RegistryError:
                raise
            except FadeError as error:
                logger.info("%s was not rehearsed: %s", named(candidate), error)  # said when it is approved
            self._rehearsed.add(tested)
            return

    def _rehearse_one(self, candidate: AdapterVersion, live: list[AdapterVersion], tested: frozenset[str]) -> None:
        chosen = [check_version(one) for one in [*live, candidate]]
        gate = None
        if len(chosen) > 1:
            gate = together.judge_together(chosen, between=lambda: self._between(set(tested)))
        _tracking.say_together(candidate, together.told(chosen, gate))


def webhook_app(watch: Watch, secret: str) -> FastAPI:
    """Where MLflow's webhooks arrive: ``POST /mlflow`` wakes the watch.

    Raises:
        ConfigError: the secret is too short to sign with.
    """
    if len(secret) < 16:
        raise ConfigError(f"{SECRET_VARIABLE} must have at least 16 characters: the same secret is given to MLflow.")
    app = FastAPI(title="FADE release", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/mlflow", status_code=204)
    async def hook(request: Request) -> None:
        body = await request.body()
        if not is_genuine(body, dict(request.headers), secret):
            raise HTTPException(401, "the signature of this webhook does not hold")
        watch.woken.set()

    return app


def is_genuine(body: bytes, headers: dict[str, str], secret: str, *, now: float | None = None) -> bool:
    """Whether MLflow sent this: HMAC-SHA256 over delivery id, time and body, not older than five minutes."""
    delivery, sent = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
    if not sent.isdecimal() or abs((time.time() if now is None else now) - int(sent)) > WEBHOOK_SECONDS:
        return False
    signed = f"{delivery}.{sent}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    return hmac.compare_digest(expected.encode(), headers.get("x-mlflow-signature", "").encode())


@contextmanager
def serving(app: FastAPI, *, host: str, port: int) -> Iterator[None]:
    """Serve an application in a thread of this program; stopped at the end.

    Raises:
        ConfigError: it did not start; the port is taken, most likely.
    """
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    if not server.started:
        raise ConfigError(f"Nothing could be served on {host}:{port}. Choose another port.")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=10)
