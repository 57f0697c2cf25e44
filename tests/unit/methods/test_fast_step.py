"""What makes a step fast changes no answer: summed weights against branches, a pool against fresh forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fade.adapters.store import activate
from fade.config import load_settings
from fade.errors import ConfigError
from fade.lineage import ROOT
from fade.methods.fade import distillation, sparse_lora
from fade.methods.fade.distillation import DistillStep, Sets, distill
from fade.methods.fade.masks import Mask
from fade.methods.fade.saliency import salient_parameters
from fade.methods.fade.sparse_lora import add_sparse_lora, computed_whole, lora_layers
from fade.methods.fade.targeting import power_law
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.told import Told
from tests.unit.methods.test_method import _examples

CONVS_AND_LINEARS = (
    "conv_in",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.1.resnets.0.conv1",
    "up_blocks.1.resnets.0.conv_shortcut",
)


def _moved(base: StableDiffusion, mask: Mask) -> list[Tensor]:
    """An adapter whose B is no longer zero."""
    parameters = add_sparse_lora(base.network, mask, rank=2, alpha=4.0, seed=1, name="student")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(base.network).values():
            weight = layer.lora_B["student"].weight
            weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return parameters


def _everywhere(base: StableDiffusion) -> Mask:
    names = tuple(sorted(salient_parameters(base.network)))
    return Mask("none", names, len(names), len(names))


def _answer_and_gradients(base: StableDiffusion, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    examples = _examples(3)
    answer = base.denoiser.predict(examples.latents, torch.tensor([10, 500, 900]), examples.prompts)
    loss = (answer - torch.ones_like(answer)).square().mean()
    return answer.detach(), list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("limit", [2**19, 3000], ids=["all", "small modules only"])
def test_summed_weights_are_the_branches_and_leave_no_trace(
    sd: StableDiffusion, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_lora, "WHOLE_UP_TO", limit)
    parameters = _moved(sd, _everywhere(sd))
    before, gradients = _answer_and_gradients(sd, parameters)
    with sparse_lora.adapters_disabled(sd.network):
        base = sd.denoiser.predict(_examples(3).latents, torch.tensor([10, 500, 900]), _examples(3).prompts)
    assert (before - base).abs().max() > 0.01
    with computed_whole(sd.network):
        changed = [layer for layer in lora_layers(sd.network).values() if "forward" in vars(layer)]
        whole, whole_gradients = _answer_and_gradients(sd, parameters)
        with sparse_lora.adapters_disabled(sd.network):
            teacher = sd.denoiser.predict(_examples(3).latents, torch.tensor([10, 500, 900]), _examples(3).prompts)
    assert changed
    assert (len(changed) < len(lora_layers(sd.network))) == (limit == 3000)
    torch.testing.assert_close(whole, before, rtol=1e-4, atol=1e-5)
    for mine, branch in zip(whole_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, branch, rtol=1e-3, atol=1e-6)
    assert torch.equal(teacher, base)
    assert not any("forward" in vars(layer) for layer in lora_layers(sd.network).values())
    assert torch.equal(_answer_and_gradients(sd, parameters)[0], before)


def test_summed_weights_follow_which_adapters_are_on_and_how_strongly(base: StableDiffusion) -> None:
    def answer() -> Tensor:
        examples = _examples(3)
        with torch.no_grad():
            return base.denoiser.predict(examples.latents, torch.tensor([10, 500, 900]), examples.prompts)

    everywhere = _everywhere(base)
    for name in ("one", "two"):
        for parameter in add_sparse_lora(base.network, everywhere, rank=2, alpha=2.0, seed=len(name), name=name):
            torch.nn.init.normal_(parameter, std=0.1)
    seen = []
    for on in ({"one": 1.0}, {"one": 1.0, "two": -0.5}, {"two": 2.0}, {}):
        activate(base, on)
        branches = answer()
        with computed_whole(base.network):
            torch.testing.assert_close(answer(), branches, rtol=1e-4, atol=1e-5)
        assert all((branches - other).abs().max() > 0.01 for other in seen)
        seen.append(branches)


def distill_settings(sd: StableDiffusion, **changes: Any) -> dict[str, Any]:
    """What `distill` takes, for a few steps on the tiny base."""
    return {
        "sets": Sets(_examples(6), _examples(6), _examples(6)),
        "empty": Told(torch.zeros(1, 16, 32)),
        "timesteps": power_law(1000, 0.25),
        "steps": 4,
        "batch": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "forget_weight": 1.0,
        "retain_weight": 1.0,
        "surrogate_share": 0.5,
        "empty_caption_share": 0.2,
        "precision": "fp32",
        "seed": 5,
        **changes,
    }


def _run(base: StableDiffusion, parameters: list[Tensor], **changes: Any) -> list[DistillStep]:
    return list(distill(base.denoiser, parameters, **distill_settings(base, **changes)))


def test_the_teacher_is_asked_for_the_pool_alone_and_its_answers_are_those_of_fresh_forwards(
    base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = add_sparse_lora(base.network, _everywhere(base), rank=2, alpha=2.0, seed=1, name="student")
    asked: list[int] = []
    answers = distillation._answers_of_teacher

    def counted(unet: Any, drawn: Any, part: slice, precision: str) -> Tensor:
        asked.append(len(drawn.noisy[part]))
        return answers(unet, drawn, part, precision)

    monkeypatch.setattr(distillation, "_answers_of_teacher", counted)
    _run(base, parameters)
    assert sum(asked) == 4 * 8
    asked.clear()
    seen: list[Any] = []
    draw = distillation._Batches.draw
    monkeypatch.setattr(distillation._Batches, "draw", lambda *arguments: seen.append(draw(*arguments)) or seen[-1])
    first = _run(base, parameters, pool=8)
    assert sum(asked) == 2 * 8
    # Two batches are all of the pool, each row once; the next two are the same rows again in another order.
    epochs = [torch.cat([one.noisy.flatten(1).sum(1) for one in seen[i : i + 2]]).sort().values for i in (0, 2)]
    assert len(set(epochs[0].tolist())) == 16
    assert torch.equal(*epochs)
    assert not torch.equal(seen[0].noisy, seen[2].noisy)
    for one in seen:
        with torch.no_grad():
            fresh = answers(base.denoiser, one, slice(0, 8), "fp32")
        torch.testing.assert_close(one.target, fresh, rtol=1e-4, atol=1e-5)
    assert first[0].forget_loss > 0


def test_equal_seeds_give_equal_bits_with_every_speed_up_on(tiny_base: Any) -> None:
    from fade.models.family import load_base

    found = []
    for seed in (5, 5, 6):
        base = load_base(tiny_base)
        parameters = add_sparse_lora(base.network, _everywhere(base), rank=2, alpha=2.0, seed=1, name="student")
        with computed_whole(base.network):
            _run(base, parameters, pool=8, seed=seed)
        found.append(torch.cat([one.detach().flatten() for one in parameters]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_pool_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"distill.pool is 8: expected at least distill.batch, which is 9"):
        load_settings(ROOT / "params.yaml", changes={"distill.pool": 8, "distill.batch": 9})
