"""The states of a deletion request, and the one table of transitions between them."""

from __future__ import annotations

from enum import StrEnum

from fade.errors import TransitionError


class State(StrEnum):
    """Where a request stands."""

    RECEIVED = "received"
    NEEDS_INPUT = "needs_input"
    DUPLICATE = "duplicate"
    ON_HOLD = "on_hold"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    REJECTED = "rejected"
    CANDIDATE = "candidate"
    LIVE = "live"  # in force: the concept is erased in what is served
    ROLLED_BACK = "rolled_back"
    CANCELLED = "cancelled"
    FAILED = "failed"


_S = State
TRANSITIONS: dict[State, frozenset[State]] = {
    _S.RECEIVED: frozenset({_S.SCHEDULED, _S.NEEDS_INPUT, _S.DUPLICATE, _S.ON_HOLD, _S.CANCELLED}),
    _S.NEEDS_INPUT: frozenset({_S.SCHEDULED, _S.DUPLICATE, _S.ON_HOLD, _S.CANCELLED}),
    # A duplicate's own erasure is due once the one it points to is no longer in force.
    _S.DUPLICATE: frozenset({_S.SCHEDULED, _S.CANCELLED}),
    _S.ON_HOLD: frozenset({_S.SCHEDULED, _S.NEEDS_INPUT, _S.CANCELLED}),
    _S.SCHEDULED: frozenset({_S.RUNNING, _S.NEEDS_INPUT, _S.DUPLICATE, _S.ON_HOLD, _S.CANCELLED, _S.FAILED}),
    # Back to scheduled: an attempt failed and is repeated, or its worker died. Live at once: another request's erasure
    # of the same concept is in force.
    _S.RUNNING: frozenset(
        {_S.CANDIDATE, _S.LIVE, _S.REJECTED, _S.NEEDS_INPUT, _S.SCHEDULED, _S.ON_HOLD, _S.CANCELLED, _S.FAILED}
    ),
    _S.REJECTED: frozenset({_S.SCHEDULED, _S.CANCELLED}),
    _S.CANDIDATE: frozenset({_S.LIVE, _S.REJECTED, _S.SCHEDULED, _S.CANCELLED}),
    _S.LIVE: frozenset({_S.ROLLED_BACK}),
    _S.ROLLED_BACK: frozenset({_S.LIVE, _S.SCHEDULED, _S.CANCELLED}),
    _S.CANCELLED: frozenset(),
    _S.FAILED: frozenset({_S.SCHEDULED, _S.CANCELLED}),
}
"""From each state, the states that may follow. What is not here is refused."""

OPEN = (State.RECEIVED, State.NEEDS_INPUT, State.ON_HOLD, State.SCHEDULED, State.RUNNING, State.REJECTED,
        State.CANDIDATE, State.ROLLED_BACK, State.FAILED)  # fmt: skip
"""The legal clock runs: nothing is erased yet, and nobody has withdrawn the request."""


def check_transition(request_id: str, before: State, after: State) -> None:
    """Raise TransitionError if ``after`` may not follow ``before``."""
    if after not in TRANSITIONS[before]:
        allowed = ", ".join(sorted(TRANSITIONS[before])) or "nothing: it is closed"
        raise TransitionError(
            f"Request {request_id} is {before} and cannot become {after}; from {before} may follow: {allowed}."
        )
