"""Which pictures an evaluation draws next, so that it ends as soon as the gate is sure   (ours).

Three kinds of prompts, each in an order that is settled before anything is drawn. What was seen decides how far each
of them is followed, never which picture comes next, so that the bounds of ``fade.evaluation.bounds`` hold:

own     those of the erased concepts, a seed after the other; first of all, since a bad erasure shows there soonest
rest    those that name none of them, spread so that each few hold every object and style about equally often: what was
        drawn of them is an even sample at any time. IRA, CRA and drift are of these alone
near    further ones of the neighbours and surrogates, of each as many as the gate needs where the rest has too few

A round draws what not even the best erasure could do without (``fade.evaluation.power``); after that some dozens of
whatever the gate is not sure of, until it is, something is surely missed, or all seeds were drawn. Where that is how
much of the concept's prompts shows the surrogate, or is mush, as many of the surrogate's own, which say what can be
reached. Where one of several concepts is surely lost the others' own prompts are still followed to their end, and
those alone: no adapter that has it passes, but whoever makes another one without it wants to know which to leave out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from fade.concepts import Concept
from fade.config import Gate
from fade.evaluation.asked import concept_of
from fade.evaluation.bounds import loss_bounds
from fade.evaluation.figures import JudgeFigures, Paired
from fade.evaluation.gate import hopeless, lost_concepts, undecided
from fade.evaluation.power import least, least_counts

PART, OWN, REST, NEAR = "part", "own", "rest", "near"
DOZEN = 12
"""Pictures of a kind that a round draws at least."""


class Rounds:
    """The pictures of one evaluation: what comes first, and what next.

    Args:
        samples: the protocol of the seeds that are set: a row for every object, style and seed.
        further: seeds that may be drawn after these.
        neighbours: names of the erased concepts' neighbours, in any order; figures number them by their names.
        whole: all of ``samples`` come first, whatever the gate needs.

    Attributes:
        parts: of what was drawn, the kind by its label.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        *,
        further: Sequence[int],
        pairs: Sequence[tuple[Concept, Concept | None]],
        neighbours: Sequence[str],
        gate: Gate,
        whole: bool,
    ) -> None:
        once = samples[samples["seed"] == samples["seed"].iloc[0]]
        more = [once.assign(seed=seed) for seed in further]
        self._all = pd.concat([samples, *more], ignore_index=True)
        self._gate, self._neighbours, self._whole = gate, sorted(neighbours), len(samples) if whole else 0
        named = pd.Series(False, index=self._all.index)
        self._own: list[list[int]] = []
        for concept, _ in pairs:
            mine = self._all[concept.kind] == concept.name
            named |= mine
            self._own.append(self._all.index[mine].tolist())
        self._rest = _spread(self._all[~named])
        self._surrogates = [None if instead is None else instead.name for _, instead in pairs]
        close = [*neighbours, *(name for name in self._surrogates if name is not None)]
        # A concept that is erased itself is none of its own neighbours: what names it is not among the rest.
        self._near = {
            name: self._all.index[~named & ((self._all["object"] == name) | (self._all["style"] == name))].tolist()
            for name in dict.fromkeys(close)
        }
        self.parts: dict[int, str] = {}

    def first(self) -> pd.DataFrame:
        """The first round: a dozen of each concept's own prompts, and a few of the others to compare with."""
        if self._whole:
            known = set(range(self._whole))
            rows = dict.fromkeys([label for label in self._rest if label in known], REST)
            rows |= dict.fromkeys([label for own in self._own for label in own if label in known], OWN)
        else:
            rows = self._more_own(self._own) | dict.fromkeys(self._rest[:DOZEN], REST)
        return self._taken(rows | self._missing_near(rows, self._near, 1))

    def next(self, figures: JudgeFigures) -> pd.DataFrame | None:
        """The next round after what was seen of all so far; None once no more pictures are worth drawing."""
        if hopeless(figures, self._gate):
            return None
        needed = {name: count or 0 for name, count in least_counts(self._gate).items()}
        asked = max(needed.get(name, 0) for name in ("ua", "surrogate", "unscrambled", "base"))
        lost = lost_concepts(figures, self._gate)
        followed = [number for number in range(len(self._own)) if number + 1 not in lost]
        few = [own for number in followed if self._drawn(own := self._own[number]) < min(asked, len(own))]
        if few:
            return self._taken(self._more_own(few))
        if lost:  # no adapter that has them passes: what else is kept decides nothing any more
            rows: dict[int, str] = {}
            near = [name for number in followed if (name := self._surrogates[number]) is not None]
        else:
            rows = self._rest_to(max(needed.get(name, 0) for name in ("ira", "cra", "base")))
            near = list(self._near)
        rows |= self._missing_near(rows, near, needed.get("neighbour", 1))
        return self._taken(rows) if rows else self._unsure(figures)

    def _unsure(self, figures: JudgeFigures) -> pd.DataFrame | None:
        """A dozen of each kind that the gate is not sure of, or of the rest as many as could make it sure."""
        rows: dict[int, str] = {}
        for name in undecided(figures, self._gate):
            what, _, number = name.removeprefix("base: ").partition(" ")
            if (of := concept_of(name)) is not None:
                rows |= self._more_own([self._own[of - 1]])
                surrogate = self._surrogates[of - 1]
                # These are asked of what the base's own pictures of the surrogate reach.
                if what in ("surrogate", "unscrambled") and surrogate is not None:
                    rows |= self._more_near(surrogate, rows)
            elif what == "neighbour":
                rows |= self._more_near(self._neighbours[int(number) - 1], rows)
            else:
                rows |= self._rest_to(self._count(REST) + self._could_do(figures))
        return self._taken(rows) if rows else None

    def _more_near(self, name: str, rows: Mapping[int, str]) -> dict[int, str]:
        """A dozen more prompts of a neighbour or a surrogate."""
        new = [label for label in self._near[name] if label not in self.parts and label not in rows]
        return dict.fromkeys(new[:DOZEN], NEAR)

    def _could_do(self, figures: JudgeFigures) -> int:
        """How many more of the rest would do if none of them changed sides: a dozen at least, ``round`` at most."""
        sure, paired = self._gate.sure, figures.paired
        if sure is None:
            return DOZEN
        asked = ((paired.ira, sure.ira_loss), (paired.cra, sure.cra_loss))
        wanted = max(DOZEN, *(_more(pairs, most, sure.error_rate) for pairs, most in asked))
        return min(wanted, DOZEN * sure.round)

    def _count(self, part: str) -> int:
        return sum(one == part for one in self.parts.values())

    def _drawn(self, labels: Sequence[int]) -> int:
        return sum(label in self.parts for label in labels)

    def _more_own(self, some: Sequence[Sequence[int]]) -> dict[int, str]:
        """A dozen more of the prompts of each of these concepts."""
        new = [[label for label in own if label not in self.parts][:DOZEN] for own in some]
        return dict.fromkeys([label for own in new for label in own], OWN)

    def _rest_to(self, count: int) -> dict[int, str]:
        """The rest as far as ``count`` of them; what was drawn already for a neighbour's sake is then of the rest."""
        new = [label for label in self._rest[:count] if self.parts.get(label) != REST]
        return dict.fromkeys(new, REST)

    def _missing_near(self, rows: Mapping[int, str], names: Iterable[str], count: int) -> dict[int, str]:
        """Further prompts of each of these neighbours and surrogates of which there would be fewer than ``count``."""
        found: dict[int, str] = {}
        for mine in (self._near[name] for name in dict.fromkeys(names)):
            new = [label for label in mine if not {label} & (self.parts.keys() | rows.keys() | found.keys())]
            found |= dict.fromkeys(new[: max(count - (len(mine) - len(new)), 0)], NEAR)
        return found

    def _taken(self, rows: Mapping[int, str]) -> pd.DataFrame:
        """Those of these rows that were not drawn yet, in the protocol's order, labelled by their place in it.

        There may be none, where rows only changed their kind: the figures are then others all the same.
        """
        labels = sorted(label for label in rows if label not in self.parts)
        self.parts |= rows
        return self._all.loc[labels]


def _more(paired: Paired, most: float, error: float) -> int:
    """How many more pictures none of which changes sides make the loss surely at most ``most``; 0 if none would."""
    needed = least(
        lambda n: n >= paired.count and loss_bounds(paired.lost, paired.gained, n, error)[1] <= most,
    )
    return 0 if needed is None else max(needed - paired.count, 0)


def _spread(rest: pd.DataFrame) -> list[int]:
    """Labels by seed, and in each by diagonals of objects and styles: each of these holds every object, or style."""
    places = {domain: {name: i for i, name in enumerate(pd.unique(rest[domain]))} for domain in ("object", "style")}
    rows, columns = (rest[domain].map(places[domain]).to_numpy() for domain in ("object", "style"))
    if len(places["object"]) < len(places["style"]):
        rows, columns = columns, rows
    diagonal = (columns - rows) % max(min(map(len, places.values())), 1)
    seeds = rest["seed"].map({seed: i for i, seed in enumerate(pd.unique(rest["seed"]))}).to_numpy()
    return rest.index[np.lexsort((rows, diagonal, seeds))].tolist()
