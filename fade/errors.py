"""Every error the library raises on purpose.

FadeError
├── ConfigError (ValueError)          a parameter or request is wrong
├── DataError (ValueError)            pictures, captions, catalogs or splits are wrong
├── NoMatchingModulesError (ValueError)  target modules name no layer of the network
├── MaskMismatchError (ValueError)    a mask does not fit the network
├── BaseModelError (ValueError)       the base model is missing, damaged or another one
├── AdapterFormatError (ValueError)   an adapter file is damaged, foreign or only partly used
├── RegistryError (RuntimeError)      the model registry refused or cannot be reached
├── LineageError (RuntimeError)       a recorded hash does not match what is there
├── TransitionError (ValueError)      a request cannot go from its state to the one asked for
├── ConflictError (ValueError)        a request's id is taken by another request
├── LeaseLostError (RuntimeError)     a worker's lease ended, and the request is another's now
├── SignatureError (ValueError)       a signed file is damaged, changed, or signed by another key
├── RefusedError (RuntimeError)       what must be erased cannot be established, so nothing is generated
└── ResourceError (OSError)           a port, the disk or another machine resource is not to be had

A message says what is wrong, what was got, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FadeError(Exception):
    """Base of all errors raised on purpose; catch it to catch them all."""


class ConfigError(FadeError, ValueError):
    """A parameter or a request is wrong."""


class DataError(FadeError, ValueError):
    """Pictures, captions, catalogs or splits are wrong."""


class NoMatchingModulesError(FadeError, ValueError):
    """Target modules name no layer of the network."""


class MaskMismatchError(FadeError, ValueError):
    """A mask does not fit the network it is used with."""


class BaseModelError(FadeError, ValueError):
    """The base model is missing, damaged, or not the one expected."""


class AdapterFormatError(FadeError, ValueError):
    """An adapter file is damaged, foreign, or was not used to its last key."""


class RegistryError(FadeError, RuntimeError):
    """The model registry refused, or cannot be reached."""


class LineageError(FadeError, RuntimeError):
    """A recorded hash does not match what is there."""


class TransitionError(FadeError, ValueError):
    """A request cannot go from the state it is in to the one asked for."""


class ConflictError(FadeError, ValueError):
    """A request's id is taken by a request of other content."""


class LeaseLostError(FadeError, RuntimeError):
    """A worker's lease ended, and the request may be another worker's now."""


class SignatureError(FadeError, ValueError):
    """A signed file is damaged, was changed, or is signed by another key."""


class RefusedError(FadeError, RuntimeError):
    """What must be erased cannot be established, so nothing is generated."""


class ResourceError(FadeError, OSError):
    """A port, the disk or another resource of the machine is not to be had."""


def listing(names: Iterable[object], limit: int = 5) -> str:
    """The first ``limit`` names for an error message, with a count of the rest."""
    shown = [str(name) for name in names]
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known names most alike ``name``."""
    options = sorted(known)
    if not options:
        return "There is none yet."
    folded = {option.casefold(): option for option in options}
    close = get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(folded[option]) for option in close)}?"
    return f"Known names: {listing(options, 30)}."


def nameless(error: BaseException) -> str:
    """What an error is, for places that keep it for ever: its kind and no words, which may name somebody."""
    kind = type(error).__name__
    if not isinstance(error, FadeError):
        return kind
    what = (type(error).__doc__ or "").partition("\n")[0]
    return f"{kind}: {what[:1].lower()}{what[1:]} Its words are with the request."
