"""A training that cannot change anything, or breaks off, is refused: no adapter that is the base is registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fade.errors import DataError
from fade.methods.fade.distillation import DistillStep
from fade.methods.fade.training import check_losses
from fade.models.families.stable_diffusion import StableDiffusion
from fade.spec import Spec, make_spec, save_spec
from fade.steps.adapter import check_changes, make_adapter
from fade.steps.encoded import check_told_apart
from fade.steps.saliency import saliency


def _asked(folder: Path, *also: tuple[str, str]) -> Spec:
    """Two captions of each concept, paired with its surrogate's."""
    pairs = [("cat", "horse"), *also]
    spec = make_spec(
        **{"concept": "cat", "kind": "object", "surrogate": "horse", "base": "b", "base_sha256": "0" * 64},
        **{"catalog": "c", "judges": "j"},
        also=[{"concept": concept, "kind": "object", "surrogate": surrogate} for concept, surrogate in also],
    )
    rows = [
        {"object": concept, "style": "neon", "caption": said.format(concept), "surrogate_caption": said.format(instead)}
        for concept, instead in pairs
        for said in ("a {} image in neon style.", "a neon picture of a {}")
    ]
    save_spec(spec, folder)
    (folder / "splits").mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "splits/forget.parquet")
    return spec


def _blind(base: StableDiffusion, name: str, other: str) -> None:
    """The encoder no longer tells two words apart."""
    one, two = (base.pipeline.tokenizer(word, add_special_tokens=False).input_ids for word in (name, other))
    assert len(one) == len(two) == 1
    with torch.no_grad():
        weight = base.pipeline.text_encoder.get_input_embeddings().weight
        weight[one[0]] = weight[two[0]]


def test_captions_that_read_as_their_targets_are_refused(base: StableDiffusion, tmp_path: Path) -> None:
    request = _asked(tmp_path, ("dog", "coffee"))
    check_told_apart(base, request, tmp_path)  # told apart so far
    _blind(base, "cat", "horse")
    with pytest.raises(DataError, match="reads all 2 captions of concept 1 as it reads their targets"):
        check_told_apart(base, request, tmp_path)
    with pytest.raises(DataError, match="captions of the concept as"):
        check_told_apart(base, _asked(tmp_path), tmp_path)


@pytest.mark.parametrize("step", [saliency, lambda folder: list(make_adapter(folder))])
def test_that_is_found_before_anything_is_trained(
    base: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: Callable[[Path], Any]
) -> None:
    _asked(tmp_path)
    _blind(base, "cat", "horse")
    for module in ("saliency", "adapter"):
        monkeypatch.setattr(f"fade.steps.{module}.load_base", lambda *_, **__: base)
    with pytest.raises(DataError, match="nothing to overwrite"):
        step(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spec.yaml", "splits"]


def test_one_caption_that_reads_alike_is_said_and_stops_nothing(
    base: StableDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = _asked(tmp_path)
    table = pd.read_parquet(tmp_path / "splits/forget.parquet")
    table.loc[0, "surrogate_caption"] = table.loc[0, "caption"]
    table.to_parquet(tmp_path / "splits/forget.parquet")
    check_told_apart(base, request, tmp_path)
    assert caplog.messages == ["1 of 2 captions of concept 1 read as their targets do"]


def _step(number: int, forget: float, retain: float = 0.1, norm: float = 1.0) -> DistillStep:
    return DistillStep(number, torch.tensor([forget, retain]), torch.tensor(norm))


def test_a_training_that_goes_nowhere_is_refused() -> None:
    check_losses([_step(1, 0.0), _step(2, 0.2)], ended=True)
    check_losses([_step(1, 0.0)])  # it goes on
    with pytest.raises(DataError, match="loss was 0 in all 2 steps"):
        check_losses([_step(1, 0.0), _step(2, 0.0)], ended=True)
    for broken in (_step(7, float("nan")), _step(7, 0.1, retain=float("inf")), _step(7, 0.1, norm=float("nan"))):
        with pytest.raises(DataError, match=r"broke off in step 7.*must be finite"):
            check_losses([_step(1, 0.2), broken])


@pytest.mark.parametrize("changing", ["unet.a.lora_B.weight", "unet.a.values"])
def test_an_adapter_of_zeros_is_not_saved(changing: str) -> None:
    others = {"unet.a.lora_A.weight": torch.ones(2), "unet.a.positions": torch.ones(2, dtype=torch.int32)}
    check_changes({**others, changing: torch.tensor([0.0, 0.5])})
    for nothing in (torch.zeros(2), torch.full((2,), 1e-9)):  # the second is 0 in float16
        with pytest.raises(DataError, match="changes no weight"):
            check_changes({**others, changing: nothing})
