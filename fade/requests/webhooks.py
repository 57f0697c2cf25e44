"""Webhooks: each state of a request, signed, to the address its sender gave; kept in the outbox until it is taken.

    X-Fade-Timestamp: seconds since 1970        X-Fade-Signature: v1=hex(HMAC-SHA256(secret, timestamp "." body))

A letter may come twice, and after a failure out of order: its ``sequence`` is the row of the log, so a
receiver keeps the highest it has seen of a request.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timedelta
from typing import Any

import httpx
import sqlalchemy as sa

from fade.environment import environment
from fade.errors import ConfigError, SignatureError
from fade.requests.ledger import Ledger
from fade.requests.records import utc_now
from fade.requests.sealing import seal_sent
from fade.requests.tables import outbox

CLAIM = timedelta(seconds=60)
LONGEST = timedelta(hours=6)
TOLERANCE_SECONDS = 300


def secret() -> bytes:
    """The key of the signatures, FADE_WEBHOOK_SECRET.

    Raises:
        ConfigError: it is not set, or too short to sign with.
    """
    found = environment().webhook_secret
    if found is None:
        raise ConfigError("FADE_WEBHOOK_SECRET must hold at least 16 characters: webhooks are never sent unsigned.")
    return found.get_secret_value().encode()


def sign(body: bytes, *, timestamp: int, key: bytes) -> str:
    """The signature's header."""
    return "v1=" + hmac.new(key, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


def check(body: bytes, *, timestamp: int, signature: str, key: bytes, now: datetime | None = None) -> None:
    """What a receiver does.

    Raises:
        SignatureError: signed by another key, changed, or older than five minutes.
    """
    if not hmac.compare_digest(sign(body, timestamp=timestamp, key=key), signature):
        raise SignatureError(
            "The webhook's signature does not fit its body and time: it was changed, or another signed it."
        )
    if abs((now or utc_now()).timestamp() - timestamp) > TOLERANCE_SECONDS:
        raise SignatureError("The webhook is older than five minutes: it was sent again by someone else.")


def deliver(ledger: Ledger, *, key: bytes, limit: int = 100, now: datetime | None = None) -> tuple[int, int]:
    """Send what is due; gives how many were taken and how many are tried again later (up to six hours apart)."""
    sent = failed = 0
    with httpx.Client(timeout=10, follow_redirects=False) as client:
        for letter in _claim(ledger, limit=limit, now=now or utc_now()):
            error = _post(client, letter, key=key, now=now or utc_now())
            _note(ledger, letter, error, now=now or utc_now())
            sent, failed = sent + (error is None), failed + (error is not None)
    return sent, failed


def _claim(ledger: Ledger, *, limit: int, now: datetime) -> list[sa.RowMapping]:
    """The letters whose turn it is, kept from other senders for a minute."""
    asked = (
        sa.select(outbox)
        .where(outbox.c.sent_at.is_(None), outbox.c.next_at <= now)
        .order_by(outbox.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    with ledger.signing() as connection:
        letters = list(connection.execute(asked).mappings())
        numbers = [letter["id"] for letter in letters]
        connection.execute(sa.update(outbox).where(outbox.c.id.in_(numbers)).values(next_at=now + CLAIM))
    return letters


def _post(client: httpx.Client, letter: sa.RowMapping, *, key: bytes, now: datetime) -> str | None:
    body, timestamp = letter["body"].encode(), int(now.timestamp())
    headers = {
        "content-type": "application/json",
        "x-fade-timestamp": str(timestamp),
        "x-fade-signature": sign(body, timestamp=timestamp, key=key),
    }
    try:
        answer = client.post(letter["url"], content=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return type(error).__name__
    return None if answer.is_success else f"status {answer.status_code}"


def _note(ledger: Ledger, letter: sa.RowMapping, error: str | None, *, now: datetime) -> None:
    attempts = letter["attempts"] + 1
    wait = min(timedelta(seconds=10) * 2 ** min(attempts, 20), LONGEST)
    if error is None:
        seal = seal_sent(ledger.key, number=letter["id"], sent_at=now)
        values: dict[str, Any] = {"sent_at": now, "sent_seal": seal}
    else:
        values = {"error": error, "next_at": now + wait}
    with ledger.signing() as connection:
        connection.execute(sa.update(outbox).where(outbox.c.id == letter["id"]).values(attempts=attempts, **values))
