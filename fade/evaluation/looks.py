"""Looks: few pictures that say whether a point of a search is good enough, and what is wrong with it if not   (ours).

A look is three parts of as many pictures: the erased concept's prompts, those of its nearest neighbours, and a spread
of the others; each against the base's own at the same prompt and seed, and the first also against the base's pictures
of the surrogate in the concept's place, which the best erasure would give. The judge ``development`` names them.

So few pictures cannot say much, and the rule asks no more of them: a share may be worse than the one it is held
against by a margin and one standard error. Where the base is never wrong that error is nothing, and no picture may
still show the concept. What is held so is a candidate, not a verdict: that is the gate's, by another judge on pictures
of other seeds.

A short look is the first part alone, where that says enough: a closed form that leaves the concept is given up after
``pictures`` of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fade.concepts import CAPTION_TEMPLATE, Concept, caption
from fade.evaluation.accuracy import DOMAINS, drift, is_mush
from fade.evaluation.records import Count, Counted, Record, Share

ERASED, SURROGATE, NEAR, REST = "erased", "surrogate", "near", "rest"
"""Parts of a look; the pictures of ``SURROGATE`` are the base's alone."""
Fault = Literal["shows", "surrogate", "mush", "near", "rest"]
SURROGATE_LEAST, MUSH_MOST, NEAR_MOST, REST_MOST = 0.95, 0.02, 0.03, 0.01
"""Margins: of the surrogate's reachable share, of mush above the base's, of what neighbours and others may lose."""


class Look(Record):
    """What a judge saw of a point.

    Attributes:
        erased: pictures of the concept's prompts: ``shown`` still called by its name, ``mush``, called ``surrogate``
            (None where no judge knows that); ``base_mush`` of the base's own at the same prompts.
        reached: the base's own pictures of the surrogate: ``reached_shown`` called by the concept's name and so on.
        near, rest: right answers that were compared with the base's; ``lost`` and ``gained`` of them. None of a short
            look.
        base_near, base_rest: right answers of the base.
        drift: RMS distance of the pictures of both to the base's, 0..1; None of a short look.
    """

    erased: Counted
    shown: Count
    mush: Count
    base_mush: Count
    surrogate: Count | None = None
    reached: Count = 0
    reached_shown: Count = 0
    reached_mush: Count = 0
    reached_surrogate: Count = 0
    near: Count
    base_near: Count
    near_lost: Count
    near_gained: Count
    rest: Count
    base_rest: Count
    rest_lost: Count
    rest_gained: Count
    drift: Share | None = None

    @property
    def whole(self) -> bool:
        """Whether the others were looked at too."""
        return self.drift is not None

    @property
    def short(self) -> bool:
        """Whether fewer pictures show the surrogate, or more are mush, than the base's own of the surrogate."""
        fewer = self.surrogate is not None and self.surrogate / self.erased < _share(
            self.reached_surrogate, self.reached
        )
        return fewer or self.mush / self.erased > _share(self.reached_mush, self.reached)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What is not as it should be, as far as these pictures can say."""
        best = _share(self.reached_shown, self.reached)
        found: list[Fault] = []
        if self.shown / self.erased > best + self._error(best):
            found.append("shows")
        if self.surrogate is not None and self.reached:
            reached = _share(self.reached_surrogate, self.reached)
            if self.surrogate / self.erased < SURROGATE_LEAST * (reached - self._error(reached)):
                found.append("surrogate")
        worst = max(_share(self.base_mush, self.erased), _share(self.reached_mush, self.reached))
        if self.mush / self.erased > worst + MUSH_MOST + self._error(worst):
            found.append("mush")
        if _lost(self.near_lost, self.near_gained, self.near) > NEAR_MOST:
            found.append("near")
        if _lost(self.rest_lost, self.rest_gained, self.rest) > REST_MOST:
            found.append("rest")
        return tuple(found)

    @property
    def score(self) -> float:
        """Harmonic mean of what was reached of the reachable, less drift; 1 at best.

        Of five shares, each at most 1: the concept gone, the surrogate shown, no mush, of what the base's own pictures
        reach of these; neighbours and others named as before. Of a short look the shares that were seen.
        """
        kept = [
            _of(1 - self.shown / self.erased, 1 - _share(self.reached_shown, self.reached)),
            _of(
                1 - self.mush / self.erased,
                1 - max(_share(self.base_mush, self.erased), _share(self.reached_mush, self.reached)),
            ),
            _of(self.base_near - self.near_lost + self.near_gained, self.base_near),
            _of(self.base_rest - self.rest_lost + self.rest_gained, self.base_rest),
        ]
        if self.surrogate is not None:
            kept.append(_of(self.surrogate / self.erased, _share(self.reached_surrogate, self.reached)))
        moved = self.drift or 0.0
        if min(kept) <= 0:
            return -moved
        return len(kept) / sum(1 / share for share in kept) - moved

    def _error(self, share: float) -> float:
        """Standard error of the difference of two such shares, of this look's pictures and of what is reachable."""
        return math.sqrt(share * (1 - share) * (1 / self.erased + 1 / max(self.reached, 1)))


def _share(hits: int, count: int) -> float:
    return hits / count if count else 0.0


def _of(reached: float, reachable: float) -> float:
    return min(reached / reachable, 1.0) if reachable > 0 else 1.0


def _lost(lost: int, gained: int, count: int) -> float:
    """Least of what was lost: the share less its standard error, as changed pictures give it."""
    return (lost - gained - math.sqrt(lost + gained)) / count if count else 0.0


def look_samples(
    concept: Concept,
    surrogate: str | None,
    names: dict[str, Sequence[str]],
    near: Sequence[str],
    *,
    count: int,
    seeds: Sequence[int],
    template: str = CAPTION_TEMPLATE,
) -> pd.DataFrame:
    """The prompts and seeds of a look: part, object, style, seed, prompt.

    Args:
        surrogate: None where its pictures say nothing.
        names: of each domain, all concepts.
        near: neighbours in the concept's domain.
        count: pictures of each part; of neighbours and others fewer where there are not so many.
        seeds: taken in turn; no picture is drawn twice where they are as many as the pictures of a part.
    """
    kind, other = concept.kind, "style" if concept.kind == "object" else "object"
    others = list(names[other])
    rest = [name for name in names[kind] if name not in {concept.name, *near}]

    def rows(part: str, own: Sequence[str]) -> list[dict[str, object]]:
        pairs = [(name, beside) for beside in others for name in own]
        found = []
        # Evenly over all pairs, each again where there are fewer pairs than pictures; the next seed for each picture.
        for i in range(count if pairs else 0):
            name, beside = pairs[i % len(pairs) if count >= len(pairs) else i * len(pairs) // count]
            pair = {kind: name, other: beside}
            found.append({"part": part, **pair, "seed": seeds[i % len(seeds)],
                          "prompt": caption(pair["object"], pair["style"], template)})  # fmt: skip
        return found

    parts = rows(ERASED, [concept.name]) + rows(NEAR, near) + rows(REST, rest)
    if surrogate is not None:
        parts += [
            {**row, "part": SURROGATE, kind: surrogate,
             "prompt": caption(*((surrogate, str(row[other])) if kind == "object" else (str(row[other]), surrogate)),
                               template)}
            for row in rows(ERASED, [concept.name])
        ]  # fmt: skip
    return pd.DataFrame(parts)


def looked(
    before: pd.DataFrame,
    after: pd.DataFrame,
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    *,
    concept: Concept,
    surrogate: str | None,
) -> Look:
    """The counts of a look.

    Args:
        before: what ``look_samples`` gives, all of it, with what the judge saw in the base's pictures (``seen_object``,
            ``seen_style``).
        after: those that are not of the surrogate, with the point's adapter, or of them the concept's alone;
            ``pictures`` are of these, before and after.
    """
    kind, seen = concept.kind, f"seen_{concept.kind}"
    was, now = before[before["part"] == ERASED], after[after["part"] == ERASED]
    best = before[before["part"] == SURROGATE]
    found: dict[str, int] = {}
    for part, domains, chosen in ((NEAR, [kind], [NEAR]), (REST, DOMAINS, [NEAR, REST])):
        rows = after["part"].isin(chosen)
        one, two = before.loc[after.index][rows], after[rows]
        right = [(np.asarray(side[f"seen_{d}"] == side[d]) for side in (one, two)) for d in domains]
        flat = [np.concatenate(sides) for sides in zip(*right, strict=True)]
        found |= {
            part: len(flat[0]),
            f"base_{part}": int(flat[0].sum()),
            f"{part}_lost": int((flat[0] & ~flat[1]).sum()),
            f"{part}_gained": int((~flat[0] & flat[1]).sum()),
        }
    kept = np.asarray(after["part"] != ERASED)
    return Look(
        erased=len(now),
        shown=int((now[seen] == concept.name).sum()),
        mush=int(is_mush(now).sum()),
        base_mush=int(is_mush(was).sum()),
        surrogate=None if surrogate is None else int((now[seen] == surrogate).sum()),
        reached=len(best),
        reached_shown=int((best[seen] == concept.name).sum()),
        reached_mush=int(is_mush(best).sum()),
        reached_surrogate=int((best[seen] == surrogate).sum()),
        drift=drift(pictures[0][kept], pictures[1][kept]) if kept.any() else None,
        **found,
    )
