"""Watch the registry: what is approved or taken back in MLflow's page is live or out within seconds.

MLflow is asked every second (one question), and a signed webhook of MLflow cuts even that short. A hook says
only that something happened: what is approved is always read from MLflow, so that a lost, repeated or forged
hook changes nothing.

The order of its work: what was taken back goes out, what is known to hold goes live, then what waits for a test
is tested, and while there is nothing else to do candidates are rehearsed, one at a time. Tests run in a process
of their own and are ended as soon as another one is wanted: no click waits for them.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import uvicorn
from fastapi import FastAPI, HTTPException, Request

from fade.adapters.manifest import Manifest
from fade.adapters.seen import wall_time
from fade.errors import ConfigError, FadeError, RegistryError, listing
from fade.steps.alike import check_alike
from flows.erasing.together import Measurement, Wanted, joined, told, verdict_together
from flows.releasing import manifests, release
from flows.releasing.approval import Approved, check_version, named
from flows.releasing.release import Change
from tasks.mlflow import tracking, version_page
from tasks.mlflow.tracking import AdapterVersion

logger = logging.getLogger(__name__)
SECRET_VARIABLE = "FADE_MLFLOW_WEBHOOK_SECRET"
WEBHOOK_SECONDS = 300
"""Age at which a hook is no longer believed, as in the Standard Webhooks' specification."""
HOOK_BYTES = 256 * 1024
LOOK_AGAIN_SECONDS = 60.0
"""After this long everything is checked anew, although no alias moved: a refusal's reason may be gone."""


class Watch:
    """The release flow, for as long as the program runs.

    Args:
        valid_seconds: how long a manifest holds; it is signed anew after half of that. 0 for without end.
        poll_seconds: time between two questions to MLflow.
        rehearse: test candidates together with what is live before anyone approves them, so that an
            approval need not wait for it.
        now: the clock that a manifest's age is told by.
    """

    def __init__(
        self,
        *,
        valid_seconds: int,
        poll_seconds: float = 1.0,
        rehearse: bool = True,
        now: Callable[[], datetime] = wall_time,
    ) -> None:
        self.valid_seconds, self.poll_seconds, self.rehearse, self.now = valid_seconds, poll_seconds, rehearse, now
        self.woken, self.ended = threading.Event(), threading.Event()
        self.trouble = ""
        self.measuring: Measurement | None = None
        self._live: dict[str, list[Approved]] = {}
        self._failed: dict[Path, str] = {}
        self._seen: dict[str, int] | None = None
        self._rehearsed: set[frozenset[str]] = set()
        self._looked = 0.0

    def run(self) -> Iterator[list[Change]]:
        """Look until ``ended`` is set; yields what each look came to."""
        try:
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
        finally:
            self.close()

    def close(self) -> None:
        """End what is being measured."""
        if self.measuring is not None:
            self.measuring.stop()
            self.measuring = None

    def look(self) -> list[Change]:
        """One look: settle if an alias moved, a test ended or it is time; else go on with one candidate."""
        now = tracking.approved_now()
        self._take_result()
        overdue = time.monotonic() - self._looked > LOOK_AGAIN_SECONDS
        if now == self._seen and not overdue:
            self._heartbeat()
            if self.measuring is None and self.rehearse:
                self._rehearse(now)
            return []
        if overdue:
            self._failed.clear()
        before = self._live
        settled = release.settle(valid_seconds=self.valid_seconds, failed=self._failed)
        # Not what was asked first: an alias set in between and removed before the next look would leave no trace.
        self._seen, self._live, self._looked = settled.approved, settled.live, time.monotonic()
        self._heartbeat()
        if settled.unknown:
            self._turn_to(Wanted(settled.unknown[0]))
        elif self.measuring is not None and not self._tells(self.measuring.of, before, now):
            self.close()
        return settled.changes

    def _heartbeat(self) -> None:
        manifests.reissue(valid_seconds=self.valid_seconds, now=self._is_stale)

    def _is_stale(self, manifest: Manifest) -> bool:
        if not self.valid_seconds:
            return False
        age = (self.now() - datetime.fromisoformat(manifest.issued)).total_seconds()
        return age > self.valid_seconds / 2 or manifest.valid_seconds != self.valid_seconds

    def _turn_to(self, wanted: Wanted) -> None:
        """Measure this and nothing else; if it is under way already, it goes on."""
        if self.measuring is not None and wanted.folder == self.measuring.folder:
            self.measuring.of = wanted
            return
        self.close()
        self.measuring = Measurement(wanted)

    def _take_result(self) -> None:
        """What was being measured, if it came to its end: an approval that waits for it is settled by this look."""
        done = self.measuring
        if done is None or not done.ended:
            return
        self.measuring = None
        if done.reason:
            logger.warning("%s was not tested: %s", listing(one.name for one in done.of.chosen), done.reason)
        if done.of.candidate is None:
            self._seen = None
            self._failed |= {done.folder: done.reason} if done.reason else {}
        elif done.reason:
            self._rehearsed.add(self._with_live(done.of.candidate))

    def _tells(self, wanted: Wanted, before: dict[str, list[Approved]], approved: dict[str, int]) -> bool:
        """Whether a rehearsal still tells something: of what nobody decided on yet, with what is live now."""
        candidate = wanted.candidate
        if candidate is None or candidate.model in approved:
            return False
        was, now = ([one.name for one in live.get(candidate.base_sha256, [])] for live in (before, self._live))
        return was == now

    def _with_live(self, candidate: AdapterVersion) -> frozenset[str]:
        live = self._live.get(candidate.base_sha256, [])
        return frozenset((*(one.name for one in live), named(candidate)))

    def _rehearse(self, approved: dict[str, int]) -> None:
        """Go on with the first candidate that was not tested with what is live now: say what is known, or measure."""
        for candidate in tracking.versions():
            if not candidate.offered or candidate.model in approved or self._with_live(candidate) in self._rehearsed:
                continue
            try:
                chosen = joined(self._live.get(candidate.base_sha256, []), [check_version(candidate)])
                check_alike([one.folder for one in chosen])
            except RegistryError:
                raise
            except FadeError as error:
                logger.info("%s was not rehearsed: %s", named(candidate), error)  # said when it is approved
            else:
                gate = verdict_together(chosen) if len(chosen) > 1 else None
                if gate is None and len(chosen) > 1:
                    self._turn_to(Wanted(tuple(chosen), candidate))
                    return
                version_page.show_together(candidate, told(chosen, gate))
            self._rehearsed.add(self._with_live(candidate))
            return


def webhook_app(watch: Watch, secret: str) -> FastAPI:
    """Where MLflow's webhooks arrive: ``POST /mlflow`` wakes the watch.

    Raises:
        ConfigError: the secret is too short to sign with.
    """
    if len(secret) < 16:
        raise ConfigError(f"{SECRET_VARIABLE} must have at least 16 characters: the same secret is given to MLflow.")
    app = FastAPI(title="FADE release", docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/mlflow", status_code=204)
    async def hook(spec: Request) -> None:
        body = b""
        async for part in spec.stream():
            body += part
            if len(body) > HOOK_BYTES:
                raise HTTPException(413, f"a webhook has at most {HOOK_BYTES} bytes", {"Connection": "close"})
        if not is_genuine(body, dict(spec.headers), secret):
            raise HTTPException(401, "the signature of this webhook does not hold")
        watch.woken.set()

    return app


def is_genuine(body: bytes, headers: dict[str, str], secret: str, *, now: float | None = None) -> bool:
    """Whether MLflow sent this: HMAC-SHA256 over delivery id, time and body, not older than five minutes."""
    delivery, sent = headers.get("x-mlflow-delivery-id", ""), headers.get("x-mlflow-timestamp", "")
    # ASCII digits alone, and no more than a time has: what a number is, int() sees too generously.
    if not re.fullmatch(r"[0-9]{1,12}", sent):
        return False
    if abs((time.time() if now is None else now) - int(sent)) > WEBHOOK_SECONDS:
        return False
    signed = _bytes(f"{delivery}.{sent}.") + body
    expected = "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    return hmac.compare_digest(expected.encode(), _bytes(headers.get("x-mlflow-signature", "")))


def _bytes(text: str) -> bytes:
    """Of any text, lone surrogates too: what is compared must not fail on it."""
    return text.encode("utf-8", "surrogatepass")


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
