"""Webhooks: each state of a request, signed, to the address its sender gave; kept in the outbox until it is taken.

    X-Fade-Timestamp: seconds since 1970        X-Fade-Signature: v1=hex(HMAC-SHA256(secret, timestamp "." body))

A letter may come twice, and after a failure out of order: its ``sequence`` is the row of the log, so a
receiver keeps the highest it has seen of a request.

Addresses come from strangers. So each letter is on its own, with a time for all of it; of an answer the status alone
is read; no redirect is followed; and it goes to public addresses, to networks of FADE_WEBHOOK_NETWORKS, and to
FADE_ALERT_URL, which is the operator's own. What the name resolves to is checked, and that very address is connected
to: a name that resolves otherwise a moment later changes nothing. For the same reason no proxy of the environment is
used.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
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
LETTER_SECONDS = 10.0
"""For one letter: the name, the connection, and the answer's status."""
AT_ONCE = 20
"""A hundred letters that all run out of time are through before others may claim them again."""
NAT64 = ip_network("64:ff9b::/96")
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class ForbiddenAddressError(ConfigError):
    """A callback resolves to addresses that letters are not sent to."""


def secret() -> bytes:
    """The key of the signatures, FADE_WEBHOOK_SECRET.

    Raises:
        ConfigError: it is not set, or too short to sign with.
    """
    found = environment().webhook_secret
    if found is None:
        raise ConfigError(
            "FADE_WEBHOOK_SECRET must hold at least 16 characters, and is not set: webhooks are never sent unsigned. "
            "Make one: export FADE_WEBHOOK_SECRET=$(python -c 'import secrets; print(secrets.token_urlsafe(24))')"
        )
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
    letters = _claim(ledger, limit=limit, now=now or utc_now())
    errors = asyncio.run(_post_all(letters, key=key, now=now or utc_now())) if letters else []
    for letter, error in zip(letters, errors, strict=True):
        _note(ledger, letter, error, now=now or utc_now())
    failed = sum(error is not None for error in errors)
    return len(errors) - failed, failed


def waiting(ledger: Ledger) -> tuple[dict[str, int], datetime | None]:
    """What stands in the way of the letters that wait, with how many of them, and when the next is tried again.

    A letter that was not tried yet has the reason ``not tried yet``; None where no letter waits.
    """
    unsent = outbox.c.sent_at.is_(None)
    with ledger.reading() as connection:
        asked = sa.select(outbox.c.error, sa.func.count()).where(unsent).group_by(outbox.c.error)
        reasons = {str(error or "not tried yet"): int(count) for error, count in connection.execute(asked)}
        return reasons, connection.scalar(sa.select(sa.func.min(outbox.c.next_at)).where(unsent))


def permitted(found: Sequence[Address], networks: Sequence[Network]) -> list[Address]:
    """Those of a name's addresses that a letter may go to.

    Raises:
        ForbiddenAddressError: none; private, link-local, loopback, reserved and multicast ones need their network in
            FADE_WEBHOOK_NETWORKS, in whatever form of IPv6 they are wrapped.
    """
    good = [
        one
        for one in found
        if any(one in network or _inside(one) in network for network in networks)
        or (_inside(one).is_global and not _inside(one).is_multicast and one.is_global)
    ]
    if not good:
        raise ForbiddenAddressError("The callback's address is not public: name its network in FADE_WEBHOOK_NETWORKS.")
    return good


def _inside(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for: mapped, 6to4, Teredo or NAT64; else itself."""
    if isinstance(address, IPv4Address):
        return address
    teredo = address.teredo
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address


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


async def _post_all(letters: list[sa.RowMapping], *, key: bytes, now: datetime) -> list[str | None]:
    """What went wrong with each; None for those that were taken."""
    places, given = asyncio.Semaphore(AT_ONCE), environment()
    # Of its own, and not waited for at the end: a name server that hangs holds a thread, not the other letters.
    names = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="names")

    async def one(client: httpx.AsyncClient, letter: sa.RowMapping) -> str | None:
        async with places:
            try:
                async with asyncio.timeout(LETTER_SECONDS):
                    own = letter["url"] == given.alert_url
                    urls, name = await _pinned(letter["url"], names, None if own else given.networks)
                    for url in urls[:-1]:
                        with suppress(httpx.ConnectError):
                            return await _post(client, letter, url, name, key=key, now=now)
                    return await _post(client, letter, urls[-1], name, key=key, now=now)
            except TimeoutError:
                return f"no answer within {LETTER_SECONDS:.0f} s"
            except ForbiddenAddressError as error:
                return str(error)
            # A name that is none (``https://xn--/``) is a ValueError somewhere between idna and the resolver.
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                return type(error).__name__

    try:
        async with httpx.AsyncClient(timeout=LETTER_SECONDS, follow_redirects=False, trust_env=False) as client:
            found = await asyncio.gather(*(one(client, letter) for letter in letters), return_exceptions=True)
            # Also what nobody thought of is that letter's fault alone.
            return [type(said).__name__ if isinstance(said, BaseException) else said for said in found]
    finally:
        names.shutdown(wait=False, cancel_futures=True)


async def _pinned(
    address: str, names: ThreadPoolExecutor, networks: Sequence[Network] | None
) -> tuple[list[httpx.URL], str]:
    """The URL with each of the addresses that were checked in place of the name, and the name for TLS."""
    url = httpx.URL(address)
    if url.scheme not in ("http", "https") or not url.host:
        raise httpx.UnsupportedProtocol("expected http:// or https:// with a name")
    host = url.raw_host.decode("ascii").strip("[]")
    port = url.port or (443 if url.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    rows = await loop.run_in_executor(names, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    found = [ip_address(str(row[4][0]).partition("%")[0]) for row in rows]
    chosen = found if networks is None else permitted(found, networks)
    return [url.copy_with(host=str(one)) for one in chosen], host


async def _post(
    client: httpx.AsyncClient,
    letter: sa.RowMapping,
    url: httpx.URL,
    name: str,
    *,
    key: bytes,
    now: datetime,
) -> str | None:
    body, timestamp = letter["body"].encode(), int(now.timestamp())
    headers = {
        "host": httpx.URL(letter["url"]).netloc.decode("ascii"),
        "content-type": "application/json",
        "x-fade-timestamp": str(timestamp),
        "x-fade-signature": sign(body, timestamp=timestamp, key=key),
        "connection": "close",
    }
    asked = client.stream("POST", url, content=body, headers=headers, extensions={"sni_hostname": name})
    async with asked as answer:  # its body is never read
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
