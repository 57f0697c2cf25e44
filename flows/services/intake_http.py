"""HTTP intake, shaped like OpenDSR: POST a request, GET its status, DELETE to withdraw it; and Prometheus metrics.

Bearer token from FADE_INTAKE_TOKEN; loopback by default. Run: fade intake-http
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool

from fade.environment import environment
from fade.errors import ConfigError, ConflictError, DataError, RegistryError, TransitionError
from fade.project import Projects
from fade.requests.durations import Durations
from fade.requests.ledger import Ledger
from fade.requests.messages import MAX_BYTES, read_message
from fade.requests.overview import overview
from fade.requests.records import Record
from fade.requests.states import State
from flows.services.front import ConcurrencyLimit, Front
from flows.services.http_logs import HttpLogs
from flows.services.own_origin import OwnOrigin

ACTOR = "http"
_STATUS = {
    ConflictError: 409,
    TransitionError: 409,
    DataError: 422,
    RegistryError: 503,
}


def token() -> str:
    """The bearer token that callers must send.

    Raises:
        ConfigError: it is not set, or too short.
    """
    found = environment().intake_token
    if found is None:
        raise ConfigError(
            "FADE_INTAKE_TOKEN must hold at least 16 characters, and is not set: the intake is never open to everyone. "
            "Make one: export FADE_INTAKE_TOKEN=$(python -c 'import secrets; print(secrets.token_urlsafe(24))')"
        )
    return found.get_secret_value()


def make_app(ledger: Ledger, projects: Projects, *, expected: str) -> FastAPI:
    """The intake as an application.

    Args:
        projects: those that requests may be for.
        expected: the bearer token; every path but /health asks for it.
    """
    app = FastAPI(title="FADE intake", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Front, token=expected, max_bytes=MAX_BYTES, limit=ConcurrencyLimit(parallel=8, waiting=64))
    app.add_middleware(OwnOrigin)
    app.add_middleware(HttpLogs)
    durations = Durations()
    for kind, code in _STATUS.items():
        app.add_exception_handler(kind, _answer(code))

    @app.post("/requests", status_code=201)
    async def submit(spec: Request, response: Response) -> dict[str, Any]:
        message = read_message(await spec.body())  # no longer than Front lets through
        record, new = await run_in_threadpool(ledger.submit, message, projects.chosen(message.project), actor=ACTOR)
        response.status_code = 201 if new else 200
        return public(record)

    @app.get("/requests/{request_id}")
    def status(request_id: str) -> dict[str, Any]:
        return public(_known(ledger, request_id))

    @app.delete("/requests/{request_id}")
    def cancel(request_id: str) -> dict[str, Any]:
        _known(ledger, request_id)
        return public(ledger.cancel(request_id, actor=ACTOR, reason="withdrawn by its sender"))

    @app.get("/metrics")
    def metrics() -> Response:
        registry = CollectorRegistry()
        registry.register(LedgerMetrics(ledger, durations))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


def public(record: Record) -> dict[str, Any]:
    """A request's status for its sender; holds no names."""
    return {
        "id": record.id,
        "external_id": record.external_id,
        "status": record.state,
        "received_at": record.received_at.isoformat(),
        "due_at": record.due_at.isoformat(),
        "status_at": record.state_at.isoformat(),
        "duplicate_of": record.duplicate_of,
        "erasure": record.erasure_id,
    }


class LedgerMetrics(Collector):
    """Prometheus collector: reads the ledger's figures at every scrape."""

    def __init__(self, ledger: Ledger, durations: Durations) -> None:
        self.ledger, self.durations = ledger, durations

    def collect(self) -> Iterator[Metric]:
        """Requests by state, overdue ones, age of the oldest open one, waiting webhooks, dead letters, durations."""
        found = overview(self.ledger, limit=1)
        states = GaugeMetricFamily("fade_requests", "Requests by state", labels=["state"])
        for state in State:
            states.add_metric([state], found.counts.get(state, 0))
        yield states
        yield GaugeMetricFamily("fade_requests_overdue", "Open requests past their deadline", found.overdue)
        yield GaugeMetricFamily("fade_oldest_open_seconds", "Age of the oldest open request", found.oldest_seconds)
        yield GaugeMetricFamily("fade_webhooks_waiting", "Webhooks in the outbox", found.webhooks)
        self.durations.read(self.ledger)
        yield CounterMetricFamily("fade_dead_letters", "Messages that were no requests", self.durations.dead_letters)
        for name, said, label, histograms in (
            ("fade_erasure_seconds", "From a lease to the outcome of the attempt", "outcome", self.durations.runs),
            ("fade_request_seconds", "From receipt until the state is reached", "state", self.durations.requests),
        ):
            family = HistogramMetricFamily(name, said, labels=[label])
            for value, one in sorted(histograms.items()):
                family.add_metric([value], one.cumulative(), one.total)
            yield family


def _known(ledger: Ledger, request_id: str) -> Record:
    try:
        return ledger.get(request_id)
    except DataError:
        # No suggestion here: other senders' ids are not told.
        raise HTTPException(404, "There is no such request.") from None


def _answer(status: int) -> Any:
    def handle(_request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=status)

    return handle
