"""The command line of stages that erasures share: ``python -m fade.steps.NAME --out FOLDER [--params params.yaml]``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fade.files import read_yaml


def stage_arguments(description: str | None, section: str, *folders: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """Read a stage's options.

    Args:
        section: of the parameter file, with the stage's parameters.
        folders: names of required options, each a folder.

    Returns:
        The stage's parameters, and the folders by name.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the parameter file")
    for name in folders:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FOLDER")
    given = vars(parser.parse_args())
    params: dict[str, Any] = read_yaml(given.pop("params"))[section]
    return params, given
