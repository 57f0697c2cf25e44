"""Bases as people have them: what their files lack, hold twice or say of themselves is found before any work."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.tiny.families import save_tiny
from fade.errors import BaseModelError, DataError
from fade.models.denoiser import weights_sha256
from fade.models.family import load_base
from fade.models.generate import first_latents, sample_latents
from fade.models.prompts import names_unread, readers
from fade.models.source import base_sha256, deciding_files, find_base
from fade.models.tensors import check_weights
from flows.cli.app import app
from flows.operations.doctor_base import examine_base
from tasks.console import OneMessage
from tests.unit.models.test_families import _single_file

PROMPT = "a cat image in neon style."
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_tiny(root / kind, kind) for kind in ("epsilon", "sdxl")}


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["epsilon"], tmp_path / "base"))


@pytest.fixture
def single(bases: dict[str, Path], tmp_path: Path) -> Path:
    """SDXL in one file, described by the folder beside it."""
    file = _single_file(bases["sdxl"], tmp_path / "one.safetensors")
    shutil.copytree(bases["sdxl"], file.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    check_weights(find_base(file))
    return file


def _edit(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = load_file(path)
    changed = change(dict(tensors))
    assert list(changed) != list(tensors) or any(not torch.equal(changed[key], tensors[key]) for key in tensors)
    save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path, metadata={"format": "pt"})


def _without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def _set(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


def _config(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("epsilon", TEXT, _without("layers.1."), r"text_encoder/model.safetensors lacks encoder.layers.1.\S+ .*more"),
        ("epsilon", UNET, _without("attn2.to_k"), r"unet/diff\S+ lacks \S+attn2.to_k.weight"),
        ("epsilon", VAE, _without("quant_conv.bias"), r"vae/diff\S+ lacks \S*quant_conv.bias"),
        ("sdxl", "text_encoder_2/model.safetensors", _without("text_projection"), "lacks text_projection.weight"),
        (
            "epsilon",
            UNET,
            _set("mid_block.extra.weight", torch.ones(1)),
            "holds mid_block.extra.weight, which unet/con",
        ),
        ("epsilon", UNET, _set("conv_in.bias", torch.ones(2)), r"conv_in.bias \(2,\) \(expected \(16,\)\)"),
        ("epsilon", UNET, _set("conv_in.bias", torch.full((16,), torch.nan)), "NaN or infinite values in conv_in.bias"),
        ("epsilon", VAE, _set("quant_conv.bias", torch.full((8,), torch.inf)), "infinite values in quant_conv.bias"),
    ],
)
def test_what_the_weights_lack_or_hold_too_much_is_named_with_its_file(
    bases: dict[str, Path], tmp_path: Path, kind: str, file: str, change: Callable[[Tensors], Tensors], message: str
) -> None:
    folder = Path(shutil.copytree(bases[kind], tmp_path / "base"))
    check_weights(find_base(folder))
    _edit(folder / file, change)
    for refuses in (check_weights, lambda found: load_base(found.path)):
        with pytest.raises(BaseModelError, match=message):
            refuses(find_base(folder))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("middle_block.1.transformer_blocks.0.attn2.to_k", r"one.safetensors lacks mid_block.*attn2.to_k.weight"),
        ("first_stage_model.decoder.conv_out.bias", "one.safetensors lacks decoder.conv_out.bias"),
        ("embedders.0.transformer.text_model.final_layer_norm.bias", "lacks final_layer_norm.bias"),
        ("embedders.1.model.text_projection", "lacks text_projection.weight"),
        ("label_emb.0.2.weight", "does not hold the unet .*label_emb.0.2.weight"),
    ],
)
def test_a_single_file_is_compared_as_it_is_converted(single: Path, part: str, message: str) -> None:
    _edit(single, _without(part))
    with pytest.raises(BaseModelError, match=message):
        load_base(single)


def test_tensors_that_change_no_picture_are_no_fault(base: Path) -> None:
    before = weights_sha256(load_base(base).pipeline.text_encoder)
    extra = ("text_model.embeddings.position_ids", "vision_model.post_layernorm.bias", "text_projection.weight")
    _edit(base / TEXT, lambda tensors: tensors | {name: torch.ones(1) for name in extra})
    assert weights_sha256(load_base(base).pipeline.text_encoder) == before


def test_an_autoencoder_with_the_old_names_of_its_attention_is_read(base: Path) -> None:
    config = json.loads((base / "vae/config.json").read_text()) | {"mid_block_add_attention": True}
    vae: Any = AutoencoderKL.from_config(config)
    vae.save_pretrained(base / "vae")
    named = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(key: str) -> str:
        return next((key.replace(f".{new}.", f".{old}.") for new, old in named.items() if f".{new}." in key), key)

    _edit(base / VAE, lambda tensors: {renamed(key): value for key, value in tensors.items()})
    assert weights_sha256(load_base(base).pipeline.vae) == weights_sha256(vae)


# ---------------------------------------------------------------------------------------------- files that count


@pytest.mark.parametrize(("variant", "change"), [("fp16", torch.Tensor.half), ("non_ema", lambda value: value + 1)])
def test_the_main_weights_count_where_a_variant_lies_beside_them(
    base: Path, variant: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    before, bits = base_sha256(base), weights_sha256(load_base(base).network)
    other = {key: change(value) for key, value in load_file(base / UNET).items()}
    save_file(other, (base / UNET).with_suffix(f".{variant}.safetensors"), metadata={"format": "pt"})
    found = find_base(base)
    assert [(part.part, part.unread) for part in found.parts if part.unread] == [("unet", (variant,))]
    assert set(found.weights) == {path for path in deciding_files(found).values() if path.suffix == ".safetensors"}
    assert base_sha256(base) == before
    assert weights_sha256(load_base(base).network) == bits


def test_a_variant_counts_where_there_is_nothing_else_part_by_part(base: Path) -> None:
    expected = load_base(base)
    halves = {key: value.half() for key, value in load_file(base / VAE).items()}
    save_file(halves, (base / VAE).with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    (base / UNET).rename((base / UNET).with_suffix(".ema.safetensors"))
    (base / VAE).unlink()
    (base / TEXT).rename((base / TEXT).with_suffix(".fp16.safetensors"))
    loaded = load_base(base)
    assert weights_sha256(loaded.network) == weights_sha256(expected.network)
    assert weights_sha256(loaded.pipeline.text_encoder) == weights_sha256(expected.pipeline.text_encoder)
    held = loaded.pipeline.vae.state_dict()
    assert all(torch.equal(held[key], value.float()) for key, value in halves.items())
    assert {part.dtype for part in loaded.pipeline.vae.parameters()} == {torch.float32}


def _sharded(base: Path, variant: str | None) -> Path:
    """The UNet's weights in shards; their index."""
    before = load_base(base).network
    (base / UNET).unlink()
    before.save_pretrained(base / "unet", max_shard_size="200KB", variant=variant)
    name = "diffusion_pytorch_model.safetensors.index" + (f".{variant}" if variant else "") + ".json"
    index = base / "unet" / name
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    assert weights_sha256(load_base(base).network) == weights_sha256(before)
    return index


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_what_their_index_names(base: Path, variant: str | None) -> None:
    index = _sharded(base, variant)
    assert index in deciding_files(find_base(base)).values()
    shard = sorted(index.parent.glob("*-of-*.safetensors"))[-1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(BaseModelError, match=f"lacks unet/{shard.name}, which {index.name} names"):
        find_base(base)
    shard.write_bytes(content)
    named = index.read_text()
    index.unlink()
    with pytest.raises(BaseModelError, match=r"lacks the index .* of the shards of unet"):
        find_base(base)
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": "../vae/diffusion_pytorch_model.safetensors"}}))
    with pytest.raises(BaseModelError, match="names no files beside it"):
        find_base(base)
    index.write_text(named)
    whole = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}.safetensors"
    shutil.copy(shard, index.parent / whole)
    with pytest.raises(BaseModelError, match=f"holds unet twice, in {whole}"):
        find_base(base)


def test_weights_of_which_nothing_says_whether_they_count_are_refused(base: Path) -> None:
    weights = base / UNET
    weights.rename(weights.with_name("model.safetensors"))
    with pytest.raises(BaseModelError, match=r"model.safetensors has not the name diffusion_pytorch_model.safetensors"):
        find_base(base)
    for variant in ("fp16", "non_ema"):
        shutil.copy(weights.with_name("model.safetensors"), weights.with_suffix(f".{variant}.safetensors"))
    with pytest.raises(BaseModelError, match="holds the variants fp16, non_ema of unet and no main weights"):
        find_base(base)


# ---------------------------------------------------------------------------------------------- refusals

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (INDEX, {"scheduler": ["diffusers", "EDMEulerScheduler"]}, r"noise levels of EDM \(EDMEulerScheduler\)"),
        (INDEX, {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "is a flow model"),
        (INDEX, {"scheduler": ["diffusers", "LCMScheduler"]}, "an LCMScheduler, in a few steps"),
        (INDEX, {"scheduler": ["diffusers", "VQDiffusionScheduler"]}, "of whose noise schedule nothing is known"),
        (SCHEDULER, {"use_flow_sigmas": True}, "is a flow model"),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "is a flow model"),
        ("unet/config.json", {"sample_size": [16, 24]}, r"not square \(64 x 96: sample_size \[16, 24\]\)"),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "has a quantised unet"),
        (INDEX, {"vae": ["diffusers", "AutoencoderTiny"]}, "has a AutoencoderTiny as its vae"),
        (INDEX, {"vae": [None, None]}, r"lacks vae \(model_index.json names none\)"),
        (INDEX, {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}, "is the refiner"),
        (INDEX, {"_class_name": "StableDiffusionXLPipeline", "text_encoder": [None, None]}, "is the refiner"),
    ],
)
def test_what_is_another_kind_of_model_is_called_by_its_name(
    base: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    find_base(base)
    _config(base, file, **changes)
    with pytest.raises(BaseModelError, match=message):
        find_base(base)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"_class_name": "UNet2DConditionModel"}'}, "holds a UNet2DConditionModel alone"),
        ({"config.json": '{"architectures": ["CLIPTextModel"]}'}, "holds a CLIPTextModel alone"),
        ({"modular_model_index.json": "{}"}, "holds a modular pipeline"),
        ({"adapter_config.json": "{}"}, "holds an adapter"),
        ({"sd15.safetensors": ""}, "holds sd15.safetensors: give the file itself"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_said_to_be_what_it_is(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BaseModelError, match=message):
        find_base(tmp_path)


def test_everything_that_is_wrong_is_said_at_once(base: Path) -> None:
    shutil.rmtree(base / "scheduler")
    shutil.rmtree(base / "tokenizer")
    (base / UNET).unlink()
    with pytest.raises(BaseModelError, match=r"lacks scheduler/.*lacks tokenizer/.*lacks safetensors weights for unet"):
        find_base(base)


def test_parts_that_judge_pictures_are_left_out_and_need_not_be_there(base: Path) -> None:
    before = base_sha256(base)
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    _config(base, INDEX, **parts, feature_extractor=["transformers", "CLIPImageProcessor"])
    loaded = load_base(base)
    assert loaded.sha256 != before  # the index is another file
    assert loaded.pipeline.safety_checker is None
    assert loaded.pipeline.feature_extractor is None


def test_a_pair_of_equal_sides_is_a_square(base: Path) -> None:
    _config(base, "unet/config.json", sample_size=[16, 16])
    assert find_base(base).picture_size == 64
    assert load_base(base).denoiser.latent_shape == (4, 16, 16)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (("v_pred",), "marked as v_prediction, and scheduler/scheduler_config.json says epsilon"),
        (("ztsnr",), "ends in noise alone"),
        (("edm_mean", "edm_std"), "noise levels of EDM"),
        (("scaled_fp8",), "scaled 8-bit weights"),
    ],
)
def test_what_a_file_is_marked_as_must_be_what_its_scheduler_says(
    single: Path, marks: tuple[str, ...], message: str
) -> None:
    _edit(single, lambda tensors: tensors | {name: torch.zeros(1) for name in marks})
    with pytest.raises(BaseModelError, match=message):
        find_base(single)
    _config(single.with_suffix(""), SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    if set(marks) <= {"v_pred", "ztsnr"}:
        assert load_base(single).denoiser.path.prediction == "v_prediction"  # type: ignore[attr-defined]


def test_a_mark_in_a_folder_or_in_metadata_counts_as_well(base: Path) -> None:
    tensors = load_file(base / UNET)
    save_file(tensors, base / UNET, metadata={"modelspec.prediction_type": "v"})
    with pytest.raises(BaseModelError, match="marked as v_prediction"):
        find_base(base)
    save_file(tensors | {"v_pred": torch.zeros(1)}, base / UNET, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="marked as v_prediction"):
        find_base(base)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("first_stage_model.", r"lacks its autoencoder \(first_stage_model"),
        ("conditioner.embedders.1.", "lacks its second text encoder"),
        ("conditioner.embedders.0.", "lacks its text encoder"),
    ],
)
def test_a_single_file_without_one_of_its_parts_names_it(single: Path, part: str, message: str) -> None:
    _edit(single, _without(part))
    with pytest.raises(BaseModelError, match=message):
        find_base(single)


def test_a_single_file_of_the_refiner_is_said_to_be_one(single: Path) -> None:
    def refined(tensors: Tensors) -> Tensors:
        second = {key: value for key, value in tensors.items() if "embedders.0." not in key}
        return {key.replace("embedders.1.", "embedders.0."): value for key, value in second.items()}

    _edit(single, refined)
    with pytest.raises(BaseModelError, match="is the refiner of Stable Diffusion XL"):
        find_base(single)


# ---------------------------------------------------------------------------------------------- prompts, guidance


@pytest.mark.parametrize("kind", ["epsilon", "sdxl"])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_the_prompt_alone_is_followed(bases: dict[str, Path], kind: str, guidance: float) -> None:
    loaded, stock = load_base(bases[kind]), DiffusionPipeline.from_pretrained(bases[kind])
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    first = first_latents([1], loaded.denoiser.latent_shape)
    given: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "latent"}
    theirs = stock(PROMPT, latents=first, **given).images
    mine, other, guided = (
        sample_latents(loaded, loaded.encode_prompts([prompt]), [1], steps=2, guidance=scale, solver="ddim")
        for prompt, scale in ((PROMPT, guidance), ("a horse image in oil style.", guidance), (PROMPT, 3.0))
    )
    assert not torch.allclose(mine, other, atol=1e-2)
    assert not torch.allclose(mine, guided, atol=1e-2)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def _with_vectors(folder: Path, token: str, count: int) -> Path:
    """A base that learnt a token of several vectors, as stock diffusers saves it."""
    stock = DiffusionPipeline.from_pretrained(folder)
    width = stock.text_encoder.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    stock.load_textual_inversion(torch.randn(count, width, generator=generator), token=token)
    stock.save_pretrained(folder)
    return folder


def test_a_token_of_several_vectors_is_read_whole(base: Path) -> None:
    folder, prompt = _with_vectors(base, "<mine>", 3), "a <mine> image in neon style."
    loaded, stock = load_base(folder), DiffusionPipeline.from_pretrained(folder)
    theirs, _ = stock.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
    alone = loaded.pipeline.text_encoder(
        loaded.pipeline.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
    ).last_hidden_state
    assert not torch.allclose(alone, theirs, atol=1e-3)
    torch.testing.assert_close(loaded.encode_prompts([prompt]).states, theirs)


def test_a_tokenizer_without_a_length_takes_the_text_encoders(base: Path) -> None:
    path = base / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length")
    expected = load_base(base).encode_prompts([PROMPT]).states
    path.write_text(json.dumps(config))
    assert torch.equal(load_base(base).encode_prompts([PROMPT]).states, expected)


def test_tokens_without_a_state_are_named(base: Path) -> None:
    stock = DiffusionPipeline.from_pretrained(base)
    stock.tokenizer.add_tokens(["<new>"])
    stock.tokenizer.save_pretrained(base / "tokenizer")
    with pytest.raises(BaseModelError, match=r"tokenizer knows \d+ tokens, and text_encoder has .*<new> have none"):
        load_base(base)


def test_what_is_not_read_of_a_prompt_is_said_without_its_words(
    bases: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_base(bases["epsilon"])
    lead = "a horse image in oil style. " * 3
    with caplog.at_level(logging.WARNING):
        loaded.encode_prompts([PROMPT])
        assert not caplog.records
        cut = loaded.encode_prompts([f"{lead} cat", f"{lead} dog", PROMPT]).states
    assert torch.equal(cut[0], cut[1])
    assert "2 of 3 prompts are longer than the 16 tokens" in caplog.text
    assert "cat" not in caplog.text


def test_captions_that_name_the_concept_too_late_are_found_before_training(bases: dict[str, Path]) -> None:
    lead = "a horse image in oil style. " * 3
    captions = [f"a cat. {lead}", f"{lead} a cat", f"a cat. {lead} a cat", lead]
    for folder in bases.values():
        assert names_unread(readers(find_base(folder)), captions, ["cat"]) == [1]


# ---------------------------------------------------------------------------------------------- what is said


def test_the_doctor_says_what_a_base_is_and_what_is_wrong_with_it(bases: dict[str, Path], base: Path) -> None:
    found = list(examine_base(str(bases["sdxl"])))
    assert {one.verdict for one in found} == {"ok"}
    said = " ".join(one.said for one in found)
    for words in ("StableDiffusionXLPipeline", "64 x 64", "EulerDiscreteScheduler", base_sha256(bases["sdxl"])):
        assert words in said
    _edit(base / UNET, _without("conv_in.bias"))
    result = CliRunner().invoke(app, ["doctor", "--base", str(base)])
    assert result.exit_code == 1
    assert "lacks conv_in.bias" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "error", "level", "printed"),
    [
        ("prefect.task_runs", DataError("no picture"), "WARNING", False),
        ("prefect.flow_runs", DataError("no picture"), "WARNING", False),
        ("prefect.task_runs", DataError("no picture"), "DEBUG", True),
        ("prefect.task_runs", ZeroDivisionError("a fault"), "WARNING", True),
        ("prefect.server", DataError("no picture"), "WARNING", True),
    ],
)
def test_an_error_raised_on_purpose_is_printed_once(
    name: str, error: Exception, level: str, printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FADE_LOG_LEVEL", level)
    emitted: list[logging.LogRecord] = []
    handler = OneMessage()
    monkeypatch.setattr(handler, "emit", emitted.append)
    record = logging.LogRecord(name, logging.ERROR, "", 0, "it failed", (), (type(error), error, None))
    handler.handle(record)
    assert bool(emitted) is printed
