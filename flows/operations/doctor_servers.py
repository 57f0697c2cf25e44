"""What ``fade doctor`` says of MLflow and Prefect: they answer a real question, and nobody else's page or name.

A server that answers ``/health`` may still refuse its own name; one that answers everything may answer a page of
another origin too. Nothing is changed by asking.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import httpx

from fade.errors import listing
from flows.operations.findings import Finding

FOREIGN = "rebinding.invalid"
"""A name that no server has."""
SECONDS = 5.0


def mlflow() -> Finding:
    """MLflow: embedded, or the server of MLFLOW_TRACKING_URI answers to its name, and to no other."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address.startswith("http"):
        return Finding("mlflow", "ok", "embedded, in .fade/mlflow.db")
    base, own = _split(address)
    if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        own = f"{name}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    url, asked = f"{base}/api/2.0/mlflow/experiments/search", {"max_results": 1}
    try:
        with httpx.Client(timeout=SECONDS) as client:
            answer = client.post(url, json=asked, headers=_basic(own))
            if not answer.is_success:
                return _mlflow_refusal(base, answer)
            open_ = list(_mlflow_open(client, url, asked))
    except httpx.HTTPError as error:
        return _silent("mlflow", base, "MLFLOW_TRACKING_URI", error)
    if open_:
        do = "Start it by `fade ui` or `fade up`, or with --app-name fade or fade-users, and with --allowed-hosts"
        return Finding("mlflow", "fail", f"{base} is open: it answers {listing(open_)}", do)
    return Finding("mlflow", "ok", f"{base} answers, to its own names and pages alone")


def _mlflow_refusal(base: str, answer: httpx.Response) -> Finding:
    netloc = urlsplit(base).netloc
    if answer.status_code == 403 and ("Host" in answer.text):
        said = f"{base} answers and refuses this name of it: {answer.text.strip()[:200]}"
        return Finding("mlflow", "fail", said, f"Add {netloc} to its FADE_ALLOWED_HOSTS, or to its --allowed-hosts")
    if answer.status_code in (401, 403):
        do = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return Finding("mlflow", "fail", f"{base} lets nobody in so (status {answer.status_code})", do)
    said = f"{base} answers with status {answer.status_code} when asked for its experiments"
    return Finding("mlflow", "fail", said, "Look at its log, and whether MLFLOW_TRACKING_URI is MLflow's address")


def _mlflow_open(client: httpx.Client, url: str, asked: dict[str, int]) -> Iterator[str]:
    """Who else gets an answer without a password."""
    if client.get(url, params=asked, headers={"Host": FOREIGN}).is_success:
        yield "to any name (DNS rebinding: a page can take one of its own)"
    for origin, who in ((f"http://{FOREIGN}", "pages of any origin"), ("http://127.0.0.1:9", "any page on loopback")):
        if client.post(url, json=asked, headers={"Origin": origin}).is_success:
            yield who
            return


def prefect() -> Finding:
    """Prefect: embedded, or the server of PREFECT_API_URL lets us in, and nobody without the string."""
    address = os.environ.get("PREFECT_API_URL", "")
    if not address.startswith("http"):
        return Finding("prefect", "ok", "embedded, in .fade/prefect")
    base, _ = _split(address)
    key = os.environ.get("PREFECT_API_KEY")
    headers = _basic(os.environ.get("PREFECT_API_AUTH_STRING")) or ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with httpx.Client(timeout=SECONDS) as client:
            answer = client.get(f"{base}/admin/version", headers=headers)
            if answer.status_code in (401, 403) or answer.is_server_error:
                return _prefect_refusal(base, answer)
            open_ = list(_prefect_open(client, base))
    except httpx.HTTPError as error:
        return _silent("prefect", base, "PREFECT_API_URL", error)
    if open_:
        do = (
            "Start it by `fade ui` or `fade up`, or by `uvicorn --factory flows.services.servers:prefect` with "
            "PREFECT_SERVER_API_AUTH_STRING and PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
        )
        said = f"{base} is open: {listing(open_)}. Whoever reaches it runs code where the drain runs"
        return Finding("prefect", "fail", said, do)
    return Finding("prefect", "ok", f"{base} answers, and asks who it is")


def _prefect_refusal(base: str, answer: httpx.Response) -> Finding:
    if answer.is_server_error:
        return Finding("prefect", "fail", f"{base} answers with status {answer.status_code}", "Look at its log")
    if answer.status_code == 403 and "Host" in answer.text:
        do = f"Add {urlsplit(base).netloc} to its FADE_ALLOWED_HOSTS"
        return Finding("prefect", "fail", f"{base} answers and refuses this name of it", do)
    do = "Set PREFECT_API_AUTH_STRING to what its server was started with (PREFECT_SERVER_API_AUTH_STRING)"
    return Finding("prefect", "fail", f"{base} does not let us in (status {answer.status_code})", do)


def _prefect_open(client: httpx.Client, base: str) -> Iterator[str]:
    if client.get(f"{base}/admin/version").is_success:
        yield "it asks for no authentication"
    answer = client.get(f"{base}/health", headers={"Origin": f"http://{FOREIGN}"})
    if answer.headers.get("access-control-allow-origin") == "*":
        yield "it answers pages of every origin (CORS *)"


def _split(address: str) -> tuple[str, str | None]:
    """An address without USER:PASSWORD, and that."""
    parts = urlsplit(address)
    own, _, netloc = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{netloc}{parts.path}".rstrip("/"), unquote(own) or None


def _basic(own: str | None) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(own.encode()).decode()}"} if own else {}


def _silent(name: str, base: str, variable: str, error: httpx.HTTPError) -> Finding:
    said = f"{base} does not answer: {str(error) or type(error).__name__}"
    return Finding(name, "fail", said, f"Start it, or unset {variable} to use none")
