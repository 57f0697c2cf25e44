from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from fade.concepts import caption, caption_variants
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
from fade.errors import BaseModelError, ConfigError
from fade.evaluation.judges import judge_pictures, load_judge
from fade.hardware import fast_precision, threads_at_most
from fade.lineage import ROOT
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.generate import first_latents, generate, generate_batch
from fade.models.inversion import invert
from fade.models.latents import encode_pictures
from fade.models.paths import DiffusionPath, min_snr_weights
from fade.models.source import base_sha256
from fade.models.told import Told
from fade.models.training import loop, networks, steps
from fade.models.training.networks import make_noise_scheduler

SHIPPED = ROOT / "data/base/canvas"


def test_the_forward_process_equals_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(5, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    scheduler = make_noise_scheduler()
    ours = DiffusionPath(scheduler.alphas_cumprod).noised(latents, noise, timesteps)
    torch.testing.assert_close(ours, scheduler.add_noise(latents, noise, timesteps))


def test_the_velocity_target_equals_diffusers_and_unknown_types_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    timesteps, scheduler = torch.tensor([0, 500, 999]), make_noise_scheduler()
    given, levels = (latents, noise, timesteps), scheduler.alphas_cumprod
    velocity = DiffusionPath(levels, "v_prediction").target(*given)
    assert not torch.allclose(velocity, noise, atol=1e-2)
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, timesteps))
    assert torch.equal(DiffusionPath(levels).target(*given), noise)
    with pytest.raises(ConfigError, match="'sample' is not supported"):
        DiffusionPath(levels, "sample")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_answer_leads_back_to_the_clean_latents(prediction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    t, path = torch.tensor([0, 400, 900]), DiffusionPath(make_noise_scheduler().alphas_cumprod, prediction)
    noisy = path.noised(latents, noise, t)
    assert not torch.allclose(noisy, latents, atol=0.1)
    torch.testing.assert_close(path.clean(noisy, path.target(latents, noise, t), t), latents, rtol=1e-4, atol=1e-4)


def test_inversion_finds_states_that_denoise_better_and_leaves_the_network_alone(base: StableDiffusion) -> None:
    bits = weights_sha256(base.network)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    start = Told(torch.zeros(2, 16, 32))
    steps = list(
        invert(
            base.denoiser,
            latents,
            start=start,
            steps=60,
            batch=8,
            learning_rate=0.1,
            generator=torch.Generator().manual_seed(2),
        )
    )
    generator = torch.Generator().manual_seed(3)
    timesteps, noise = torch.randint(1000, (32,), generator=generator), torch.randn(32, 4, 16, 16, generator=generator)
    noisy = base.denoiser.path.noised(latents.repeat(8, 1, 1, 1), noise, timesteps)

    def loss(states: Told) -> float:
        with torch.no_grad():
            return float((base.denoiser.predict(noisy, timesteps, states.expand(32)) - noise).square().mean())

    found = steps[-1].states.states
    for number in range(2):
        assert loss(steps[-1].states[number : number + 1]) < loss(start[:1])
    assert not torch.allclose(found, start.states)
    assert not torch.allclose(found[0], found[1])
    assert weights_sha256(base.network) == bits
    assert not any(p.requires_grad or p.grad is not None for p in base.network.parameters())


def test_min_snr_weights_are_one_at_high_noise_and_fall_below() -> None:
    weights = min_snr_weights(torch.tensor([0, 200, 999]), DiffusionPath(make_noise_scheduler().alphas_cumprod), 5.0)
    assert weights[2] == 1
    assert weights[0] < weights[1] <= 1


def test_generation_equals_the_stock_pipeline(base: StableDiffusion, tiny_base: Path) -> None:
    prompt = "a cat image in neon style."
    settings = {"steps": 4, "guidance": 3.0}
    ours = generate_batch(base, [prompt], [188], solver="ddim", **settings)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    theirs = stock(
        prompt, num_inference_steps=4, guidance_scale=3.0, latents=first_latents([188], (4, 16, 16)), output_type="np"
    ).images
    assert np.abs(ours[0].astype(int) - np.round(theirs[0] * 255).astype(int)).max() <= 1
    other = generate_batch(base, ["a horse image in oil style."], [188], solver="ddim", **settings)
    assert not np.array_equal(ours, other)


def test_pictures_depend_on_seed_and_not_on_batches(base: StableDiffusion) -> None:
    prompts, seeds = ["a cat image in neon style."] * 3, [1, 1, 2]
    settings = {"steps": 2, "guidance": 3.0, "solver": "dpm++"}
    whole = np.concatenate(list(generate(base, prompts, seeds, batch=3, **settings)))
    parts = np.concatenate(list(generate(base, prompts, seeds, batch=2, **settings)))
    assert np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole[0], whole[2])
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1


def test_parts_drawn_side_by_side_are_those_drawn_in_turn_bit_by_bit(base: StableDiffusion) -> None:
    prompts, seeds = ["a cat image in neon style.", "a horse image in oil style."] * 4, list(range(8))
    settings = {"part": 3, "steps": 3, "guidance": 3.0, "solver": "dpm++"}
    drawn, begun = {}, threading.active_count()
    with threads_at_most(2):
        if torch.get_num_threads() < 2:
            pytest.skip("needs two threads of a processor")
        for batch in (3, 6, 8):
            drawn[batch] = list(generate(base, prompts, seeds, batch=batch, **settings))
            assert (torch.get_num_threads(), threading.active_count()) == (2, begun)
        stopped = generate(base, prompts, seeds, batch=6, **settings)
        assert np.array_equal(next(stopped), drawn[3][0])
        stopped.close()
        assert (torch.get_num_threads(), threading.active_count()) == (2, begun)
    assert [len(part) for part in drawn[6]] == [3, 3, 2] == [len(part) for part in drawn[3]]
    assert len(np.unique(np.concatenate(drawn[3]), axis=0)) == 8
    for batch in (6, 8):
        assert all(np.array_equal(one, other) for one, other in zip(drawn[3], drawn[batch], strict=True))


def test_prompts_that_are_read_by_several_threads_are_read_as_by_one() -> None:
    """Of a flow base two tokenizers fill up to lengths of their own."""
    base = load_base(ROOT / "data/base/canvas-flow")
    prompts = [" ".join(["a", *["very"] * more, "big cat"]) for more in range(6)]
    alone = [base.encode_prompts([prompt]) for prompt in prompts]
    assert not torch.equal(alone[0].states, alone[1].states)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            together = list(pool.map(lambda prompt: base.encode_prompts([prompt]), prompts))
            for one, other in zip(alone, together, strict=True):
                assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_what_fails_beside_is_told_and_the_threads_are_put_back(
    base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ConfigError("no such thing")

    monkeypatch.setattr("fade.models.generate.generate_from", failing)
    begun = threading.active_count()
    with threads_at_most(2), pytest.raises(ConfigError, match="no such thing"):
        list(generate(base, ["a cat"] * 4, [1, 2, 3, 4], batch=4, part=1, steps=2, guidance=3.0, solver="ddim"))
    assert threading.active_count() == begun


def test_equal_prompts_are_encoded_equally_and_different_ones_are_not(base: StableDiffusion) -> None:
    states = base.encode_prompts(["a cat", "a horse", "a cat"]).states
    assert torch.equal(states[0], states[2])
    assert not torch.allclose(states[0], states[1])


def test_a_base_is_known_by_its_weights(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert base_sha256(copy) == base_sha256(tiny_base)
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.bias"] = state["conv_in.bias"] + 1
    save_file(state, path, metadata={"format": "pt"})
    assert base_sha256(copy) != base_sha256(tiny_base)
    with pytest.raises(BaseModelError, match=r"is another one: its hash is .* expected"):
        load_base(copy, expected_sha256=base_sha256(tiny_base))


def test_missing_and_damaged_bases_are_named(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="No base model in"):
        load_base(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseModelError, match=r"do not load: it is not .* whole"):
        load_base(copy)
    weights.unlink()
    with pytest.raises(BaseModelError, match="lacks safetensors weights for unet"):
        load_base(copy)


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    assert isinstance(tokenizer, CLIPTokenizer)
    for name, subject in OBJECTS.items():
        for style in STYLES:
            for sentence in caption_variants(name, style, subject.aliases):
                assert all(token.endswith("</w>") for token in tokenizer.tokenize(sentence)), sentence
    assert len(tokenizer.tokenize("zeppelin")) > 1


def test_training_the_parts_lowers_their_losses(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pictures = np.kron(generator.integers(0, 255, (8, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    networks.seed_weights(0, "test")
    vae = networks.make_autoencoder([16, 16, 16], size=32)
    settings = {"steps": 80, "batch": 4, "learning_rate": 3e-3, "seed": 0}
    kept = steps.Checkpoint(tmp_path / "vae.safetensors", 1000, "noise")
    losses = [s.loss for s in loop.train_autoencoder(vae, pictures, checkpoint=kept, **settings)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    latents = encode_pictures(vae, pictures)
    assert 0.3 < float(latents.std()) < 3
    captions = [("a cat",), ("a horse",)] * 4
    tokenizer = networks.build_tokenizer(["a cat", "a horse"], max_length=8)
    text_encoder = networks.make_text_encoder(tokenizer, width=32, layers=1)
    unet = networks.make_unet([16, 32], latent_size=8, text_width=32)
    settings = {"steps": 120, "batch": 8, "learning_rate": 3e-3, "ema_decay": 0.9, "seed": 0}
    settings["checkpoint"] = steps.Checkpoint(tmp_path / "unet.safetensors", 1000, "noise")
    losses = [s.loss for s in loop.train_denoiser(unet, text_encoder, tokenizer, latents, captions, **settings)]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8])


def test_the_shipped_base_is_small_loads_in_stock_diffusers_and_draws() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 15_000_000
    stock = StableDiffusionPipeline.from_pretrained(SHIPPED)
    stock.set_progress_bar_config(disable=True)
    picture = stock("a cat image in photo style.", num_inference_steps=10, guidance_scale=3.0, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    verdict = judge_pictures(load_judge(ROOT / "data/judges", "report"), np.round(picture * 255).astype(np.uint8))
    assert verdict.objects == ["cat"]


@pytest.mark.slow
def test_the_shipped_base_draws_every_pair_recognisably() -> None:
    torch.set_num_threads(2)
    pairs = [(o, s) for o in OBJECTS for s in STYLES]
    prompts = [caption(o, s) for o, s in pairs]
    pictures = generate_batch(
        load_base(SHIPPED), prompts, [888] * 120, steps=25, guidance=3.0, solver="ddim", precision=fast_precision()
    )
    verdict = judge_pictures(load_judge(ROOT / "data/judges", "report"), pictures)
    assert np.mean([seen == o for seen, (o, _) in zip(verdict.objects, pairs, strict=True)]) >= 0.98
    assert np.mean([seen == s for seen, (_, s) in zip(verdict.styles, pairs, strict=True)]) >= 0.98
