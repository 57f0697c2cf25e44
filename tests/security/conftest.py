"""A project for the attacks on the registry, with nothing in it that takes time to make."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.tiny import SETTINGS, save_tiny_base


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty project with a tiny base; the current folder while the module's tests run."""
    folder = tmp_path_factory.mktemp("attacked") / "project"
    (folder / "data/erasures").mkdir(parents=True)
    (folder / ".fade").mkdir()
    (folder / "params.yaml").write_text(yaml.safe_dump({"erasure": SETTINGS}))
    (folder / "dvc.yaml").write_text("stages: {}\n")
    save_tiny_base(folder / "data/base/canvas")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FADE_ROOT", str(folder))
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "FADE_LEDGER_URL", "FADE_SIGNING_KEY"):
            patch.delenv(name, raising=False)
        os.chdir(folder)
        yield folder
        os.chdir(before)


@pytest.fixture(scope="module")
def mlflow(project: Path) -> MlflowClient:
    """What whoever may write to MLflow has: a client of its store."""
    uri = f"sqlite:///{(project / '.fade/mlflow.db').resolve()}"
    return MlflowClient(uri, uri)
