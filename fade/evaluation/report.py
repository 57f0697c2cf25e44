"""Pictures of an erasure: before and after at equal seeds, with labels a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from fade.concepts import Concept
from fade.sheets import labelled_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def before_after_sheet(
    samples: pd.DataFrame,
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    concept: Concept,
    shown: Sequence[str],
    *,
    seed: int,
) -> Image.Image:
    """The concept and some others, before and after, over all concepts of the other domain.

    Args:
        samples: the protocol's rows, in the order of the pictures.
        shown: which concepts of the erased one's domain get a pair of rows; left out are those that were not drawn
            beside all of the concept's own.
    """
    other = "style" if concept.kind == "object" else "object"
    at = {(row[concept.kind], row[other]): i for i, row in enumerate(samples.to_dict("records")) if row["seed"] == seed}
    columns = [name for name in dict.fromkeys(samples[other]) if (concept.name, name) in at]
    rows = []
    for name in (name for name in shown if all((name, column) in at for column in columns)):
        rows.append((f"{name}, before", [before[at[name, column]] for column in columns]))
        rows.append((f"{name}, after", [after[at[name, column]] for column in columns]))
    return labelled_sheet(rows, columns, title=f"Erased: {concept.name}. Equal prompts and seeds (seed {seed}).")


def erasure_sheet(
    samples: pd.DataFrame,
    before: NDArray[np.uint8],
    after: NDArray[np.uint8],
    pairs: Sequence[tuple[Concept, Concept | None]],
    neighbours: Sequence[str],
    *,
    seed: int,
) -> Image.Image:
    """Before and after of what is erased, its surrogates and its neighbours; a part for each domain."""
    parts = []
    for kind in dict.fromkeys(concept.kind for concept, _ in pairs):
        here = [(concept, surrogate) for concept, surrogate in pairs if concept.kind == kind]
        names = [*(c.name for c, _ in here), *(s.name for _, s in here if s is not None), *neighbours]
        shown = list(dict.fromkeys(names))[: max(5, len(here) + 2)]
        parts.append(before_after_sheet(samples, before, after, here[0][0], shown, seed=seed))
    if len(parts) == 1:
        return parts[0]
    page = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def loss_figure(curve: pd.DataFrame) -> Figure:
    """Forget and retain loss over the steps, logarithmic, each with its running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("forget_loss", "#b00020"), ("retain_loss", "#1b5e9c")):
        axes.plot(curve["step"], curve[name], color=colour, alpha=0.25)
        axes.plot(
            curve["step"], curve[name].rolling(20, min_periods=1).mean(), color=colour, label=name.replace("_", " ")
        )
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.legend(frameon=False)
    return figure
