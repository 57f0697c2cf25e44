"""Attack: figures that lie in a file are changed so that the gate passes. It takes only what an evaluation can give."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fade.config import Gate, GateBounds
from fade.errors import ConfigError, LineageError
from fade.evaluation.figures import rate
from fade.evaluation.gate import verdict
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import as_json, parse
from fade.evaluation.verdicts import Verdict
from fade.requests.ledger import Ledger
from flows.releasing.approval import judged
from tests.figures import attacked, evaluation, judged_figures

GATE = Gate(sure=GateBounds(), attacks={"paraphrase": 0.1})
Change = Callable[[dict[str, Any]], None]


def counted(hits: int, count: int) -> dict[str, Any]:
    """A rate as it is stored."""
    return as_json(rate(hits, count))


def _failing() -> dict[str, Any]:
    """The content of a file: UA of 10 %; without a change it fails for that reason alone."""
    figures = judged_figures({"it": (50, 45, 50), "other": (50, 0, 50)})
    return as_json(evaluation(figures, gate=GATE, attacks=attacked(paraphrase=(0, 100))))


def _judged(content: dict[str, Any]) -> Verdict:
    """As whoever reads the file judges it."""
    found = parse(Evaluation, json.dumps(content), "metrics.json")
    return verdict(found.report, GATE, found.attacks)


def _ua(part: str, value: Any) -> Change:
    return lambda figures: figures["judges"]["report"]["after"]["erased"]["it"]["ua"].__setitem__(part, value)


def _set(path: str, value: Any) -> Change:
    *parents, last = (path if path.startswith("attacks") else f"judges.report.{path}").split(".")

    def change(figures: dict[str, Any]) -> None:
        for parent in parents:
            figures = figures[parent]
        figures[last] = value

    return change


def _without(path: str) -> Change:
    *parents, last = (path if path.startswith("attacks") else f"judges.report.{path}").split(".")

    def change(figures: dict[str, Any]) -> None:
        for parent in parents:
            figures = figures[parent]
        del figures[last]

    return change


FORGED: dict[str, tuple[Change, str]] = {
    "not a number": (_ua("value", float("nan")), "after.erased.1.ua.value is nan, expected a finite number"),
    "infinite": (_ua("value", float("inf")), "value is inf"),
    "negative": (_ua("value", -0.1), "after.erased.1.ua is -0.1 of 50 pictures"),
    "more than all": (_ua("value", 1.1), "1.1 of 50 pictures"),
    "uncounted": (_ua("count", 0), "count is 0, expected at least 1"),
    "count absent": (_without("after.erased.it.ua.count"), "count is nothing"),
    "count of nothing": (_ua("count", None), "count is nothing"),
    "negative count": (_ua("count", -50), "count is -50, expected at least 1"),
    "half a picture": (_ua("count", 50.5), "count is 50.5, expected a whole number"),
    "a word": (_ua("value", "1.0"), "value is str"),
    "true": (_ua("value", True), "value is bool"),
    "9 of 9 in the place of what was measured": (_set("after.erased.it.ua", counted(9, 9)), "after.ua is 55 of 100"),
    "9 of 9 throughout": (
        lambda figures: (
            _set("after.erased.it.ua", counted(9, 9))(figures),
            _set("after.ua", counted(59, 59))(figures),
        )[0],
        "50 and 9 pictures, expected as many before as after",
    ),
    "a value that its count cannot give": (_ua("value", 0.995), "0.995 of 50 pictures"),
    "a value without its interval": (_ua("value", 1.0), "the interval"),
    "a flattering interval": (_set("after.ira.low", 0.9999), "the interval 0.9999"),
    "no interval": (_without("after.ira.high"), "after.ira.high is nothing"),
    "the pooled alone": (_set("after.ua", counted(100, 100)), "expected the sum of the erased concepts'"),
    "a concept left out": (_without("after.erased.it"), "erased is 2 and 1 of other names"),
    "no concepts": (
        lambda figures: (_set("after.erased", {})(figures), _set("before.erased", {})(figures))[0],
        "after.erased is nothing",
    ),
    "no figures of the base": (_without("before"), "before is nothing"),
    "the base's forgotten": (_without("before.ira"), "before.ira is nothing"),
    "a base that was worse": (_set("before.ira", counted(400, 550)), "paired.ira is 0 lost and 0 gained"),
    "no pairs": (_without("paired"), "paired is nothing"),
    "fewer pairs": (_set("paired.ira.count", 9), "expected the same pictures before and after"),
    "pairs that lost less": (_set("paired.cra.lost", -3), "paired.cra.lost is -3, expected at least 0"),
    "more lost than was right": (
        _set("paired.cra", {"lost": 551, "gained": 551, "count": 550, "p": 1.0}),
        "551 lost and 551 gained",
    ),
    "a neighbour left out": (_without("after.neighbours.x"), "neighbours is 1 and 0 and 1 of other names"),
    "mush left out": (_without("after.erased.it.mush"), "expected in all of them or none"),
    "mush that did not come": (_set("after.erased.it.mush", counted(9, 50)), "clear.1 is 0 lost and 0 gained"),
    "mush of fewer pictures": (
        lambda figures: (
            _set("after.erased.it.mush", counted(0, 9))(figures),
            _set("before.erased.it.mush", counted(0, 9))(figures),
            _set("paired.clear.it.count", 9)(figures),
        )[0],
        "of 9 pictures, expected of 50, as UA",
    ),
    "what nobody judged as reachable": (
        _set("reachable", {"it": {name: counted(0, 50) for name in ("ua", "surrogate", "mush")}}),
        "reachable.1 is there",
    ),
    "an attack without a bound": (_without("attacks.paraphrase.high"), "attacks.paraphrase.high is nothing"),
    "an attack's bound alone": (_set("attacks", {"paraphrase": {"high": 0.0}}), "attacks.paraphrase.value is nothing"),
    "an attack's bound made small": (_set("attacks.paraphrase.high", float("nan")), "high is nan"),
    "an attack uncounted": (_set("attacks.paraphrase.count", 0), "count is 0"),
}


def test_the_figures_are_taken_as_measured_and_fail() -> None:
    found = _judged(_failing())
    assert found.verdict == "failed"
    assert {reason.split(" is ")[0] for reason in found.reasons} == {"ua of concept 1"}
    # The parts of a file that another library wrote: whole numbers as 50.0.
    floats = json.loads(json.dumps(_failing()["judges"]), parse_int=float)
    assert _judged({**_failing(), "judges": floats}).verdict == "failed"


@pytest.mark.parametrize("name", FORGED)
def test_forged_figures_are_refused_and_never_passed(name: str) -> None:
    change, said = FORGED[name]
    content = copy.deepcopy(_failing())
    change(content)
    with pytest.raises(ConfigError, match="These are no figures of an evaluation") as refused:
        _judged(content)
    assert said in str(refused.value)
    assert ".it" not in str(refused.value)  # concepts by number: it goes to pages and logs


def test_what_the_file_says_of_the_gate_or_of_the_base_alone_is_held_to_its_figures() -> None:
    for change, said in (
        (lambda content: content["gate"].update(passed=True), "gate is failed, passed True"),
        (lambda content: content["gate"].update(verdict="fine"), "gate.verdict is str"),
        (lambda content: content["judges"]["report"]["recognised"].pop("concept 1"), "other than the figures before"),
        (lambda content: content.update(approved=True), "approved is there, expected nothing of this name"),
        (lambda content: content.pop("judges"), "judges is nothing"),
        (lambda content: content.update(drift=float("inf")), "drift is inf"),
    ):
        content = copy.deepcopy(_failing())
        change(content)
        with pytest.raises(ConfigError) as refused:
            _judged(content)
        assert said in str(refused.value)
    for content in (b"", b"{", b"[]", b"null"):
        with pytest.raises(ConfigError, match=r"metrics\.json"):
            parse(Evaluation, content, "metrics.json")


def test_forged_figures_in_the_registry_are_refused_on_approval(tmp_path: Path) -> None:
    def asked(content: dict[str, Any], *, logged: bytes | None = None) -> Verdict:
        written = json.dumps(content).encode()
        row: Any = SimpleNamespace(
            thresholds=Gate(sure=GateBounds()), metrics_sha256=hashlib.sha256(logged or written).hexdigest()
        )
        with Ledger(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
            return judged(ledger, row, "e0", written)

    content = as_json(evaluation(judged_figures({"it": (50, 0, 50)}), gate=GATE))
    assert asked(content).passed
    content["judges"]["report"]["after"]["erased"]["it"]["ua"] = counted(9, 9)
    with pytest.raises(LineageError, match="was changed since it was logged"):
        asked(content, logged=b"what was measured")
    # Also where the log itself holds their hash.
    with pytest.raises(ConfigError, match="These are no figures of an evaluation"):
        asked(content)
