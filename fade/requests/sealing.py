"""The ledger's key and the keyed hashes (HMAC) made with it: of requests' rows, of outbox letters, of concepts.

seal = HMAC-SHA256(key, JSON(what decides about a request)). The log's rows hold seals, so that a request edited
beside the log is found by whoever has the key; a seal names nobody, and without the key no name can be tried on it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from fade.environment import environment, readable_by_others
from fade.errors import ConfigError
from fade.requests.tables import head

KEY_FILE = Path(".fade/keys/ledger.key")
KEY_VARIABLE = "FADE_LEDGER_KEY"
OPTION = "fade_ledger_key"
"""The execution option by which a connection knows the key."""
SEAL, LETTERS = "request_seal", "letter_seals"
"""In the details of a row of the log: the request as it is after it, and by number the letters it sent for."""
SEALED_EVENT = "sealed"
"""The rows by which a migration seals what an older version made."""
SEALED = (
    "id", "body_sha256", "external_id", "regulation", "legal_basis", "kind", "concept", "concept_key", "aliases",
    "surrogate", "pictures", "subject", "project", "base", "priority", "callback_url", "received_at", "due_at",
    "extended", "state", "state_at", "reason", "erasure_id", "duplicate_of", "attempts", "not_before", "fence",
)  # fmt: skip
"""Columns of a request that are sealed: all but what a lease moves on (worker, its end, the step)."""
_RUNNING = "running"


def ledger_key(*, make: bool = False) -> bytes:
    """The ledger's key: FADE_LEDGER_KEY, else the file ``.fade/keys/ledger.key``.

    Args:
        make: draw one and write the file, readable by its owner alone, if there is none.

    Raises:
        ConfigError: there is none, or others can read it.
    """
    if given := environment().ledger_key:
        return given.get_secret_value().encode()
    if make and not KEY_FILE.is_file():
        _write_once(secrets.token_urlsafe(32))
    try:
        text = KEY_FILE.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise ConfigError(
            f"The ledger's key is not here: expected it in {KEY_FILE.resolve()} or in {KEY_VARIABLE}. Bring it from "
            "the machine that made the ledger: all that share a ledger share its key."
        ) from None
    if readable_by_others(KEY_FILE):
        raise ConfigError(f"Others can read the ledger's key: chmod 600 {KEY_FILE.resolve()}")
    return text.encode()


def _write_once(key: str) -> None:
    """The file, whole from its first moment; of two processes that both want to make it one does."""
    KEY_FILE.parent.mkdir(parents=True, exist_ok=True)
    fresh = KEY_FILE.with_name(f".{KEY_FILE.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
        stream.write(key)
    try:
        os.link(fresh, KEY_FILE)
    except FileExistsError:
        pass  # another process was first: its key counts
    finally:
        fresh.unlink()


def key_id(key: bytes) -> str:
    """Fingerprint of a key: 16 hexadecimal digits that reveal nothing of it."""
    return hmac.new(key, b"fade-ledger-key", hashlib.sha256).hexdigest()[:16]


def fitting_key(connection: Connection) -> bytes:
    """The key that is here, if the ledger of the connection was made with it.

    Raises:
        ConfigError: there is none here, or it is another ledger's.
    """
    found = ledger_key()
    made_with = connection.scalar(sa.select(head.c.key_id))
    if key_id(found) != made_with:
        raise ConfigError(
            f"The ledger was made with the key {made_with}, here is the key {key_id(found)}. All that share a "
            f"ledger share its key: bring {KEY_FILE} from where it was made, or set {KEY_VARIABLE}."
        )
    return found


def key_of(connection: Connection) -> bytes:
    """The key of the ledger that a connection is of."""
    key: bytes = connection.get_execution_options()[OPTION]
    return key


def keyed(key: bytes, digest: str) -> str:
    """Keyed hash (HMAC) of a digest: equal for equal digests, and without the key no name can be tried against it."""
    return hmac.new(key, b"fade-digest\n" + digest.encode(), hashlib.sha256).hexdigest()


def seal_request(key: bytes, row: Mapping[str, Any]) -> str:
    """The seal of a request's row. What a run writes before it ends, the erasure's id, is sealed at its end."""
    left_out = {"erasure_id"} if row.get("state") == _RUNNING else set()
    content = {
        name: _plain(row[name])
        for name in SEALED
        # What is not set is left out, so that a column added later changes no seal.
        if name not in left_out and row.get(name) is not None
    }
    return _seal(key, b"fade-request\n", content)


def seal_letter(key: bytes, *, request_id: str, url: str, body: str) -> str:
    """The seal (keyed hash) of a letter in the outbox: its request, address and body."""
    return _seal(key, b"fade-letter\n", {"request_id": request_id, "url": url, "body": body})


def seal_sent(key: bytes, *, number: int, sent_at: datetime) -> str:
    """The seal of the fact that a letter was sent: editing the outbox alone cannot mark a letter as sent."""
    return _seal(key, b"fade-sent\n", {"id": number, "sent_at": _plain(sent_at)})


def _seal(key: bytes, kind: bytes, content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, kind + text.encode(), hashlib.sha256).hexdigest()


def _plain(value: Any) -> Any:
    """As JSON has it, and the same from every database."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    if isinstance(value, list | tuple):
        return list(value)
    return str(value) if isinstance(value, str) else value
