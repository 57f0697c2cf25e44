"""Signed files: JSON with an Ed25519 signature (RFC 8032, by ``cryptography``), refused after any change of a byte.

A signed file has exactly one spelling. It is read, written anew and compared byte for byte before its
signature is checked, so that spaces, the order of keys or letter case cannot be changed unseen either.
The kind of a file is part of what is signed: a permission cannot pass for a manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from filelock import FileLock

from fade.environment import environment
from fade.errors import ConfigError, ResourceError, SignatureError
from fade.files import writing

PRIVATE_NAME, PUBLIC_NAME = "signing.pem", "public.pem"
KEY_VARIABLE = "FADE_SIGNING_KEY"
_FIELDS = {"key", "kind", "payload", "signature"}


def canonical(content: Mapping[str, Any]) -> bytes:
    """The one spelling of JSON content: sorted keys, two spaces, UTF-8, a newline at the end.

    Raises:
        ConfigError: it holds NaN or an infinity, which JSON has no word for.
    """
    try:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode("utf-8")
    except ValueError as error:
        raise ConfigError(f"This content cannot be signed: {error}. Replace numbers that are not finite.") from None


def key_id(public: Ed25519PublicKey) -> str:
    """A short name of a key: the first 16 digits of its SHA-256."""
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def signing_key(folder: Path) -> Ed25519PrivateKey:
    """The key that signs: PEM text in FADE_SIGNING_KEY, else the one in ``folder``, made there at first use.

    ``public.pem`` is written beside it: that file, and only that one, goes to whoever verifies. A public key that is
    there already belongs to whoever signs: no other key is made beside it, and it is never replaced.

    Raises:
        ConfigError: what is there is no Ed25519 key in PEM, or the public key there is another one's.
    """
    given = environment().signing_key
    if given:
        key = _private(given.get_secret_value().encode(), f"the variable {KEY_VARIABLE}")
        _keep_public(folder, key)
        return key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / ".lock"), timeout=60):  # two processes at their first use are to have one key
        path = folder / PRIVATE_NAME
        if path.is_file():
            key = _private(path.read_bytes(), str(path))
        elif (folder / PUBLIC_NAME).is_file():
            raise ConfigError(
                f"{folder / PUBLIC_NAME} is the public key of whoever signs, and {PRIVATE_NAME} is not beside it: from "
                f"here nothing can be signed. Restore {PRIVATE_NAME} from a backup or set {KEY_VARIABLE}; if that key "
                f"is lost, remove {PUBLIC_NAME} by hand, and give every runtime the new one."
            )
        else:
            key = _made(path)
        _keep_public(folder, key)
    return key


def verifying_key(folder: Path) -> Ed25519PublicKey:
    """The public half of the key that signs, to read what is signed; nothing is made or written.

    Raises:
        ConfigError: no key is there, or what is there is none.
    """
    if (folder / PUBLIC_NAME).is_file():
        return public_key(folder / PUBLIC_NAME)
    if given := environment().signing_key:
        return _private(given.get_secret_value().encode(), f"the variable {KEY_VARIABLE}").public_key()
    if (folder / PRIVATE_NAME).is_file():
        return _private((folder / PRIVATE_NAME).read_bytes(), str(folder / PRIVATE_NAME)).public_key()
    return public_key(folder / PUBLIC_NAME)


def _made(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with writing(path) as temporary:
        # Readable by its owner alone from the first byte on.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
    return key


def _keep_public(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write the public key where there is none; one that is there has to be this one's."""
    path = folder / PUBLIC_NAME
    if path.is_file():
        if (found := key_id(public_key(path))) != (own := key_id(key.public_key())):
            raise ConfigError(
                f"{path} is the key {found!r}, but what would sign is the key {own!r}: runtimes that trust the first "
                "would refuse everything. Take the key that belongs to it, or remove the file by hand and give every "
                "runtime the new one."
            )
        return
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with writing(path) as temporary:
        temporary.write_bytes(pem)


def public_key(path: Path) -> Ed25519PublicKey:
    """The key that verifies, from a PEM file.

    Raises:
        ConfigError: the file is missing or holds no Ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"No public key in {path}: get {PUBLIC_NAME} from whoever signs.") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key in PEM: {error}. Get {PUBLIC_NAME} from whoever signs.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} holds a {type(key).__name__}; expected an Ed25519 public key.")
    return key


def _private(pem: bytes, origin: str) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The library's message could quote the key.
        raise ConfigError(f"What is in {origin} is no unencrypted private key in PEM.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{origin} holds a {type(key).__name__}; expected an Ed25519 private key.")
    return key


def sign(payload: Mapping[str, Any], kind: str, key: Ed25519PrivateKey) -> bytes:
    """The signed file's bytes."""
    signature = key.sign(_signed_bytes(payload, kind)).hex()
    return canonical({"kind": kind, "key": key_id(key.public_key()), "payload": payload, "signature": signature})


def _signed_bytes(payload: Mapping[str, Any], kind: str) -> bytes:
    return f"fade-signed/1\n{kind}\n".encode() + canonical(payload)


def verify(data: bytes, kind: str, key: Ed25519PublicKey, *, origin: str) -> dict[str, Any]:
    """The payload of a signed file.

    Args:
        origin: where the bytes are from, for error messages.

    Raises:
        SignatureError: damaged, changed, of another kind or key; says what and where.
    """
    content = _parsed(data, origin)
    if content["kind"] != kind:
        raise SignatureError(f"{origin} is of the kind {content['kind']!r}; expected {kind!r}.")
    if content["key"] != key_id(key):
        raise SignatureError(
            f"{origin} is signed by the key {content['key']!r}; trusted is {key_id(key)!r}. "
            "Check the public key, or whoever wrote the file."
        )
    try:
        signature = bytes.fromhex(str(content["signature"]))
        if signature.hex() != content["signature"]:  # fromhex also reads capitals and spaces
            raise ValueError("another spelling")
        key.verify(signature, _signed_bytes(content["payload"], kind))
    except (InvalidSignature, ValueError, ConfigError):
        raise SignatureError(f"{origin} was changed: its signature does not hold. It is not used.") from None
    if not isinstance(content["payload"], dict):
        raise SignatureError(f"{origin} holds no JSON object as its payload.")
    payload: dict[str, Any] = content["payload"]
    return payload


def _parsed(data: bytes, origin: str) -> dict[str, Any]:
    """The fields of a signed file that is spelt as it was written."""
    try:
        content = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SignatureError(f"{origin} was changed: byte {error.start} is no UTF-8. Fetch it again.") from None
    except json.JSONDecodeError as error:
        raise SignatureError(f"{origin} is damaged: {error.msg} at byte {error.pos}. Fetch it again.") from None
    except (ValueError, RecursionError) as error:
        raise SignatureError(f"{origin} is damaged: {error}. Fetch it again.") from None
    if not isinstance(content, dict) or set(content) != _FIELDS:
        raise SignatureError(f"{origin} is no signed file: expected a JSON object with {', '.join(sorted(_FIELDS))}.")
    try:
        rewritten = canonical(content)
    except (ConfigError, UnicodeEncodeError):
        rewritten = b""
    if rewritten != data:
        at = next((i for i, (a, b) in enumerate(zip(data, rewritten, strict=False)) if a != b), len(rewritten))
        raise SignatureError(f"{origin} was changed: byte {at} is not as it was written. Fetch it again.")
    return content


def read_signed(path: Path, kind: str, key: Ed25519PublicKey) -> dict[str, Any]:
    """The payload of a signed file on disk.

    Raises:
        SignatureError: missing, damaged, changed, of another kind or key.
        ResourceError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SignatureError(f"{path} is missing: expected a signed file of the kind {kind!r}.") from None
    except OSError as error:
        raise ResourceError(f"Cannot read {path}: {error}") from None
    return verify(data, kind, key, origin=str(path))


def write_signed(path: Path, payload: Mapping[str, Any], kind: str, key: Ed25519PrivateKey) -> str:
    """Write a signed file; give its SHA-256."""
    data = sign(payload, kind, key)
    with writing(path) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
