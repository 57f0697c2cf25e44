"""Families of transformers: each answers and draws as its stock pipeline does, and every erasure is loaded by that.

A kind is a builder in ``benchmarks/tiny/families.py``; the laws hold for all of them.
"""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from benchmarks.tiny.families import KINDS
from benchmarks.tiny.stock import answers, draw, load_lora, stock_pipeline, stock_solver
from fade.adapters.exports import Layout, export_adapter, import_adapter
from fade.adapters.kohya import as_kohya
from fade.adapters.stock import deviation
from fade.adapters.store import activate, apply_adapter, restore_base, save_adapter
from fade.errors import AdapterFormatError
from fade.methods.closed_form import paired
from fade.methods.fade.adversary import Adversary
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import Mask, make_mask
from fade.methods.fade.saliency import accumulate_saliency, expected_gain, noisy_groups, random_saliency
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora, check_inside_mask, lora_layers
from fade.methods.fade.targeting import power_law
from fade.models.denoiser import weights_sha256
from fade.models.family import load_base
from fade.models.generate import first_latents, generate_batch, sample_latents
from fade.models.inversion import Search, invert
from tests.unit.models.erasing import erase, latents, stock_latents

FLOWS = [kind for kind in KINDS if kind.startswith(("sd3", "flux", "qwen", "pixart", "sana", "z-image", "lumina"))]
# Of kinds that differ in guidance alone one shows what is erased.
ERASED = [kind for kind in FLOWS if kind not in ("flux-schnell", "flux2-klein-distilled")]
PROMPTS = ["a cat image in neon style.", "a horse image in oil style."]


@pytest.mark.parametrize("kind", FLOWS)
def test_the_denoiser_answers_as_the_stock_pipelines_network(bases: dict[str, Path], kind: str) -> None:
    loaded, stock = load_base(bases[kind]), stock_pipeline(bases[kind])
    told, _ = loaded.guide(loaded.encode_prompts(PROMPTS), 1.0)
    first = first_latents([188, 288], loaded.denoiser.latent_shape)
    seen = answers(stock, PROMPTS, first, steps=3)
    assert len({float(t) for _, t, _ in seen}) == 3
    for noisy, t, theirs in seen:
        assert theirs.std() > 0.1
        with torch.no_grad():
            ours = loaded.denoiser.predict(noisy, t, told)
            other = loaded.denoiser.predict(noisy, t, told[[1, 0]])
        assert not torch.allclose(other, theirs, atol=1e-3)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# The stock pipelines of FLUX.1 with times that the picture's size does not shift, and of Qwen-Image.
EULER_ALONE = ("flux-schnell", "qwen-image")


@pytest.mark.parametrize(
    ("kind", "solver"), [*((kind, "ddim") for kind in FLOWS), *((k, "dpm++") for k in FLOWS if k not in EULER_ALONE)]
)
def test_latents_and_pictures_equal_the_stock_pipelines(bases: dict[str, Path], kind: str, solver: Any) -> None:
    loaded, stock = load_base(bases[kind]), stock_pipeline(bases[kind])
    stock.scheduler = stock_solver(stock, solver)
    told, seeds = loaded.encode_prompts(PROMPTS), [188, 288]
    first = first_latents(seeds, loaded.denoiser.latent_shape)
    ours, unguided = (
        sample_latents(loaded, told, seeds, steps=4, guidance=guidance, solver=solver) for guidance in (3.0, 1.0)
    )
    assert not torch.allclose(ours[0], ours[1], atol=0.1)
    assert torch.equal(ours, unguided) is (kind == "flux2-klein-distilled")
    given: dict[str, Any] = {"steps": 4, "guidance": 3.0}
    torch.testing.assert_close(ours, draw(stock, PROMPTS, first, output="latent", **given), rtol=1e-4, atol=1e-4)
    pictures = generate_batch(loaded, PROMPTS, seeds, solver=solver, **given)
    theirs = np.round(draw(stock, PROMPTS, first, output="np", **given) * 255).astype(int)
    assert pictures.std() > 1
    assert np.abs(pictures.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        *((kind, "module") for kind in ERASED),
        *((kind, part) for kind in ("sd3", "flux2-dev") for part in ("neuron", "weight")),
        *(
            pytest.param(kind, part, marks=pytest.mark.slow)
            for kind in ERASED
            if kind not in ("sd3", "flux2-dev")
            for part in ("neuron", "weight")
        ),
    ],
)
def test_an_erasure_is_loaded_by_the_stock_pipeline_and_leaves_the_bases_bits(
    bases: dict[str, Path], catalog: Path, tmp_path: Path, kind: str, granularity: str
) -> None:
    erase(tmp_path / "erasure", bases[kind], catalog, mask={"granularity": granularity, "density": 0.5})
    adapter, base = tmp_path / "erasure/adapter", load_base(bases[kind])
    untouched, before = weights_sha256(base.network), latents(base)
    apply_adapter(base, adapter, name="one")
    assert torch.equal(latents(base), before)
    activate(base, {"one": 1.0})
    after = latents(base)
    assert not torch.allclose(after, before, atol=1e-2)
    stock = stock_pipeline(bases[kind])
    lora: Layout = "diffusers" if hasattr(stock, "load_lora_weights") else "peft"
    layout: Layout = "difference" if granularity == "weight" else lora
    out = tmp_path / ("back.safetensors" if granularity == "weight" else "back")
    back = import_adapter(export_adapter(adapter, out, layout=layout, base=bases[kind]), load_base(bases[kind]))
    assert {key.partition(".")[0] for key in back} == {base.denoiser.component}
    if granularity == "weight":
        stock = stock_pipeline(export_adapter(adapter, tmp_path / "merged", layout="merged", base=bases[kind]))
    else:
        load_lora(stock, out)
        assert lora == "peft" or _unused(out, stock) == []
    stock.scheduler = stock_solver(stock, "ddim")
    assert deviation(out, layout=layout, adapter=adapter, base=bases[kind]) < 1e-3
    torch.testing.assert_close(after, stock_latents(stock, base), rtol=1e-3, atol=1e-3)
    restore_base(base)
    assert weights_sha256(base.network) == untouched
    assert torch.equal(latents(base), before)


def _unused(lora: Path, stock: Any) -> list[str]:
    """Keys of a LoRA file that the stock pipeline holds no tensor of, with these very values."""
    held = dict(stock.transformer.named_parameters())
    with safe_open(lora / "pytorch_lora_weights.safetensors", framework="pt") as stored:
        config = json.loads(stored.metadata()["lora_adapter_metadata"])
        assert config["transformer.lora_alpha"] == config["transformer.r"]
        names = {key: key.removeprefix("transformer.").replace(".weight", ".default_0.weight") for key in stored.keys()}  # noqa: SIM118
        assert len([name for name in held if ".lora_" in name]) == len(names) > 0
        return [
            key
            for key, name in names.items()
            if name not in held or not torch.equal(held[name].float(), stored.get_tensor(key).float())
        ]


@pytest.mark.parametrize(
    "kind",
    # One of joint and one of cross-attention in the quick tier.
    [
        kind if kind in ("flux-dev", "pixart-sigma") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in (*ERASED, "sdxl")
    ],
)
def test_every_way_of_targeting_and_depth_runs(
    bases: dict[str, Path], catalog: Path, tmp_path: Path, kind: str
) -> None:
    deep = {"steps": 2, "states": 2, "lifetime": 1, "batch": 2, "size": 4}
    ways: dict[str, dict[str, Any]] = {
        "deep": {"depth": "deep", "deep": deep},
        "targeted": {"pictures": "generated", "timesteps": "disagreement"},
        "closed form": {"start": "closed_form"},
    }
    for name, changes in ways.items():
        folder = tmp_path / name
        distilled = {"steps": 2, "gradient_checkpointing": True, **changes}
        erase(folder, bases[kind], catalog, mask={"granularity": "none"}, distill=distilled)
        apply_adapter(load_base(bases[kind]), folder / "adapter", name="one")


def test_a_module_whose_name_ends_others_is_changed_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(bases["flux-schnell"])
    alike = [name for name in base.denoiser.modules() if name.endswith("proj_out")]
    assert "proj_out" in alike
    assert len(alike) > 1
    add_sparse_lora(base.network, Mask("module", ("proj_out",), 1, 2), rank=2, alpha=2.0, seed=0, name="one")
    torch.nn.init.normal_(lora_layers(base.network)["proj_out"].lora_B["one"].weight)
    save_adapter(tmp_path / "adapter", adapter_tensors(base.denoiser, "one"), {"base_sha256": base.sha256})
    out = export_adapter(tmp_path / "adapter", tmp_path / "lora", layout="diffusers")
    stock = stock_pipeline(bases["flux-schnell"])
    stock.load_lora_weights(out)
    assert [name for name in lora_layers(stock.transformer)] == ["proj_out"]
    assert _unused(out, stock) == []


def test_projections_that_share_a_weight_are_masked_by_their_rows(bases: dict[str, Path]) -> None:
    base = load_base(bases["flux2-dev"])
    fused = base.denoiser.fused()
    name, rows = next(iter(fused.items()))
    module = dict(base.network.named_modules())[name]
    assert sum(rows) == len(module.weight)
    assert list(rows) == module._tp_packed_col_blocks
    saliency = random_saliency(base.network, "module", seed=0, fused=fused)
    saliency |= {key: torch.tensor(2.0) for key in saliency if key.startswith(f"{name}:32-")}
    keys = [key for key in saliency if key.startswith(f"{name}:")]
    assert len(keys) == 5
    assert name not in saliency
    found = make_mask(saliency, 1 / len(saliency), granularity="module")
    assert found.modules == (name,)
    assert found.rows[name].nonzero().squeeze(1).tolist() == list(range(32, 64))  # its keys
    add_sparse_lora(base.network, found, rank=2, alpha=2.0, seed=0, name="one")
    layer = lora_layers(base.network)[name]
    torch.manual_seed(0)
    first = torch.randn(1, *base.denoiser.latent_shape)
    told = base.encode_prompts(PROMPTS[:1])
    base.denoiser.predict(first, torch.tensor(500), told).square().sum().backward()
    changed = layer.lora_B["one"].weight.grad.abs().sum(dim=1) > 0
    assert changed.tolist() == found.rows[name].tolist()
    check_inside_mask(base.network, found, "one")


def test_fused_projections_are_scored_as_the_rows_of_the_whole(bases: dict[str, Path]) -> None:
    base = load_base(bases["flux2-klein"])
    told = base.encode_prompts(PROMPTS)
    latents = torch.randn(2, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    examples = Examples(latents, told, told[[1, 0]])
    groups = noisy_groups(examples, groups=1, group_size=2, timesteps=power_law(1000, 1.0), seed=0)
    whole = accumulate_saliency(base.denoiser, groups, granularity="weight")
    found = accumulate_saliency(base.denoiser, groups, granularity="module")
    gain, squares = (expected_gain(base.denoiser, groups, granularity=of) for of in ("module", "weight"))
    for name, rows in base.denoiser.fused().items():
        start = 0
        for count in rows:
            key, part = f"{name}:{start}-{start + count}", slice(start, start + count)
            torch.testing.assert_close(found[key], whole[name][part].mean(), rtol=1e-4, atol=1e-12)
            torch.testing.assert_close(gain[key], squares[name][part].sum(), rtol=1e-4, atol=1e-12)
            start += count


def test_a_told_guidance_is_told_and_not_computed(bases: dict[str, Path]) -> None:
    for kind in ("flux-dev", "flux2-dev"):
        base = load_base(bases[kind])
        told, left = base.guide(base.encode_prompts(PROMPTS), 2.5)
        assert left == 1.0
        assert told.others["guidance"].tolist() == [[2.5], [2.5]]
    distilled = load_base(bases["flux2-klein-distilled"])
    assert distilled.guide(distilled.encode_prompts(PROMPTS), 4.0)[1] == 1.0


def test_padding_is_nothing_to_forget_and_nothing_to_become(bases: dict[str, Path]) -> None:
    base = load_base(bases["qwen-image"])
    told = base.encode_prompts(["a cat image in neon style.", "a cat."])
    assert told.mask is not None
    long, short = told.mask.sum(dim=1).tolist()
    assert long > short
    concept, surrogate = paired(base.denoiser, told[:1], told[1:])
    torch.testing.assert_close(concept[:, 0], base.network.txt_norm(told.states[0, :long]))
    torch.testing.assert_close(surrogate[:short, 0], base.network.txt_norm(told.states[1, :short]))
    assert torch.equal(surrogate[short:], concept[short:])
    backwards, onwards = paired(base.denoiser, told[1:], told[:1])
    assert len(backwards) == len(onwards) == short


def test_encoders_are_used_and_gone_before_the_network_is_there(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, seen = load_base(bases["flux-dev"]), []
    whole, later = plain.encode_prompts(PROMPTS), plain.encode_prompts(["a dog image in oil style."])
    load, encoders = FluxTransformer2DModel.from_pretrained, []
    encode = T5EncoderModel.from_pretrained

    def noted(*arguments: Any, **options: Any) -> Any:
        encoders.append(weakref.ref(model := encode(*arguments, **options)))
        return model

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append([one() for one in encoders])
        return load(*arguments, **options)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", noted)
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", watched)
    base = load_base(bases["flux-dev"], prompts=PROMPTS[:1])
    assert seen == [[None]]
    assert base.pipeline.text_encoder is base.pipeline.text_encoder_2 is None
    for found, expected in ((base.encode_prompts(PROMPTS), whole), (base.encode_prompts([]), whole[:0])):
        assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in expected.tensors().items())
    # What was not said beforehand is read by encoders that are loaded again, alone, and dropped.
    assert torch.equal(base.encode_prompts(["a dog image in oil style."]).states, later.states)
    assert len(encoders) > 1
    assert [one() for one in encoders] == [None] * len(encoders)
    assert torch.equal(latents(base), latents(plain))
    assert weights_sha256(base.network) == weights_sha256(plain.network)


def test_kohyas_lora_of_flux_is_imported_with_its_alpha_or_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(bases["flux-schnell"])
    torch.manual_seed(0)
    down, up = torch.randn(2, 32), torch.randn(3 * 32, 2)
    name = "lora_unet_double_blocks_1_txt_attn_qkv"
    held = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(held, tmp_path / "kohya.safetensors")
    found = import_adapter(tmp_path / "kohya.safetensors", base)
    for part, letter in zip((up @ down / 2).split(32), "qkv", strict=True):
        module = f"transformer.transformer_blocks.1.attn.add_{letter}_proj"
        torch.testing.assert_close(found.pop(f"{module}.lora_B.weight") @ found.pop(f"{module}.lora_A.weight"), part)
    assert not found
    save_file(held | {"lora_unet_double_blocks_1_other.lora_down.weight": down.clone()}, tmp_path / "more.safetensors")
    with pytest.raises(
        AdapterFormatError, match=r"(?s)cannot be read as kohya's LoRA of a FluxPipeline.*blocks_1_other"
    ):
        import_adapter(tmp_path / "more.safetensors", base)
    with pytest.raises(AdapterFormatError, match=r"find no use: a StableDiffusion3Pipeline reads no such LoRA"):
        import_adapter(tmp_path / "kohya.safetensors", load_base(bases["sd3"]))


def test_kohyas_lora_of_flux_is_loaded_by_the_stock_pipeline_with_every_key(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = load_base(bases["flux-dev"])
    # Not `linear1` of the single blocks, which the stock reader knows in the published width alone: see below.
    parts = r"attn\.(to_q|to_v|to_out\.0|add_k_proj|to_add_out)|ff(_context)?\.net|norm1(_context)?\.linear"
    names = [name for name in base.denoiser.modules() if re.search(rf"^transformer_blocks.*({parts})", name)]
    names += [name for name in base.denoiser.modules() if re.search(r"^single.*(norm\.linear|\.proj_out)", name)]
    add_sparse_lora(base.network, Mask("module", tuple(names), 1, 2), rank=2, alpha=2.0, seed=0, name="one")
    for layer in lora_layers(base.network).values():
        torch.nn.init.normal_(layer.lora_B["one"].weight, std=0.2)
    card = {"base_sha256": base.sha256, "pipeline": "FluxPipeline"}
    save_adapter(tmp_path / "adapter", adapter_tensors(base.denoiser, "one"), card)
    out = export_adapter(tmp_path / "adapter", tmp_path / "kohya.safetensors", layout="kohya")
    with safe_open(out, framework="pt") as stored:
        fused = stored.get_tensor("lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight")
    assert fused.shape == (3 * 32, 3 * 2)
    assert not fused[32:64].any(), "the keys are not among what changes"
    stock = stock_pipeline(bases["flux-dev"])
    stock.load_lora_weights(out)
    held = {name: layer for name, layer in lora_layers(stock.transformer).items() if _changes(layer)}
    assert sorted(held) == sorted(names)
    assert deviation(out, layout="kohya", adapter=tmp_path / "adapter", base=bases["flux-dev"]) < 1e-3
    tensors = load_file(tmp_path / "adapter/pytorch_lora_weights.safetensors")
    back = import_adapter(out, load_base(bases["flux-dev"]))
    for name in names:
        pairs = [[one[f"transformer.{name}.lora_{x}.weight"].float() for x in "BA"] for one in (back, tensors)]
        assert torch.equal(pairs[0][0] @ pairs[0][1], pairs[1][0] @ pairs[1][1])


def _changes(layer: Any) -> bool:
    """Whether a LoRA changes anything."""
    return any(bool(pair.weight.any()) for pair in layer.lora_B.values())


def test_kohyas_names_of_flux_in_its_published_width_are_read_and_what_is_lost_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    width, block = 3072, "single_transformer_blocks.7"

    def pair(rows: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, width, generator=generator), torch.randn(rows, rank, generator=generator)

    factors = {f"{block}.attn.to_k": pair(width, 2), f"{block}.proj_mlp": pair(4 * width, 3)}
    found = as_kohya(factors, pipeline="FluxPipeline", component="transformer")
    assert {key.partition(".")[0] for key in found} == {"lora_unet_single_blocks_7_linear1"}
    back = FluxPipeline.lora_state_dict(dict(found))
    for name, (a, b) in factors.items():
        held = back[f"transformer.{name}.lora_B.weight"] @ back[f"transformer.{name}.lora_A.weight"]
        torch.testing.assert_close(held, b @ a)
    assert not back[f"transformer.{block}.attn.to_q.lora_B.weight"].any()
    with pytest.raises(AdapterFormatError, match=r"'kohya' cannot hold context_embedder: diffusers misreads"):
        as_kohya({**factors, "context_embedder": pair(9, 2)}, pipeline="FluxPipeline", component="transformer")
    small = {f"{block}.attn.to_k": (torch.zeros(2, 8), torch.zeros(8, 2))}
    with pytest.raises(AdapterFormatError, match="does not read it"):
        as_kohya(small, pipeline="FluxPipeline", component="transformer")
    with pytest.raises(AdapterFormatError, match=r"U-Nets and FLUX.1 alone, .* StableDiffusion3Pipeline"):
        as_kohya(small, pipeline="StableDiffusion3Pipeline", component="transformer")


@pytest.mark.parametrize("kind", [kind for kind in ERASED if kind in ("sd3", "flux-dev")])
def test_inversion_searches_the_pooled_state_too_if_it_is_asked_to(bases: dict[str, Path], kind: str) -> None:
    base = load_base(bases[kind])
    start, pictures = base.encode_prompts(PROMPTS), first_latents([1, 2], base.denoiser.latent_shape)
    search = Search(pictures, start, learning_rate=0.1, precision="fp32", device=base.device, pooled=True)
    search.step(base.denoiser, batch=4, generator=torch.Generator().manual_seed(0))
    found, told = search.states.tensors(), start.tensors()
    moved = {name for name in told if not torch.equal(found[name], told[name])}
    assert moved == {"states", "pooled"}
    assert ((found["pooled"] - told["pooled"]).abs().sum(dim=1) > 0).all(), "each row its own"
    anew = base.unconditional()
    search.restart(1, anew)
    for name in moved:
        assert torch.equal(search.states.tensors()[name][1:], anew.tensors()[name])
        assert torch.equal(search.states.tensors()[name][0], found[name][0])


@pytest.mark.parametrize("kind", [kind for kind in ERASED if kind in ("sd3", "flux-dev")])
def test_training_against_inversion_searches_and_teaches_the_pooled_state_too(
    bases: dict[str, Path], kind: str
) -> None:
    base = load_base(bases[kind])
    told, pictures = base.encode_prompts(PROMPTS), first_latents([1, 2], base.denoiser.latent_shape)
    examples = Examples(pictures, told, told)
    adversary = Adversary(
        pictures,
        starts=told,
        empty=base.unconditional(),
        **{"states": 2, "lifetime": 3, "batch": 4, "size": 5, "learning_rate": 0.05},
        **{"share": 1.0, "empty_share": 0.0, "retain_share": 0.0},
        precision="fp32",
        device=base.device,
        seed=1,
    )
    assert all(any(torch.equal(one, row) for row in told.others["pooled"]) for one in adversary.known.others["pooled"])
    for _ in range(4):
        adversary.advance(base.denoiser)
    # Two in the bank, and two that began anew and have taken a step since: each has left where it began.
    found = adversary.known.others["pooled"]
    assert len(found) == 4
    assert not any(torch.equal(one, row) for row in told.others["pooled"] for one in found)
    forget, _ = adversary.disturbed(examples, examples, torch.Generator().manual_seed(0))
    states, pooled = forget.prompts.states, forget.prompts.others["pooled"]
    for i in range(len(forget)):
        # A row is told one search's states and that search's pooled state, not another's.
        mine = [torch.equal(states[i], one) for one in adversary.known.states].index(True)
        assert torch.equal(pooled[i], found[mine])
    assert torch.equal(forget.targets.others["pooled"], told.others["pooled"])


@pytest.mark.parametrize("kind", ERASED)
def test_inversion_searches_the_text_states_alone(bases: dict[str, Path], kind: str) -> None:
    base = load_base(bases[kind])
    bits, start = weights_sha256(base.network), base.encode_prompts(PROMPTS)
    pictures = first_latents([1, 2], base.denoiser.latent_shape)
    generator = torch.Generator().manual_seed(0)
    *_, last = invert(base.denoiser, pictures, start=start, steps=2, batch=4, learning_rate=0.1, generator=generator)
    moved = (last.states.states - start.states).abs().sum(dim=2) > 0
    # What a family masks is not told, and so is not searched.
    assert torch.equal(moved, torch.ones_like(moved) if start.mask is None else start.mask)
    found, told = last.states.tensors(), start.tensors()
    assert all(torch.equal(found[name], told[name]) for name in told if name != "states")
    drawn = [sample_latents(base, told, [1, 2], steps=2, guidance=3.0, solver="ddim") for told in (last.states, start)]
    assert not torch.allclose(*drawn, atol=1e-3)
    assert weights_sha256(base.network) == bits
    assert all(weight.grad is None for weight in base.network.parameters())
