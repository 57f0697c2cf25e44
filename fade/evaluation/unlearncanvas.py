"""The UnlearnCanvas protocol as published (arXiv:2402.11846 and its repository at 920cfd1).

51 "themes" x 20 objects x 5 seeds, prompt ``A {object} image in {style} style.`` with underscores as blanks, DDIM,
100 steps, guidance 9 (7.5 for two of the published methods), 512 px. Each picture's noise is drawn from its own seed
here, so that shards and resumed runs give the same pictures; the published script for ESD seeds once for all 1020
pictures of a seed. The 51st theme is ``Seed_Images``, the
photographs' folder: the published scripts ask for it as if it were a style and count it in the retained styles. That
is reproduced, and can be switched off.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from fade.errors import ConfigError, DataError, listing, nearest
from fade.evaluation.figures import Rate, rate
from fade.evaluation.measured import ClipScores, FeatureDistances
from fade.evaluation.records import Count, Record

SEED_IMAGES = "Seed_Images"
STYLES = tuple(
    [
        "Abstractionism",
        "Artist_Sketch",
        "Blossom_Season",
        "Bricks",
        "Byzantine",
        "Cartoon",
        "Cold_Warm",
        "Color_Fantasy",
        "Comic_Etch",
        "Crayon",
        "Cubism",
        "Dadaism",
        "Dapple",
        "Defoliation",
        "Early_Autumn",
        "Expressionism",
        "Fauvism",
        "French",
        "Glowing_Sunset",
        "Gorgeous_Love",
        "Greenfield",
        "Impressionism",
        "Ink_Art",
        "Joy",
        "Liquid_Dreams",
        "Magic_Cube",
        "Meta_Physics",
        "Meteor_Shower",
        "Monet",
        "Mosaic",
        "Neon_Lines",
        "On_Fire",
        "Pastel",
        "Pencil_Drawing",
        "Picasso",
        "Pop_Art",
        "Red_Blue_Ink",
        "Rust",
        "Seed_Images",
        "Sketch",
        "Sponge_Dabbed",
        "Structuralism",
        "Superstring",
        "Surrealism",
        "Ukiyoe",
        "Van_Gogh",
        "Vibrant_Flow",
        "Warm_Love",
        "Warm_Smear",
        "Watercolor",
        "Winter",
    ]
)
"""In the order of the published classifier's outputs."""
OBJECTS = tuple(
    [
        "Architectures",
        "Bears",
        "Birds",
        "Butterfly",
        "Cats",
        "Dogs",
        "Fishes",
        "Flame",
        "Flowers",
        "Frogs",
        "Horses",
        "Human",
        "Jellyfish",
        "Rabbits",
        "Sandwiches",
        "Sea",
        "Statues",
        "Towers",
        "Trees",
        "Waterfalls",
    ]
)
SEEDS = (188, 288, 588, 688, 888)
TEMPLATE = "A {object} image in {style} style."
STEPS, GUIDANCE = 100, 9.0


class PublishedRates(Record):
    """UA, IRA and CRA as published.

    Attributes:
        seed_images: whether the theme Seed_Images counts, as in the published scripts.
    """

    ua: Rate
    ira: Rate
    cra: Rate
    target: str
    kind: str
    seed_images: bool
    pictures: Count

    @property
    def rates(self) -> dict[str, Rate]:
        """UA, IRA and CRA by their short names."""
        return {"ua": self.ua, "ira": self.ira, "cra": self.cra}


class MadeWith(Record):
    """What a folder's pictures are made with; ``adapter`` is its hash, None for the base alone."""

    base_sha256: str
    adapter: str | None = None
    target: str
    steps: Count
    guidance: float


class UnlearnCanvas(PublishedRates):
    """The benchmark's ``metrics.json``.

    Attributes:
        features: distances to ``real_pictures`` of the data set.
    """

    made_with: MadeWith
    features: FeatureDistances | None = None
    real_pictures: Count | None = None
    clip: ClipScores | None = None

    def distances(self) -> dict[str, float]:
        """Every distance and score by the name that tables have for it."""
        given = [part.flat() for part in (self.features, self.clip) if part is not None]
        return {name: value for part in given for name, value in part.items()}


def unlearncanvas_protocol(
    styles: Sequence[str] = STYLES, objects: Sequence[str] = OBJECTS, seeds: Sequence[int] = SEEDS
) -> pd.DataFrame:
    """One row a picture: style, object, seed, prompt, file (the published name)."""
    rows = [
        {
            "style": style,
            "object": thing,
            "seed": seed,
            "prompt": TEMPLATE.format(object=thing, style=style.replace("_", " ")),
            "file": f"{style}_{thing}_seed{seed}.jpg",
        }
        for seed in seeds
        for style in styles
        for thing in objects
    ]
    return pd.DataFrame(rows)


def kind_of_target(target: str, styles: Sequence[str] = STYLES, objects: Sequence[str] = OBJECTS) -> str:
    """``style`` or ``object``.

    Raises:
        ConfigError: the benchmark has no such concept; or it is ``Seed_Images``, which is none.
    """
    if target == SEED_IMAGES:
        raise ConfigError(f"{SEED_IMAGES} is the folder of the photographs, no style to erase. Name another target.")
    if target not in (*styles, *objects):
        raise ConfigError(f"UnlearnCanvas has no concept {target!r}. {nearest(target, (*styles, *objects))}")
    return "style" if target in styles else "object"


def unlearncanvas_figures(samples: pd.DataFrame, target: str, *, seed_images: bool = True) -> PublishedRates:
    """UA, IRA and CRA as published, each a rate with its Wilson interval.

    UA = 1 - accuracy on the target's prompts; IRA = accuracy of its own domain on prompts of the other concepts of
    it; CRA = accuracy of the other domain *over all prompts*, the target's included, as the published scripts count.

    Args:
        samples: the protocol with ``seen_style`` and ``seen_object``, what the classifiers said.
        seed_images: count the theme Seed_Images in IRA (and its prompts in CRA), as published; False leaves every
            prompt of it out.

    Raises:
        ConfigError: no such target.
        DataError: a column is missing.
    """
    if missing := sorted({"style", "object", "seen_style", "seen_object"} - set(samples)):
        raise DataError(f"The samples lack {listing(missing)}: judge the pictures first.")
    kind = kind_of_target(target, tuple(samples["style"].unique()), tuple(samples["object"].unique()))
    other = "object" if kind == "style" else "style"
    counted = samples if seed_images else samples[samples["style"] != SEED_IMAGES]
    named = counted[kind] == target
    right = {domain: counted[f"seen_{domain}"] == counted[domain] for domain in (kind, other)}
    return PublishedRates(
        ua=rate(int((~right[kind][named]).sum()), int(named.sum())),
        ira=rate(int(right[kind][~named].sum()), int((~named).sum())),
        cra=rate(int(right[other].sum()), len(counted)),
        target=target,
        kind=kind,
        seed_images=seed_images,
        pictures=len(counted),
    )
