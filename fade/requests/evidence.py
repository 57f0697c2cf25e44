"""Evidence of an erasure: one signed JSON file, and an HTML page with the same content for people.

``evidence.json`` is signed and holds the log's rows of the erasure with their hashes; ``evidence.html`` is
self-contained, and its hash is among what is signed. Both are checked with the public key alone, offline:
the signature, the page's hash, and every row's own hash. What is in it names nobody.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fade.errors import SignatureError
from fade.files import writing
from fade.requests import chain, tables
from fade.requests.ledger import Ledger
from fade.signing import read_signed, write_signed

EVIDENCE_KIND = "fade-evidence/1"
JSON_NAME, PAGE_NAME = "evidence.json", "evidence.html"
REGISTERED = ("adapter_sha256", "base_sha256", "metrics_sha256", "code", "parameters")
"""What the row of the registration says too, under the same names."""
LIMITS = (
    "An adapter suppresses: whoever holds the base model without the adapter, or switches it off, has the base again.",
    "Unlearn accuracy was measured by the concept's name and by the judges named here; an attacker with the weights "
    "may find other ways to the picture. Where an attack is listed, it was measured; where none is, none was.",
    "Purge receipts cover this project's work tree, DVC cache and remotes, MLflow artifacts and what Prefect keeps. "
    "Backups made elsewhere are covered when they are restored and purged again.",
    "Times are those of the machine that wrote the log.",
    "Who acted is the account of the program that gave the command, and the one it has with MLflow where it has one. "
    "An alias that was set in MLflow's page names nobody: it stands here as unknown.",
)


def chain_rows(ledger: Ledger, *, erasure_id: str, requests: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The log's rows of an erasure and of its requests, whole, so that each one's hash can be checked alone."""
    log = tables.log
    wanted = sa.or_(log.c.erasure_id == erasure_id, log.c.request_id.in_(list(requests)))
    with ledger.reading() as connection:
        rows = connection.execute(sa.select(log).where(wanted).order_by(log.c.seq)).mappings().all()
    return [{**row, "at": row["at"].isoformat()} for row in rows]


def seal(folder: Path, content: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """Write ``evidence.json`` and ``evidence.html``; give the SHA-256 of the first."""
    # What the figures do not say stands beside them, before the long lists.
    first = {
        name: content[name] for name in ("erasure", "sealed_at", "requests", "metrics", "attacks") if name in content
    }
    page = as_page({**first, "limits": list(LIMITS), **content}).encode()
    with writing(folder / PAGE_NAME) as temporary:
        temporary.write_bytes(page)
    sealed = {**content, "limits": list(LIMITS), "page_sha256": hashlib.sha256(page).hexdigest()}
    return write_signed(folder / JSON_NAME, json.loads(json.dumps(sealed)), EVIDENCE_KIND, key)


def verify_evidence(place: Path, key: Ed25519PublicKey) -> dict[str, Any]:
    """Check a bundle with the public key alone; give its content.

    Args:
        place: the bundle's folder, or its ``evidence.json``.

    Raises:
        SignatureError: a file is missing or was changed, a row of the log does not have its hash, or the content says
            something else than the row that registered the erasure; says which.
    """
    folder = place.parent if place.name == JSON_NAME and not place.is_dir() else place
    content = read_signed(folder / JSON_NAME, EVIDENCE_KIND, key)
    page = folder / PAGE_NAME
    if not page.is_file() or hashlib.sha256(page.read_bytes()).hexdigest() != content["page_sha256"]:
        raise SignatureError(f"{page} is missing or was changed: it is not the page that was signed for.")
    for row in content["chain"]["rows"]:
        if chain.row_hash({**row, "at": datetime.fromisoformat(row["at"])}) != row["hash"]:
            raise SignatureError(f"{folder / JSON_NAME}: row {row['seq']} of the log does not have its hash.")
    _check_registered(content, folder / JSON_NAME)
    return content


def _check_registered(content: Mapping[str, Any], path: Path) -> None:
    """Thresholds, settings, code and hashes are those of a row of the log that is in the bundle."""
    said = {name: content.get(name) for name in REGISTERED} | {"gate": content.get("gate", {}).get("thresholds")}
    if missing := sorted(name for name, value in said.items() if value is None):
        raise SignatureError(f"{path} says nothing of {', '.join(missing)}: seal it again with this version.")
    rows = [json.loads(row["details"]) for row in content["chain"]["rows"] if row["event"] == "registered"]
    if not any(all(row.get(name) == value for name, value in said.items()) for row in rows):
        raise SignatureError(f"{path}: no row of the log registered what it says of {', '.join(sorted(said))}.")


def as_page(content: Mapping[str, Any]) -> str:
    """The same for people: headings, tables, no script and nothing from elsewhere."""
    parts = [_section(str(name).replace("_", " ").capitalize(), value) for name, value in content.items()]
    style = (
        "body{font:16px/1.5 Georgia,serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#111}"
        "table{border-collapse:collapse;margin:.5rem 0}td,th{border:1px solid #bbb;padding:.2rem .6rem;"
        "text-align:left;vertical-align:top;font-size:.85rem;overflow-wrap:anywhere}th{white-space:nowrap}"
        "h2{border-bottom:1px solid #bbb}"
    )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Evidence of an erasure</title>'
        f"<style>{style}</style>\n<h1>Evidence of an erasure</h1>\n"
        "<p>The signed file is <code>evidence.json</code> beside this page; "
        "<code>fade evidence verify FOLDER --public-key public.pem</code> checks both.</p>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _section(title: str, value: Any) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = "".join(f"<tr><th>{_head(k)}</th><td>{_shown(v)}</td></tr>" for k, v in value.items())
        return f"<table>{rows}</table>" if rows else "none"
    if isinstance(value, list | tuple):
        if value and all(isinstance(one, Mapping) for one in value):
            heads = list(value[0])
            top = "".join(f"<th>{_head(head)}</th>" for head in heads)
            body = "".join("<tr>" + "".join(f"<td>{_shown(one.get(h))}</td>" for h in heads) + "</tr>" for one in value)
            return f"<table><tr>{top}</tr>{body}</table>"
        return "<ul>" + "".join(f"<li>{_shown(one)}</li>" for one in value) + "</ul>" if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    # Four digits to read; the signed file has them all.
    return html.escape("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))


def _head(name: object) -> str:
    return html.escape(str(name).replace("_", " "))
