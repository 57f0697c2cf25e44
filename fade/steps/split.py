"""Step ``split``: the forget, surrogate, retain and holdout sets of one erasure, as parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

from fade.config import load_request
from fade.data.catalog import load_catalog, load_concepts
from fade.data.splits import find_pairs, make_splits
from fade.files import writing


def split(folder: Path) -> dict[str, int]:
    """Write ``splits/<name>.parquet``; give the number of rows of each.

    Raises:
        DataError: the catalog is missing, or has no pictures to forget or to keep.
        ConfigError: the concept or the surrogate is not in the catalog.
    """
    request = load_request(folder)
    catalog = Path(request.catalog)
    concepts = load_concepts(catalog)
    settings = request.split
    splits = make_splits(
        load_catalog(catalog),
        find_pairs(concepts, [(pair.concept, pair.surrogate) for pair in request.pairs]),
        forget_per_pair=settings.forget_per_pair,
        retain_per_pair=settings.retain_per_pair,
        holdout_per_pair=settings.holdout_per_pair,
        seed=settings.seed,
    )
    with writing(folder / "splits") as temporary:
        temporary.mkdir(parents=True)
        for name, table in splits.items():
            table.to_parquet(temporary / f"{name}.parquet", index=False)
    return {name: len(table) for name, table in splits.items()}


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    split(parser.parse_args().folder)


if __name__ == "__main__":
    main()
