"""Step ``mask``: the modules that may change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd

from fade.config import load_request
from fade.files import write_json
from fade.method.masks import module_mask


def mask(folder: Path) -> dict[str, Any]:
    """Write ``mask.json``: granularity, density and the modules kept."""
    settings = load_request(folder).mask
    table = pd.read_parquet(folder / "saliency.parquet")
    modules = module_mask(dict(zip(table["module"], table["saliency"], strict=True)), settings.density)
    content = {
        "granularity": settings.granularity,
        "density": settings.density,
        "modules": list(modules),
        "modules_total": len(table),
    }
    write_json(folder / "mask.json", content)
    return content


def main() -> None:
    """Run the step for one erasure's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    mask(parser.parse_args().folder)


if __name__ == "__main__":
    main()
