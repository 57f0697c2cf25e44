"""Published methods against a property of their paper each, on a tiny base; and as adapters like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fade.adapters.card import load_card
from fade.adapters.store import activate, apply_adapter, restore_base
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import ConfigError, NoMatchingModulesError
from fade.files import read_json
from fade.lineage import ROOT
from fade.methods import salun as salun_file
from fade.methods.concept_ablation import ConceptAblationSettings, ablation_losses, concept_ablation
from fade.methods.edits import solve
from fade.methods.esd import EsdSettings, esd
from fade.methods.fade.sparse_lora import adapter_tensors, adapters_disabled
from fade.methods.method import STUDENT, Material
from fade.methods.negative_guidance import negative_target
from fade.methods.rece import ReceSettings, derived, rece
from fade.methods.registry import METHODS, NAMES, PRESETS, asking_for, find_method, method_code, steps_of
from fade.methods.salun import SalunSettings, salient, salun
from fade.methods.trained_difference import (
    Losses,
    modules_of,
    noised,
    trained_difference,
)
from fade.methods.uce import UceSettings, uce
from fade.models.deltas import delta_weights, plain_modules
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion, UNet
from fade.models.family import load_base
from fade.spec import load_spec, save_spec
from fade.steps.adapter import make_adapter
from fade.studies.trial import figures, run_trial
from tests.tiny import PROJECT


def _changed(base: StableDiffusion) -> set[str]:
    return {
        name
        for name, delta in delta_weights(base.network).items()
        if STUDENT in delta.parts and bool(delta.parts[STUDENT]().any())
    }


def test_esds_target_is_the_frozen_teachers_opposite(base: StableDiffusion, material: Material) -> None:
    noisy, timestep = torch.randn(4, *base.denoiser.latent_shape), torch.tensor(600)
    with torch.no_grad():
        without = base.denoiser.predict(noisy, timestep, base.unconditional().expand(4))
        named = base.denoiser.predict(noisy, timestep, material.concept)
    assert (without - named).abs().max() > 1e-4
    list(esd(base, material, EsdSettings(steps=2, batch=2, learning_rate=1e-2), part="x", precision="fp32", seed=1))
    with torch.no_grad():
        assert not torch.equal(base.denoiser.predict(noisy, timestep, material.concept), named)  # the student has moved
    for eta in (1.0, 3.0):
        found = negative_target(base, noisy, timestep, material.concept, eta=eta, precision="fp32")
        torch.testing.assert_close(found, without - eta * (named - without), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("part", "in_cross_attention"), [("x", True), ("u", False)])
def test_esd_x_moves_the_cross_attention_alone_and_esd_u_the_rest(
    base: StableDiffusion, material: Material, part: Any, in_cross_attention: bool
) -> None:
    steps = list(esd(base, material, EsdSettings(steps=3, batch=2), part=part, precision="fp32", seed=1))
    assert [step.step for step in steps] == [1, 2, 3]
    changed = _changed(base)
    assert changed
    assert all(bool(UNet.patterns["text_attention"].search(name)) == in_cross_attention for name in changed)


def test_uce_is_what_numpy_solves(base: StableDiffusion, material: Material) -> None:
    generator = np.random.default_rng(4)
    weight, c, s, r = (generator.normal(size=shape) for shape in ((5, 8), (11, 8), (11, 8), (30, 8)))
    settings = UceSettings(erase_scale=0.7, preserve_scale=2.0, damping=0.3)
    # The same least squares from its own equations, stacked: W c = W* s, W r = W* r, W = W*.
    left = np.concatenate([np.sqrt(0.7) * c, np.sqrt(2.0) * r, np.sqrt(0.3) * np.eye(8)])
    right = np.concatenate([np.sqrt(0.7) * s @ weight.T, np.sqrt(2.0) * r @ weight.T, np.sqrt(0.3) * weight.T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.abs(expected - weight).max() > 0.01
    found = solve(*(torch.from_numpy(x) for x in (weight, c, s, r)), settings)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_uce_sends_the_concept_and_keeps_preserved_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, basis = torch.randn(5, 8, generator=generator).double(), torch.eye(8).double()
    c, s, r = basis[:2], basis[2:4], basis[4:]  # orthogonal to each other
    found = solve(weight, c, s, r, UceSettings(damping=1e-9))
    torch.testing.assert_close(found @ c.T, weight @ s.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found @ r.T, weight @ r.T, rtol=1e-6, atol=1e-6)


def test_uce_moves_keys_and_values_alone(base: StableDiffusion, material: Material) -> None:
    (step,) = uce(base, material, UceSettings(), precision="fp32", seed=1)
    assert step.forget_loss > 0
    assert _changed(base) == set(modules_of(base.denoiser, "cross_attention"))


def test_concept_ablation_moves_the_concept_to_the_anchor_and_not_back(
    base: StableDiffusion, material: Material
) -> None:
    parameters = list(trained_difference(base.network, modules_of(base.denoiser, "cross_attention")).values())
    rows = torch.arange(4)
    noisy, timesteps, noise = noised(material.anchor, base.denoiser.path, torch.Generator().manual_seed(1), base.device)
    drawn = material.anchor, noisy, timesteps, noise
    forget, kept = ablation_losses(
        base, drawn, material.anchor_concept[rows], material.anchor_surrogate, precision="fp32"
    )
    assert forget > 0
    # With the gradient stopped it is that of the distance to a constant.
    (mine,) = torch.autograd.grad(forget, parameters[:1], retain_graph=True)
    constant = base.denoiser.predict(noisy, timesteps, material.anchor_surrogate).detach()
    plain = (constant - base.denoiser.predict(noisy, timesteps, material.anchor_concept)).square().mean()
    (expected,) = torch.autograd.grad(plain, parameters[:1])
    both = base.denoiser.predict(noisy, timesteps, material.anchor_surrogate) - base.denoiser.predict(
        noisy, timesteps, material.anchor_concept
    )
    (unstopped,) = torch.autograd.grad(both.square().mean(), parameters[:1])
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(mine, unstopped, rtol=1e-2, atol=1e-8)
    # The second term trains the anchor.
    (of_anchor,) = torch.autograd.grad(kept, parameters[:1])
    assert of_anchor.abs().max() > 0


def test_concept_ablation_brings_the_two_captions_together(base: StableDiffusion, material: Material) -> None:
    noisy, timesteps, _ = noised(material.anchor, base.denoiser.path, torch.Generator().manual_seed(9), base.device)

    @torch.no_grad()
    def apart() -> float:
        answers = [base.denoiser.predict(noisy, timesteps, told) for told in (material.concept, material.surrogate)]
        return float((answers[0] - answers[1]).square().mean())

    before = apart()
    settings = ConceptAblationSettings(steps=15, batch=4, learning_rate=5e-3, regularisation=0.01)
    list(concept_ablation(base, material, settings, precision="fp32", seed=1))
    assert 0 < apart() < 0.8 * before
    assert _changed(base) <= set(modules_of(base.denoiser, "cross_attention"))


def test_salun_changes_only_the_masked_weights(
    base: StableDiffusion, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: dict[str, Tensor] = {}

    def kept(*given: Any) -> dict[str, Tensor]:
        masks.update(salient(*given))
        return masks

    monkeypatch.setattr(salun_file, "salient", kept)
    settings = SalunSettings(steps=3, batch=2, density=0.2, mask_batches=2)
    list(salun(base, material, settings, precision="fp32", seed=1))
    assert set(masks) == set(plain_modules(base.network))
    moved = 0
    for name, delta in delta_weights(base.network).items():
        change = delta.parts[STUDENT]().detach()
        assert not change[masks[name] == 0].any(), name
        moved += int((change != 0).sum())
    assert moved > 0.5 * sum(float(mask.sum()) for mask in masks.values())


def test_the_salient_half_is_the_larger_half() -> None:
    gradients = {"a": torch.tensor([[3.0, 0.0], [1.0, 1.0]]), "b": torch.tensor([1.0, 9.0])}
    found = salient(gradients, 0.5)
    assert found["a"].tolist() == [[1, 0], [1, 0]]  # of equal ones the first
    assert found["b"].tolist() == [0, 1]
    with pytest.raises(ConfigError, match=r"got 0\.0"):
        salient(gradients, 0.0)


def test_the_frozen_teacher_is_the_base_and_what_was_on_comes_back(sd: StableDiffusion, material: Material) -> None:
    noisy, timesteps = torch.randn(4, *sd.denoiser.latent_shape), torch.tensor([5, 300, 700, 900])
    with torch.no_grad():
        base = sd.denoiser.predict(noisy, timesteps, material.concept)
        list(uce(sd, material, UceSettings(), precision="fp32", seed=1))
        changed = sd.denoiser.predict(noisy, timesteps, material.concept)
        assert not torch.equal(base, changed)
        with adapters_disabled(sd.network):
            assert torch.equal(sd.denoiser.predict(noisy, timesteps, material.concept), base)
        assert torch.equal(sd.denoiser.predict(noisy, timesteps, material.concept), changed)


def test_a_base_without_cross_attention_is_refused(base: StableDiffusion) -> None:
    with pytest.raises(NoMatchingModulesError, match="cannot be used on a base of this family"):
        modules_of(base.denoiser.on(torch.nn.Sequential(torch.nn.Linear(2, 2))), "cross_attention")


def test_settings_are_checked_by_name_type_and_range() -> None:
    assert find_method("uce").checked({"damping": 0.1}).damping == 0.1
    for method, changes, said in (
        ("uce", {"dampin": 1}, "Did you mean 'damping'"),
        ("esd-x", {"steps": 1.5}, r"esd-x\.steps.*integer.*got 1\.5"),
        ("esd-x", {"steps": 0}, "steps must be positive: got 0"),
        ("esd-x", {"steps": True}, r"esd-x\.steps.*got True"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_method(method).checked(changes)


OWN = ("fade-rounds", "fade-retained", "layerwise", "layerwise-tuned")
"""Of no paper."""
LOW_RANK = ("fade-rounds", "layerwise", "layerwise-tuned", "spm", "receler")
"""What such a method leaves is a LoRA, where the others leave a difference of whole weights."""


def test_every_name_is_found_and_is_its_methods() -> None:
    for name in METHODS:
        method = find_method(name)
        assert method.name == name
        assert method.citation.startswith("arXiv:") or name in OWN
        assert method.settings()
    assert set(NAMES) == {*METHODS, *PRESETS}


def test_a_method_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("almost_a_method.py").write_text("METHOD = 'uce'\n")
    for name, said in (
        ("uces", "Did you mean 'uce'"),
        ("no_such_module:METHOD", "cannot be imported.*no_such_module"),
        ("almost_a_method:METHOD", "is no fade.methods.method.Method: got str"),
        ("almost_a_method:OTHER", "got NoneType"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_method(name)


def test_a_name_with_its_settings_is_what_is_asked_for() -> None:
    both = {"threads": 1, "esd-x.steps": 3}
    assert asking_for(["esd-x"], both) == [{"method": "esd-x", "threads": 1, "methods.esd-x.steps": 3}]
    # Another method's settings are not its own; settings of the erasure are everybody's, and go before a preset's.
    first, second = asking_for(["fade-deep", "esd-x"], both | {"distill.depth": "name"})
    assert first == {"method": "fade", "distill.depth": "name", "threads": 1}
    assert second["methods.esd-x.steps"] == 3
    assert steps_of("esd-x", 7) == {"esd-x.steps": 7}
    assert steps_of(None, 7) == {"distill.steps": 7, "distill.deep.steps": 7}
    with pytest.raises(ConfigError, match="'ca', which is not among the methods"):
        asking_for(["uce"], {"ca.steps": 1})
    # A mask that no method of these has would be set for nothing; beside one that has it, it is that one's.
    with pytest.raises(ConfigError, match=r"mask\.density was set, and esd-x and uce trains no mask"):
        asking_for(["esd-x", "uce"], {"mask.density": 0.5})
    assert len(asking_for(["fade-deep", "uce"], {"mask.density": 0.5})) == 2


def test_a_methods_code_is_its_own_and_no_other_methods() -> None:
    for name, path in METHODS.items():
        files = {file.relative_to(ROOT).as_posix() for file in method_code(name)}
        mine = path.partition(":")[0].replace(".", "/") + ".py"
        others = {other.partition(":")[0].replace(".", "/") + ".py" for other in METHODS.values()} - {mine}
        assert mine in files
        assert not others & files


@pytest.fixture(scope="module")
def trials(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's finished trial with few steps."""
    root = tmp_path_factory.mktemp("trials")

    def make(method: str) -> Path:
        few = {f"{method}.{name}": 2 for name in ("steps", "batch", "search_steps")}
        own = {
            name: value
            for name, value in few.items()
            if name.split(".")[1] in find_method(method).settings.model_fields
        }
        settings = load_settings(Path("params.yaml"), changes=asking_for([method], own)[0])
        spec = prepare_spec("cat", "horse", project=PROJECT, settings=settings)
        run_trial(spec, root=root)
        return root / spec.id

    return make


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fade"])
def test_a_method_leaves_an_adapter_that_is_evaluated_and_taken_out_like_any(
    trials: Callable[[str], Path], method: str, workspace: Path
) -> None:
    folder = trials(method)
    card = load_card(folder / "adapter")
    assert (card["type"], card["method"]) == ("lora" if method in LOW_RANK else "delta", method)
    assert card["citation"] == find_method(method).citation
    assert card["parameters"] == load_spec(folder).methods[method]
    assert read_json(folder / "evaluation/metrics.json")["adapter_sha256"] == card["adapter_sha256"]
    base = load_base("data/base/canvas")
    before = weights_sha256(base.network)
    apply_adapter(base, folder / "adapter", name="it")
    activate(base, {"it": 1.0})
    assert weights_sha256(base.network) != before
    restore_base(base)
    assert weights_sha256(base.network) == before


def test_a_finished_trial_is_not_made_again_and_other_methods_have_other_folders(
    trials: Callable[[str], Path],
) -> None:
    folder = trials("uce")
    written = (folder / "curve.csv").stat().st_mtime_ns
    assert trials("uce") == folder
    assert (folder / "curve.csv").stat().st_mtime_ns == written
    assert trials("ca") != folder


def test_a_differences_bytes_do_not_pay_for_positions_it_does_not_need(trials: Callable[[str], Path]) -> None:
    folder = trials("uce")
    card = load_card(folder / "adapter")
    stored = sum(path.stat().st_size for path in (folder / "adapter").glob("*.safetensors"))
    assert figures(folder)["adapter_bytes"] == card["dense_bytes"] < stored


def test_what_a_method_cannot_do_is_refused_before_anything_is_made(workspace: Path, tmp_path: Path) -> None:
    settings = load_settings(Path("params.yaml"), changes={"method": "salun"})
    with pytest.raises(ConfigError, match="'salun' erases one concept: got 2"):
        prepare_spec("cat", "horse", project=PROJECT, settings=settings, also=[("coffee", "flower")])
    settings = load_settings(Path("params.yaml"), changes={"method": "uce"})
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=settings)
    assert spec.methods == {"uce": UceSettings().model_dump()}, "the spec says all settings, whatever defaults become"
    with pytest.raises(ConfigError, match="runs in one process: got 2"):
        find_method("uce").check_able(spec, processes=2)
    save_spec(spec.model_copy(update={"methods": {"uce": {"dampin": 1.0}}}), tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'damping'"):
        next(make_adapter(tmp_path))


def test_what_float16_cannot_hold_is_left_out_of_the_file(base: StableDiffusion) -> None:
    changes = trained_difference(base.network, modules_of(base.denoiser, "cross_attention")[:1])
    (change,) = changes.values()
    with torch.no_grad():
        change.view(-1)[:3] = torch.tensor([0.5, 1e-12, -0.25])
    tensors = adapter_tensors(base.denoiser, STUDENT)
    (positions,) = (tensor for key, tensor in tensors.items() if key.endswith(".positions"))
    assert positions.tolist() == [0, 2]


def test_rece_finds_the_state_that_the_edited_weights_take_for_the_concept() -> None:
    generator = np.random.default_rng(6)
    before = {name: torch.from_numpy(generator.normal(size=(5, 8))) for name in ("keys", "values")}
    after = {name: weight + torch.from_numpy(generator.normal(size=(5, 8))) for name, weight in before.items()}
    concept = torch.from_numpy(generator.normal(size=(3, 8)))
    # The same least squares, stacked: W c' = W* c over all projections, and a short c'.
    left = np.concatenate([*(weight.numpy() for weight in after.values()), np.sqrt(0.2) * np.eye(8)])
    right = np.concatenate([*(weight.numpy() @ concept.numpy().T for weight in before.values()), np.zeros((8, 3))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.abs(expected - concept.numpy()).max() > 0.1
    found = derived(before, after, concept, ridge=0.2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    # Of several concepts each one's states are found as if it were alone.
    torch.testing.assert_close(derived(before, after, concept[:1], ridge=0.2), found[:1], rtol=1e-9, atol=1e-12)


def test_each_round_of_rece_leaves_less_of_the_concept_within_reach(base: StableDiffusion, material: Material) -> None:
    steps = list(rece(base, material, ReceSettings(steps=4), precision="fp32", seed=1))
    left = [step.forget_loss for step in steps]
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert left == sorted(left)
    assert left[-1] > left[0] + 1e-4
    assert _changed(base) == set(modules_of(base.denoiser, "text_sites"))


def test_a_single_round_of_rece_is_uce(base: StableDiffusion, material: Material) -> None:
    def changes(steps: Iterator[Losses]) -> list[Tensor]:
        list(steps)
        found = [delta.parts[STUDENT]() for _, delta in sorted(delta_weights(base.network).items())]
        restore_base(base)
        return found

    one = changes(rece(base, material, ReceSettings(steps=1), precision="fp32", seed=1))
    two = changes(rece(base, material, ReceSettings(steps=2), precision="fp32", seed=1))
    plain = changes(uce(base, material, UceSettings(), precision="fp32", seed=1))
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(two, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))
