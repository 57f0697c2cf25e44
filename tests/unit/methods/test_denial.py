"""Denial: laws of what pictures of the concept give way to."""

from __future__ import annotations

import pytest
import torch

from fade.errors import ConfigError
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.denial import NAMED, SEARCHED, SEEN, UNNAMED, Denial, mean_pictures, seen_times
from fade.methods.fade.distillation import Sets, distill
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import add_sparse_lora
from fade.methods.fade.targeting import power_law
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.paths import DiffusionPath, FlowPath, NoisePath
from fade.models.told import Told
from fade.seeding import torch_generator

MODULES = ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.1.resnets.0.conv1")
PATHS = (
    DiffusionPath(torch.linspace(0.999, 0.005, 1000)),
    DiffusionPath(torch.linspace(0.999, 0.005, 1000), "v_prediction"),
    FlowPath(),
)


def _examples(count: int, *, seed: int = 1) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    told = [Told(torch.randn(count, 16, 32, generator=generator)) for _ in range(2)]
    return Examples(torch.randn(count, 4, 16, 16, generator=generator), *told)


def _denial(path: NoisePath, *, share: float = 0.5, strength: float = 1.0, others: int = 3) -> Denial:
    forget = _examples(6)
    return Denial(
        forget,
        torch.full_like(forget.latents, 0.25),
        others=_examples(others, seed=2).prompts,
        empty=Told(torch.zeros(1, 16, 32)),
        path=path,
        times=seen_times(path),
        share=share,
        strength=strength,
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_answer_at_full_strength_implies_the_surrogates_picture_and_at_none_the_teachers(path: NoisePath) -> None:
    pictures, towards, t = _examples(5).latents, _examples(5, seed=3).latents, torch.tensor([300, 400, 500, 600, 700])
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(4))
    noisy, teacher = path.noised(pictures, noise, t), path.target(pictures, noise, t)
    torch.testing.assert_close(path.answer(noisy, pictures, t), teacher, rtol=1e-4, atol=1e-4)
    moved = {
        strength: _denial(path, strength=strength).moved(noisy, t, teacher, towards) for strength in (0.0, 0.5, 1.0)
    }
    assert not torch.equal(moved[1.0], teacher)
    torch.testing.assert_close(moved[0.0], teacher)
    torch.testing.assert_close(path.clean(noisy, moved[1.0], t), towards, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(path.clean(noisy, moved[0.5], t), (pictures + towards) / 2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_pictures_are_denied_where_they_are_seen_through_the_noise_and_count_by_the_picture(path: NoisePath) -> None:
    times = seen_times(path)
    ratio = path.snr(times)
    assert 0 < len(times) < path.steps
    assert SEEN[0] <= ratio.min() < 1 < ratio.max() <= SEEN[1]
    weights = _denial(path).weights(times)
    torch.testing.assert_close(weights, (1 / ratio).clamp(max=1))
    assert weights.min() < 1 == weights.max()


def test_noise_that_never_shows_a_picture_is_refused() -> None:
    with pytest.raises(ConfigError, match="deny_share"):
        seen_times(DiffusionPath(torch.full((10,), 0.01)))


def test_a_target_is_the_mean_of_the_surrogates_pictures_of_that_caption() -> None:
    surrogate = _examples(4, seed=5)
    captions = surrogate.targets.states[[0, 0, 1, 2]]
    surrogate = Examples(surrogate.latents, surrogate.prompts, Told(captions))
    forget = Examples(
        _examples(3).latents, _examples(3).prompts, Told(torch.stack([captions[0], captions[2], captions[0] + 1]))
    )
    found = mean_pictures(forget, surrogate)
    torch.testing.assert_close(found[0], surrogate.latents[:2].mean(0))
    torch.testing.assert_close(found[1], surrogate.latents[2])
    torch.testing.assert_close(found[2], surrogate.latents.mean(0))  # nobody has that caption


def test_denied_pictures_are_told_name_searched_states_nothing_and_others() -> None:
    denial, known = _denial(PATHS[0]), _examples(7, seed=6).prompts
    drawn, times, towards = denial.drawn(4000, known, torch_generator(1, "test"))
    assert towards.shape == drawn.latents.shape
    assert torch.isin(times, denial.times).all()
    own = {row.numpy().tobytes() for row in denial.pictures.prompts.states}
    rest = {row.numpy().tobytes() for row in known.states}, {row.numpy().tobytes() for row in denial.empty.states}
    others = {row.numpy().tobytes() for row in denial.others.states}
    said = [row.numpy().tobytes() for row in drawn.prompts.states]
    shares = (NAMED, SEARCHED, UNNAMED, 1 - NAMED - SEARCHED - UNNAMED)
    for group, share in zip((own, *rest, others), shares, strict=True):
        assert abs(sum(one in group for one in said) / len(said) - share) < 0.03
    targets = {row.numpy().tobytes() for row in denial.pictures.targets.states}
    assert all(row.numpy().tobytes() in targets for row in drawn.targets.states)


def test_training_with_denial_moves_otherwise_and_does_not_depend_on_the_micro_batch(base: StableDiffusion) -> None:
    """Rows of a batch go through the network in parts of any size: the denied ones lie across two of them."""

    def trained(deny: bool, micro_batch: int | None = None) -> list[float]:
        mask = Mask("module", MODULES, 2, 2)
        parameters = add_sparse_lora(base.network, mask, rank=2, alpha=2.0, seed=1, name="student")
        examples, empty = _examples(6), base.encode_prompts([""])
        adversary = Adversary(
            examples.latents,
            starts=examples.prompts,
            empty=empty,
            states=2,
            lifetime=4,
            batch=4,
            learning_rate=0.05,
            size=4,
            share=0.5,
            empty_share=0.1,
            retain_share=0.0,
            precision="fp32",
            device=base.device,
            seed=1,
        )
        steps = distill(
            base.denoiser,
            parameters,
            sets=Sets(examples, _examples(6, seed=7), _examples(6, seed=8)),
            empty=empty,
            timesteps=power_law(1000, 0.25),
            steps=3,
            batch=4,
            learning_rate=1e-3,
            weight_decay=0.0,
            clip_norm=1.0,
            forget_weight=1.0,
            retain_weight=1.0,
            surrogate_share=0.5,
            empty_caption_share=0.1,
            precision="fp32",
            seed=1,
            micro_batch=micro_batch,
            adversary=adversary,
            denial=_denial(base.denoiser.path) if deny else None,
        )
        losses = [step.forget_loss for step in steps]
        base.network.delete_adapters("student")
        return losses

    with_denial = trained(True)
    assert max(abs(one - other) for one, other in zip(with_denial, trained(False), strict=True)) > 1e-3
    assert trained(True, micro_batch=3) == pytest.approx(with_denial, rel=1e-4)
