"""A finished erasure that nobody had to train or judge: its adapter, figures and files as an import leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from fade.adapters.store import save_adapter
from fade.config import Gate, load_settings
from fade.evaluation.figures import JudgeFigures
from fade.evaluation.records import dump
from fade.files import write_json
from fade.models.source import base_sha256
from fade.spec import make_spec
from flows.erasing.erase import prepare_folder
from tasks.erasure import register_version
from tasks.mlflow.tracking import AdapterVersion
from tests.figures import evaluation, judged_figures

BASE = Path("data/base/canvas")


def report(ua: int, of: int) -> JudgeFigures:
    """What a judge says of an erasure that lost nothing: UA is ``ua`` of ``of``."""
    return judged_figures({"it": (of, of - ua, of)}, neighbours={})


def finished(concept: str, surrogate: str, *, ua: int = 98, of: int = 100, gate: Gate | None = None) -> Path:
    """The folder of an erasure that is ready to be registered; UA 0.98 against a gate that asks 0.9 if not told."""
    settings = load_settings(Path("params.yaml"))
    spec = make_spec(
        **{name: getattr(settings, name) for name in type(settings).model_fields if name != "gate"},
        gate=gate or Gate(ua=0.9, ira_loss=0.1, cra_loss=0.1),
        concept=concept,
        surrogate=surrogate,
        kind="object",
        imported="0" * 64,
        base=BASE.as_posix(),
        base_sha256=base_sha256(BASE),
        catalog="data/catalog/canvas",
        judges="data/judges",
    )
    folder = prepare_folder(spec)
    seed = int(spec.id[1:], 16) % 1000
    place = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{place}.lora_A.weight": torch.randn(2, 32, generator=generator),
        f"{place}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    sha256 = save_adapter(folder / "adapter", tensors, {"base_sha256": spec.base_sha256})
    metrics = evaluation(report(ua, of), gate=spec.gate, adapter_sha256=sha256, samples=of)
    dump(metrics, folder / "evaluation" / "metrics.json")
    write_json(folder / "timings.json", {})
    pd.DataFrame({"step": []}).to_csv(folder / "curve.csv")
    outs = [{"path": f"{folder.as_posix()}/adapter", "md5": "0" * 32}]
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"foreign": {"outs": outs}}}))
    return folder


def take_out_all() -> None:
    """Nothing is approved or live from here on: a file of tests may keep a ledger of its own, and the next one's
    approvals are not to wait for adapters that its ledger never heard of."""
    from flows.releasing import manifests, released
    from tasks.mlflow import tracking
    from tasks.mlflow.client import mlflow_client

    live = {released.model_of(entry) for manifest in released.released().values() for entry in manifest.adapters}
    if not live:
        return
    with mlflow_client() as client:
        for model in tracking.approved_now():
            client.delete_registered_model_alias(model, "approved")
    for model in sorted(live):
        manifests.take_out(model, actor="test")


def registered(concept: str, surrogate: str, **given: Any) -> tuple[Path, AdapterVersion]:
    folder = finished(concept, surrogate, **given)
    return folder, register_version(folder, {})
