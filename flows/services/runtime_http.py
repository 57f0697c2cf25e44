"""The HTTP picture service: draws with every live adapter, and has a plain page to try it.

    GET  /           the page
    GET  /health     200 while pictures can be drawn, 503 with the reason while not; needs no token
    GET  /live       the manifest in force
    GET  /metrics    Prometheus
    POST /generate   {"prompt", "seed", "steps", "guidance", "base"} -> PNG

All but page and health ask for ``Authorization: Bearer`` with the token of FADE_SERVICE_TOKEN. ``base: true``
draws without any adapter and so undoes every erasure: it is refused unless the service was started for
comparison. When too many wait, 429 with ``Retry-After``. A prompt is written into no log.
"""

from __future__ import annotations

import io
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, move_on_after, to_thread
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field

from fade.adapters.runtime import Runtime
from fade.environment import environment
from fade.errors import ConfigError, RefusedError
from flows.services.front import ConcurrencyLimit, Front
from flows.services.http_logs import HttpLogs
from flows.services.own_origin import OwnOrigin

TOKEN_VARIABLE = "FADE_SERVICE_TOKEN"
PAGE = Path(__file__).with_name("page.html")
MAX_BYTES = 16 * 1024
"""A prompt has 1,000 characters at most."""
WAITING = 32
HEALTH_SECONDS = 2.0


class DrawRequest(BaseModel):
    """A request for one picture."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1, max_length=1000)
    seed: int = Field(188, ge=0, lt=2**63)
    steps: int = Field(25, ge=1, le=100)
    guidance: float = Field(4.0, ge=0, le=30, allow_inf_nan=False)
    base: bool = False


class RuntimeMetrics:
    """Prometheus metrics in a registry of their own, so that one program can hold several services."""

    def __init__(self, runtime: Runtime) -> None:
        self.registry = CollectorRegistry()
        self.drawn = Counter("fade_pictures", "Pictures drawn.", ["with"], registry=self.registry)
        self.refused = Counter(
            "fade_refusals", "Requests refused because the manifest could not be established.", registry=self.registry
        )
        self.seconds = Histogram("fade_picture_seconds", "Seconds a picture took.", registry=self.registry)
        manifest = Gauge("fade_manifest_counter", "Counter of the manifest in force.", registry=self.registry)
        manifest.set_function(lambda: runtime.manifest.counter if runtime.manifest else 0)
        live = Gauge("fade_live_adapters", "Adapters in force.", registry=self.registry)
        live.set_function(lambda: len(runtime.manifest.adapters) if runtime.manifest else 0)
        serving = Gauge("fade_serving", "1 while pictures can be drawn.", registry=self.registry)
        serving.set_function(lambda: float(runtime.manifest is not None))


def service_token() -> str:
    """The bearer token that callers must send.

    Raises:
        ConfigError: FADE_SERVICE_TOKEN is not set, or too short to resist guessing.
    """
    token = environment().service_token
    if token is None:
        raise ConfigError(
            f"{TOKEN_VARIABLE} must hold at least 16 characters, and is not set. "
            f"Make one: export {TOKEN_VARIABLE}=$(python -c 'import secrets; print(secrets.token_urlsafe(24))')"
        )
    return token.get_secret_value()


def make_app(runtime: Runtime, *, token: str, compare: bool = False, parallel: int = 2, waiting: int = WAITING) -> Any:
    """The service over a runtime.

    Args:
        compare: whether callers may ask for the base's own picture.
        parallel: pictures drawn at once.
        waiting: requests for pictures that wait at most; further ones are turned away with 429.
    """
    figures = RuntimeMetrics(runtime)
    app = _routes(runtime, figures, compare=compare)
    drawing = {"/generate": ConcurrencyLimit(parallel, waiting)}
    app.add_middleware(
        Front,
        token=token,
        max_bytes=MAX_BYTES,
        limit=ConcurrencyLimit(4, WAITING),
        limits=drawing,
        open_paths=frozenset({"/", "/health"}),
    )
    app.add_middleware(OwnOrigin)
    app.add_middleware(HttpLogs)
    return app


def _routes(runtime: Runtime, figures: RuntimeMetrics, *, compare: bool) -> FastAPI:
    app = FastAPI(title="FADE", docs_url=None, redoc_url=None, openapi_url=None)
    own_thread = CapacityLimiter(1)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8").replace("COMPARE", str(compare).lower())

    @app.get("/health")
    async def health(response: Response) -> dict[str, str]:
        # Not in the pool whose threads draw. While a new manifest is taken over, the last state is told.
        with move_on_after(HEALTH_SECONDS):
            await to_thread.run_sync(_look, runtime, abandon_on_cancel=True, limiter=own_thread)
        if runtime.manifest is None:
            response.status_code = 503
            return {"status": "refusing", "reason": "what must be erased cannot be established"}
        return {"status": "serving"}

    @app.get("/live")
    def live() -> dict[str, Any]:
        manifest = _or_503(runtime, figures)
        expires = manifest.expires.isoformat() if manifest.expires else None
        return {**asdict(manifest), "base_files": len(manifest.base_files), "expires": expires, "compare": compare}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(figures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/generate")
    def generate(asked: DrawRequest) -> Response:
        if asked.base and not compare:
            raise HTTPException(403, "the base's own pictures are not served here: start with --compare to compare")
        begun = time.perf_counter()
        try:
            pixels, manifest = runtime.generate(
                [asked.prompt], [asked.seed], steps=asked.steps, guidance=asked.guidance, base_only=asked.base
            )
        except RefusedError as error:
            figures.refused.inc()
            raise HTTPException(503, str(error)) from None
        figures.seconds.observe(time.perf_counter() - begun)
        figures.drawn.labels("base" if asked.base else "live").inc()
        stream = io.BytesIO()
        Image.fromarray(pixels[0]).save(stream, format="PNG")
        headers = {"X-Fade-Manifest": manifest.sha256, "X-Fade-Counter": str(manifest.counter)}
        return Response(stream.getvalue(), media_type="image/png", headers={**headers, "Cache-Control": "no-store"})

    return app


def _look(runtime: Runtime) -> None:
    with suppress(RefusedError):
        runtime.refresh()


def _or_503(runtime: Runtime, figures: RuntimeMetrics) -> Any:
    try:
        return runtime.refresh().manifest
    except RefusedError as error:
        figures.refused.inc()
        raise HTTPException(503, str(error)) from None
