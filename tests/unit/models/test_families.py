"""Families of bases: what stock diffusers does with the same weights, from the source to a restored base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from benchmarks.tiny.stock import draw, stock_pipeline, stock_solver
from fade.adapters.exports import Layout, export_adapter, import_adapter
from fade.adapters.stock import deviation
from fade.adapters.store import activate, apply_adapter, restore_base, save_adapter
from fade.asking.prepare import prepare_spec
from fade.config import load_settings
from fade.errors import AdapterFormatError, BaseModelError, DataError
from fade.lineage import ROOT
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import Mask
from fade.methods.fade.saliency import accumulate_saliency, noisy_groups, salient_parameters
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora, lora_layers
from fade.methods.fade.targeting import power_law
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion, UNet
from fade.models.family import load_base
from fade.models.generate import first_latents, generate_batch, sample_latents
from fade.models.registry import FAMILIES
from fade.models.source import base_sha256, find_base, is_hub_name
from fade.models.told import Told
from fade.pipeline import maker_of
from tasks.dvc.versioning import stage_definition
from tests.tiny import PROJECT, SETTINGS
from tests.unit.models.erasing import erase, latents, stock_latents

PROMPT = "a cat image in neon style."
KINDS = ("epsilon", "velocity", "sd2", "sdxl", "sdxl-empty-prompt")


# ---------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_latents_and_pictures_equal_the_stock_pipelines(bases: dict[str, Path], kind: str, solver: Any) -> None:
    loaded, stock = load_base(bases[kind]), stock_pipeline(bases[kind])
    stock.scheduler = stock_solver(stock, solver)
    prompts, seeds = [PROMPT, "a horse image in oil style."], [188, 288]
    told = loaded.encode_prompts(prompts)
    ours = sample_latents(loaded, told, seeds, steps=4, guidance=3.0, solver=solver)

    def theirs(output: str) -> Any:
        first = first_latents(seeds, loaded.denoiser.latent_shape)
        return draw(stock, prompts, first, steps=4, guidance=3.0, output=output)

    assert not torch.allclose(ours[0], ours[1], atol=0.1)
    assert not torch.allclose(ours, sample_latents(loaded, told, seeds, steps=4, guidance=1.0, solver=solver), atol=0.1)
    torch.testing.assert_close(ours, theirs("latent"), rtol=1e-4, atol=1e-4)
    pictures = generate_batch(loaded, prompts, seeds, steps=4, guidance=3.0, solver=solver)
    assert np.abs(pictures.astype(int) - np.round(theirs("np") * 255).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["sdxl", "sdxl-empty-prompt"])
def test_sdxl_tells_its_denoiser_what_the_stock_pipeline_does(bases: dict[str, Path], kind: str) -> None:
    loaded, stock = load_base(bases[kind]), stock_pipeline(bases[kind])
    states, negative, pooled, negative_pooled = stock.encode_prompt(PROMPT)
    found, empty = loaded.encode_prompts(["", PROMPT, PROMPT])[2:], loaded.unconditional()
    torch.testing.assert_close(found.states, states)
    torch.testing.assert_close(found.others["pooled"], pooled)
    torch.testing.assert_close(empty.states, negative)
    torch.testing.assert_close(empty.others["pooled"], negative_pooled)
    assert bool(empty.states.any()) is (kind == "sdxl-empty-prompt")
    assert found.others["sizes"].tolist() == [[64, 64, 0, 0, 64, 64]]


# ---------------------------------------------------------------------------------------------- sources


def _changed(folder: Path, file: str, **changes: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(("kind", "parts"), [("epsilon", 3), ("sdxl", 4)])
def test_a_base_is_identified_by_every_file_that_decides_its_pictures(
    bases: dict[str, Path], tmp_path: Path, kind: str, parts: int
) -> None:
    def sha256(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    folder, files = bases[kind], sorted(path for path in bases[kind].rglob("*") if path.is_file())
    assert len([file for file in files if file.suffix == ".safetensors"]) == parts
    assert len({file.parent for file in files if file.suffix == ".json"}) == 2 * parts
    named = sorted((file.relative_to(folder).as_posix(), sha256(file.read_bytes())) for file in files)
    assert base_sha256(folder) == sha256("".join(f"{name}:{sha}\n" for name, sha in named).encode())
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert base_sha256(copy) == base_sha256(folder)
    for file in files:
        changed = copy / file.relative_to(folder)
        before = changed.read_bytes()
        if file.suffix == ".safetensors":
            tensors = load_file(changed)
            save_file(tensors | {"conv_in.bias": torch.zeros(1)}, changed, metadata={"format": "pt"})
        else:
            changed.write_bytes(before + b"\n")
        assert base_sha256(copy) != base_sha256(folder), file
        changed.write_bytes(before)
    for unread in ("README.md", "safety_checker/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (copy / unread).parent.mkdir(exist_ok=True)
        (copy / unread).write_text("{}")
    assert base_sha256(copy) == base_sha256(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "HiDreamPipeline"},
            "is a HiDreamPipeline, which is not supported yet",
        ),
        (
            "model_index.json",
            {"_class_name": "StableCascadeDecoderPipeline"},
            "StableCascadeDecoderPipeline.*supported are Sta",
        ),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "InpaintPipeline, which is not"),
        ("model_index.json", {"_class_name": "KandinskyPipeline"}, "KandinskyPipeline, which is not supported yet"),
        ("unet/config.json", {"in_channels": 9}, r"takes 9 channels \(inpainting or depth\) for latents of 4"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "told the guidance"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample', which is not supported"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "shifts its latents"),
    ],
)
def test_what_is_not_supported_is_named_before_anything_is_loaded(
    bases: dict[str, Path], tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["epsilon"], folder)
    find_base(folder)
    _changed(folder, file, **changes)
    with pytest.raises(BaseModelError, match=message):
        find_base(folder)


def test_pickles_are_never_read(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["epsilon"], folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BaseModelError, match=r"lacks safetensors weights for unet.*\.bin can run code"):
        find_base(folder)
    with pytest.raises(BaseModelError, match="is a pickle file"):
        find_base(tmp_path / "model.ckpt")


def test_pictures_of_another_size_are_refused(bases: dict[str, Path]) -> None:
    loaded = load_base(bases["epsilon"])
    assert loaded.encode_pictures(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, *loaded.denoiser.latent_shape)
    with pytest.raises(DataError, match=r"are 96 x 96; the base in .* draws 64 x 64"):
        loaded.encode_pictures(np.zeros((1, 96, 96, 3), np.uint8))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: dict[str, Path]) -> Path:
    """A local Hugging Face cache that holds one revision of ``somebody/tiny``."""
    from huggingface_hub import constants

    repository, revision = tmp_path / "hub" / "models--somebody--tiny", "1" * 40
    shutil.copytree(bases["epsilon"], repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / revision


def test_a_hub_name_is_its_snapshot_in_the_local_cache(
    bases: dict[str, Path], hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_sha256("somebody/tiny") == base_sha256("somebody/tiny@main") == base_sha256(bases["epsilon"])
    loaded = load_base("somebody/tiny", expected_sha256=base_sha256(bases["epsilon"]))
    assert weights_sha256(loaded.network) == weights_sha256(load_base(bases["epsilon"]).network)
    # What other programs put into the cache changes nothing.
    weights = hub_cache / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_suffix(".fp16.safetensors"))
    assert base_sha256("somebody/tiny") == base_sha256(bases["epsilon"])


def test_a_hub_name_that_is_not_to_be_had_says_what_to_do(hub_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'somebody/else'.*no such folder or file here.*hf download"):
        find_base("somebody/else")
    shutil.rmtree(hub_cache / "vae")
    with pytest.raises(BaseModelError, match=r"lacks safetensors weights for vae.*fetch the missing files"):
        find_base("somebody/tiny")


def test_places_on_this_machine_are_no_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name@refs/pr/1")
    for place in ("/owner/name", "./owner", "data/base/canvas", "name", "models/one.safetensors"):
        assert not is_hub_name(place), place
    (tmp_path / "owner/name").mkdir(parents=True)
    assert not is_hub_name("owner/name")


# ---------------------------------------------------------------------------------------------- single files

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of the tiny base: two levels, one layer a block, attention at the lower level.
_UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_OPEN_CLIP_NAMES = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}


def _published_unet_name(key: str) -> str:
    start = max((name for name in _UNET_NAMES if key.startswith(f"{name}.")), key=len)
    rest = key[len(start) + 1 :]
    if ".resnets." in key:
        layer, _, kind = rest.partition(".")
        rest = f"{_RESNET[layer]}.{kind}"
    return f"model.diffusion_model.{_UNET_NAMES[start]}.{rest}"


def _published_vae_name(key: str, levels: int) -> str:
    name = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    for number in range(levels):
        name = name.replace(f"down_blocks.{number}.resnets.", f"down.{number}.block.")
        name = name.replace(f"down_blocks.{number}.downsamplers.0", f"down.{number}.downsample")
        name = name.replace(f"up_blocks.{number}.resnets.", f"up.{levels - 1 - number}.block.")
        name = name.replace(f"up_blocks.{number}.upsamplers.0", f"up.{levels - 1 - number}.upsample")
    for number in range(2):
        name = name.replace(f"mid_block.resnets.{number}.", f"mid.block_{number + 1}.")
    return f"first_stage_model.{name}"


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP text encoder as OpenCLIP holds it: queries, keys and values in one, the projection transposed."""
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in _OPEN_CLIP_NAMES.items():
            name = name.replace(ours, theirs)
        if ".attn.q_proj." in name:
            others = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "kv"]
            found[name.replace(".q_proj.", ".in_proj_")] = torch.cat([value, *others])
        elif ".k_proj." not in name and ".v_proj." not in name:
            found[name] = value.T if name == "text_projection" else value
    return found


def _single_file(folder: Path, path: Path) -> Path:
    """All weights in one file, under the names that Stable Diffusion 1 and XL were published with."""
    pipeline = stock_pipeline(folder)
    tensors = {_published_unet_name(key): value for key, value in pipeline.unet.state_dict().items()}
    levels = len(pipeline.vae.config.block_out_channels)
    tensors |= {_published_vae_name(key, levels): value for key, value in pipeline.vae.state_dict().items()}
    clip = "cond_stage_model"
    if isinstance(pipeline, StableDiffusionXLPipeline):
        clip, second = "conditioner.embedders.0", _open_clip(pipeline.text_encoder_2.state_dict())
        tensors |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{clip}.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


@pytest.fixture
def single(bases: dict[str, Path], tmp_path: Path) -> Path:
    return _single_file(bases["epsilon"], tmp_path / "one.safetensors")


@pytest.mark.parametrize("kind", ["epsilon", "sdxl"])
def test_a_single_file_with_a_described_folder_beside_it_is_the_same_base(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    single = _single_file(bases[kind], tmp_path / "one.safetensors")
    shutil.copytree(bases[kind], single.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    loaded, folder = load_base(single), load_base(bases[kind])
    assert loaded.sha256 == base_sha256(single) != folder.sha256
    for part in find_base(single).held:
        assert weights_sha256(getattr(loaded.pipeline, part)) == weights_sha256(getattr(folder.pipeline, part)), part
    settings: dict[str, Any] = {"steps": 2, "guidance": 3.0, "solver": "ddim"}
    assert np.array_equal(
        generate_batch(loaded, [PROMPT], [1], **settings), generate_batch(folder, [PROMPT], [1], **settings)
    )


def test_an_export_for_a_base_in_a_single_file_is_checked(bases: dict[str, Path], tmp_path: Path) -> None:
    single = _single_file(bases["epsilon"], tmp_path / "one.safetensors")
    shutil.copytree(bases["epsilon"], single.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    sd = load_base(single)
    names = tuple(sorted(salient_parameters(sd.network)))[::3]
    add_sparse_lora(sd.network, Mask("module", names, len(names), len(names)), rank=2, alpha=2.0, seed=0, name="a")
    for layer in lora_layers(sd.network).values():
        torch.nn.init.normal_(layer.lora_B["a"].weight, std=0.2)
    save_adapter(tmp_path / "adapter", adapter_tensors(sd.denoiser, "a"), {"base_sha256": sd.sha256})
    out = export_adapter(tmp_path / "adapter", tmp_path / "lora.safetensors", layout="kohya")
    given: dict[str, Any] = {"layout": "kohya", "adapter": tmp_path / "adapter", "base": single}
    assert deviation(out, **given) < 1e-3
    with pytest.raises(AdapterFormatError, match="is lost"):
        deviation(out, strength=0.5, **given)


def test_a_single_file_without_description_says_offline_what_it_needs(single: Path, hub_cache: Path) -> None:
    with pytest.raises(BaseModelError, match=r"put a folder 'one' beside it that describes its parts: a StableDiff"):
        find_base(single)


def test_single_files_of_other_kinds_are_named(bases: dict[str, Path], single: Path, tmp_path: Path) -> None:
    shutil.copytree(bases["sdxl"], single.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(BaseModelError, match=r"describes a StableDiffusionXLPipeline, but one.safetensors holds a St"):
        find_base(single)
    tensors = load_file(single)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**tensors, name: torch.zeros(16, 9, 3, 3)}, tmp_path / "inpainting.safetensors")
    with pytest.raises(BaseModelError, match="takes 9 channels"):
        find_base(tmp_path / "inpainting.safetensors")
    save_file({"transformer.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BaseModelError, match=r"not a whole Stable Diffusion in one file: its tensors are transformer"):
        find_base(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(BaseModelError, match="is not a safetensors file"):
        find_base(tmp_path / "broken.safetensors")


# ---------------------------------------------------------------------------------------------- erasures


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        *(("velocity", "module"), ("sd2", "module"), ("sdxl", "module"), ("sdxl", "neuron"), ("sdxl", "weight")),
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
    layout: Layout = "difference" if granularity == "weight" else "diffusers"
    out = tmp_path / ("back.safetensors" if granularity == "weight" else "back")
    back = import_adapter(export_adapter(adapter, out, layout=layout, base=bases[kind]), load_base(bases[kind]))
    assert {key.partition(".")[0] for key in back} == {base.denoiser.component}
    if granularity == "weight":
        stock = stock_pipeline(export_adapter(adapter, tmp_path / "merged", layout="merged", base=bases[kind]))
    else:
        stock = stock_pipeline(bases[kind])
        stock.load_lora_weights(export_adapter(adapter, tmp_path / "lora", layout="diffusers"))
    stock.scheduler = stock_solver(stock, "ddim")
    theirs = stock_latents(stock, base)
    torch.testing.assert_close(after, theirs, rtol=1e-3, atol=1e-3)
    restore_base(base)
    assert weights_sha256(base.network) == untouched
    assert torch.equal(latents(base), before)


class NegatedUNet(UNet):
    """A network of another kind: its answers are the other way round."""

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, told: Told) -> torch.Tensor:
        return -super().predict(noisy, t, told)


class Negated(StableDiffusion):
    """A family of one's own."""

    title = "Negated"
    denoiser_type = NegatedUNet

    @cached_property
    def denoiser(self) -> NegatedUNet:
        plain = super().denoiser
        return NegatedUNet(plain.network, plain.path, plain.latent_shape)


class NegatedPipeline(StableDiffusionPipeline):
    """Its pipeline, as diffusers would have it."""


def test_a_family_is_a_class_and_a_line(
    bases: dict[str, Path], catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "base"
    shutil.copytree(bases["epsilon"], own)
    _changed(own, "model_index.json", _class_name="NegatedPipeline")
    with pytest.raises(BaseModelError, match="is a NegatedPipeline, which is not supported yet"):
        find_base(own)
    monkeypatch.setattr(diffusers, "NegatedPipeline", NegatedPipeline, raising=False)
    monkeypatch.setitem(FAMILIES, "NegatedPipeline", f"{__name__}:Negated")
    drawn = [latents(load_base(folder)) for folder in (own, bases["epsilon"])]
    assert not torch.allclose(*drawn, atol=1e-2)
    erase(tmp_path / "erasure", own, catalog)
    base = load_base(own)
    before = latents(base)
    apply_adapter(base, tmp_path / "erasure/adapter", name="one")
    activate(base, {"one": 1.0})
    assert not torch.allclose(latents(base), before, atol=1e-2)
    restore_base(base)
    assert torch.equal(latents(base), before)


def test_an_erasure_on_weights_held_in_bfloat16_is_held_in_float32_itself(
    bases: dict[str, Path], catalog: Path, tmp_path: Path
) -> None:
    erase(tmp_path / "half", bases["sdxl"], catalog, weights="bf16")
    base = load_base(bases["sdxl"], weights="bf16")
    assert {p.dtype for p in base.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in base.pipeline.text_encoder_2.parameters()} == {torch.float32}
    bits, before = weights_sha256(base.network), latents(base)
    apply_adapter(base, tmp_path / "half/adapter", name="one")
    activate(base, {"one": 1.0})
    stored = load_file(tmp_path / "half/adapter/pytorch_lora_weights.safetensors")
    assert any(not torch.equal(tensor, tensor.bfloat16().half()) for tensor in stored.values())
    for module, layer in lora_layers(base.network).items():
        for letter in "AB":
            held = getattr(layer, f"lora_{letter}")["one"].weight
            assert held.dtype == torch.float32
            assert torch.equal(held, stored[f"unet.{module}.lora_{letter}.weight"].float())
    assert not torch.allclose(latents(base), before, atol=1e-2)
    restore_base(base)
    assert weights_sha256(base.network) == bits


# ---------------------------------------------------------------------------------------------- memory


def _blocks_computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a block of the network was computed since the last call."""
    from diffusers.models.resnet import ResnetBlock2D

    count, forward = [0], ResnetBlock2D.forward

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return forward(self, *arguments, **options)

    def taken() -> int:
        found, count[0] = count[0], 0
        return found

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    return taken


@pytest.mark.parametrize(
    ("memory", "precision"),
    [
        ({"gradient_checkpointing": True}, "fp32"),
        ({"micro_batch": 3}, "fp32"),
        ({"micro_batch": 1, "gradient_checkpointing": True}, "bf16"),
    ],
)
def test_saving_memory_changes_an_erasure_by_rounding_alone(
    bases: dict[str, Path],
    catalog: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: dict[str, Any],
    precision: str,
) -> None:
    checkpointed = {"gradient_checkpointing": memory.get("gradient_checkpointing", False)}
    computed, amounts = _blocks_computed(monkeypatch), []
    # Few steps: Adam turns a gradient near zero into a whole step of either sign, and steps add up.
    distilled = {"steps": 2, "precision": precision, "stop_at": 0.01, "check_every": 1}
    for name, chosen, searched in (("plain", {}, {}), ("saving", memory, checkpointed)):
        erase(
            tmp_path / name,
            bases["sdxl"],
            catalog,
            saliency=SETTINGS["saliency"] | searched,
            distill=distilled | chosen,
        )
        amounts.append(computed())
    assert amounts[1] > amounts[0]
    plain, saving = (
        pd.read_csv(tmp_path / "plain/curve.csv"),
        pd.read_csv(tmp_path / "saving/curve.csv"),
    )
    # Before the optimiser's first step it is rounding alone; how it carries on is the processor's kind's.
    first, later = (1e-4, 1e-3) if precision == "fp32" else (0.05, 0.05)
    for name in ("forget_loss", "gradient_norm", "held_out"):
        np.testing.assert_allclose(saving[name][:1], plain[name][:1], rtol=first)
        np.testing.assert_allclose(saving[name], plain[name], rtol=later)


@pytest.mark.parametrize("granularity", ["module", "weight"])
def test_saliency_never_holds_all_gradients_with_a_group_at_once(bases: dict[str, Path], granularity: Any) -> None:
    base = load_base(bases["sdxl"])
    weights = list(salient_parameters(base.network).values())
    told = base.encode_prompts([PROMPT, "a horse image in oil style."])
    latents = torch.randn(2, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    groups = noisy_groups(
        Examples(latents, told, told[[1, 0]]), groups=2, group_size=2, timesteps=power_law(1000, 1.0), seed=0
    )
    held = 0

    def count(_: torch.Tensor) -> None:
        nonlocal held
        held = max(held, sum(weight.grad is not None for weight in weights))

    found, most = [], []
    hooks = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(count))
            weight.requires_grad_(False)
        for at_once in (1, None):
            held = 0
            found.append(accumulate_saliency(base.denoiser, groups, granularity=granularity, at_once=at_once))
            most.append(held)
    finally:
        for hook in hooks:
            hook.remove()
    assert most == [len(weights), 1]
    for name, values in found[0].items():
        torch.testing.assert_close(found[1][name], values, rtol=1e-3, atol=1e-7)


# ---------------------------------------------------------------------------------------------- requests


def test_a_base_from_the_hub_is_a_parameter_of_the_pipeline_and_no_file(hub_cache: Path, catalog: Path) -> None:
    settings = load_settings(ROOT / "params.yaml")
    project = PROJECT.at(base="somebody/tiny", catalog=str(catalog))
    spec = prepare_spec("astronaut", "cameraman", project=project, settings=settings)
    assert spec.base == "somebody/tiny"
    assert spec.base_sha256 == base_sha256(hub_cache)
    step, at_hand = maker_of(spec), spec.model_copy(update={"base": "data/base/canvas"})
    named, local = (stage_definition(step, one, Path("erasure"), Path.cwd()) for one in (spec, at_hand))
    assert [dep for dep in local["deps"] if dep not in named["deps"]] == ["data/base/canvas"]
    assert "base_sha256" in named["params"][0]["erasure/spec.yaml"]


def test_a_request_whose_pictures_do_not_fit_the_base_is_refused(
    bases: dict[str, Path], catalog: Path, tmp_path: Path
) -> None:
    settings, folder = load_settings(ROOT / "params.yaml"), tmp_path / "base"
    shutil.copytree(bases["epsilon"], folder)
    names: dict[str, Any] = {"settings": settings, "project": PROJECT.at(base=str(folder), catalog=str(catalog))}
    assert prepare_spec("astronaut", "cameraman", **names).base == str(folder)
    _changed(folder, "unet/config.json", sample_size=64)
    with pytest.raises(DataError, match=r"are 64 x 64; the base in .* draws 256 x 256. Resize"):
        prepare_spec("astronaut", "cameraman", **names)
