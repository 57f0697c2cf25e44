from __future__ import annotations

from pathlib import Path

import pytest

from fade.steps.catalog import build_catalog
from tests.unit.models.erasing import Bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog") / "canvas"
    build_catalog(folder, params={"seed": 3, "train_per_pair": 1, "holdout_per_pair": 1})
    return folder
