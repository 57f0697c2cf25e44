"""A small Stable Diffusion 3 from scratch: the same bytes cut off or not, and what stock diffusers makes of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from fade.concepts import caption_variants
from fade.errors import DataError
from fade.methods.closed_form import Moments, closed_form, text_moments
from fade.methods.fade.masks import Mask
from fade.models.family import load_base
from fade.models.generate import first_latents, generate_batch
from fade.models.joint_attention import CountedJointAttention
from fade.models.told import Told
from fade.models.training import flow, loop
from tests.tiny import save_tiny_base

FLOW: dict[str, Any] = {
    **{"seed": 7, "width": 32, "heads": 2, "layers": 2, "text_width": 32, "text_layers": 2},
    **{"steps": 6, "batch": 4, "learning_rate": 1e-3, "ema_decay": 0.9},
    **{"time_mean": 0.4, "time_spread": 1.2, "shift": 1.5},
}
CAPTIONS = [caption_variants("cat", "neon"), caption_variants("horse", "oil")] * 4


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("like") / "base"
    save_tiny_base(folder, names=(("cat", "horse"), ("neon", "oil")))
    return folder


def _pixels(size: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (8, size, size, 3), dtype=np.uint8)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_gives_the_same_bytes_cut_off_or_not(
    like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "CHECKPOINT_EVERY", 2)

    def steps(name: str, **changes: Any) -> Any:
        return flow.train_flow_base(_pixels(), CAPTIONS, tmp_path / name, like=like, params=FLOW | changes)

    assert [step.step for step in steps("through")] == [1, 2, 3, 4, 5, 6]
    list(steps("other", seed=8))
    assert len(list(islice(steps("cut"), 5))) == 5  # killed there
    assert not (tmp_path / "cut").exists()
    assert [step.step for step in steps("cut")] == [5, 6]
    through = _bytes(tmp_path / "through")
    assert through == _bytes(tmp_path / "cut") != _bytes(tmp_path / "other")
    assert loop.CHECKPOINT_EVERY > 2
    assert not list(tmp_path.glob(".*"))
    for part in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):  # taken over as they are
        assert through[part] == (like / part).read_bytes()
    assert through["tokenizer_2/tokenizer.json"] == (like / "tokenizer/tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def trained(like: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "flow"
    for _ in flow.train_flow_base(_pixels(), CAPTIONS, folder, like=like, params=FLOW):
        pass
    return folder


def test_stock_diffusers_loads_it_and_draws_what_our_sampler_draws(trained: Path) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(trained, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    base = load_base(trained)
    prompts, seeds = ["a cat image in neon style.", "a horse image in oil style."], [188, 288]
    given: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    theirs = stock(prompts, latents=first_latents(seeds, base.denoiser.latent_shape), **given).images
    ours = generate_batch(base, prompts, seeds, steps=3, guidance=4.0, solver="ddim")
    assert np.abs(ours[0].astype(int) - ours[1].astype(int)).max() > 5
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


def test_the_closed_form_sends_the_name_to_its_surrogate_also_where_the_pooled_state_enters(trained: Path) -> None:
    base = load_base(trained)
    (site,) = base.denoiser.pooled_sites()
    names = (*base.denoiser.text_sites(), site)
    mask = Mask("none", names, len(names), len(names))
    said = ("a {} image in neon style.", "a {} image in oil style.", "{} in oil style")
    concept, surrogate = (base.encode_prompts([one.format(name) for one in said]) for name in ("cat", "horse"))
    retain = base.encode_prompts(["", "an image in neon style", "an image in oil style"])

    def moments(read: Callable[[Told], Tensor]) -> Moments:
        return text_moments(*(read(one) for one in (concept, surrogate, retain)), retain_weight=1.0, ridge=1e-6)

    def pooled(told: Told) -> Tensor:
        return told.others["pooled"][:, None]

    text = moments(lambda told: told.states)
    assert set(closed_form(base.denoiser, text, mask, rank=8)) == set(names) - {site}
    changes = closed_form(base.denoiser, text, mask, rank=8, pooled=moments(pooled))
    assert set(changes) == set(names)
    weight = base.network.get_submodule(site).weight
    new = weight + changes[site].B @ changes[site].A
    told, wanted, kept = (pooled(one)[:, 0] for one in (concept, surrogate, retain))
    before = (told @ weight.T - wanted @ weight.T).norm()
    assert before > 0.1
    assert (told @ new.T - wanted @ weight.T).norm() < 0.1 * before
    assert (kept @ new.T - kept @ weight.T).norm() < 0.1 * before


def test_pictures_that_cannot_be_cut_into_patches_are_refused(like: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a multiple of 8"):
        next(flow.train_flow_base(_pixels(60), CAPTIONS, tmp_path / "flow", like=like, params=FLOW))


@pytest.mark.parametrize("plain_up_to", [0, 1024])
@pytest.mark.parametrize("dual", [(), (0,)])
def test_one_position_that_counts_256_times_answers_as_256_do(
    dual: tuple[int, ...], plain_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fade.models.joint_attention.PLAIN_UP_TO", plain_up_to)
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8},
        **{"num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "qk_norm": "rms_norm"},
        **{"pooled_projection_dim": 6, "pos_embed_max_size": 4, "dual_attention_layers": dual},
    )
    with torch.no_grad():  # as they are drawn, gates and biases are 0 and would hide much
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    noisy, text, pooled = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 6)

    def asked(zeros: int, count: int) -> tuple[Tensor, list[Tensor]]:
        network.zero_grad()
        states = torch.cat([text, torch.zeros(2, zeros, 12)], dim=1)
        given = {"count": count} if count > 1 else None
        answer = network(noisy, states, pooled, torch.tensor([300.0, 800.0]), joint_attention_kwargs=given).sample
        answer.square().mean().backward()
        return answer.detach(), [p.grad for p in network.parameters() if p.grad is not None]

    stock, gradients = asked(256, 1)
    network.set_attn_processor(CountedJointAttention())
    assert not torch.allclose(stock, asked(1, 1)[0], atol=0.1)
    torch.testing.assert_close(asked(256, 1)[0], stock, rtol=1e-4, atol=1e-4)
    counted, same = asked(1, 256)
    torch.testing.assert_close(counted, stock, rtol=1e-4, atol=1e-4)
    for one, other in zip(same, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
