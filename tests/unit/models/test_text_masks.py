"""Families that pad their captions: what holds no text is never read, counted, or searched for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks.tiny.families import KINDS
from benchmarks.tiny.stock import stock_pipeline
from fade.adapters.exports import export_adapter
from fade.adapters.integrity import Integrity, check_against_files
from fade.adapters.store import save_adapter
from fade.errors import AdapterFormatError, BaseModelError, RefusedError
from fade.methods.closed_form import held, paired
from fade.models.denoiser import Denoiser
from fade.models.families import lumina2, sana
from fade.models.family import load_base, read_pipeline
from fade.models.generate import first_latents, generate_batch
from fade.models.inversion import Search
from fade.models.paths import FlowPath
from fade.models.prompts import names_unread, readers
from fade.models.source import find_base
from fade.models.told import Told
from flows.operations.doctor_base import examine_base

MASKED = ["pixart-sigma", "sana", "z-image", "lumina2"]
PROMPTS = ["a cat image in neon style.", "a horse."]


@pytest.mark.parametrize("kind", MASKED)
@torch.no_grad()
def test_what_stands_where_no_text_is_changes_no_answer(bases: dict[str, Path], kind: str) -> None:
    base = load_base(bases[kind])
    told = base.encode_prompts(PROMPTS)
    assert told.mask is not None
    assert len(set(told.mask.sum(dim=1).tolist())) == 2
    noisy, t = first_latents([0, 1], base.denoiser.latent_shape), torch.tensor(500)
    answer = base.denoiser.predict(noisy, t, told)
    noise = torch.randn(told.states.shape, generator=torch.Generator().manual_seed(1))
    elsewhere = torch.where(told.mask[:, :, None], told.states, noise)
    torch.testing.assert_close(base.denoiser.predict(noisy, t, told.with_tensors({"states": elsewhere})), answer)
    less = told.mask.clone()
    less[:, less.sum(dim=1).min() - 1] = False
    assert not torch.allclose(base.denoiser.predict(noisy, t, replace(told, mask=less)), answer, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("epsilon", "velocity"))])
def test_what_arrives_at_the_texts_projections_is_what_the_closed_form_is_told(
    bases: dict[str, Path], kind: str
) -> None:
    base = load_base(bases[kind])
    told, other_told = (base.encode_prompts([prompt]) for prompt in PROMPTS)
    other = held(base.denoiser.read(other_told.states), other_told.mask)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, given: seen.update({name: given[0].flatten(0, -2)})

    modules = dict(base.network.named_modules())
    hooks = [modules[name].register_forward_pre_hook(note(name)) for name in base.denoiser.text_sites()]
    with torch.no_grad():
        base.denoiser.predict(torch.zeros(1, *base.denoiser.latent_shape), torch.tensor(500), told)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks) > 0
    expected = held(base.denoiser.read(told.states), told.mask)
    for given in seen.values():
        assert _farthest(expected, given) < 1e-5
        assert _farthest(other, given) > 1e-2


def _farthest(states: Tensor, given: Tensor) -> float:
    """Of the states (N, L, D) the one that is farthest from all that was given, (n, D)."""
    apart = (states.flatten(0, 1)[:, None] - given[None]).abs().amax(dim=2)
    return float(apart.amin(dim=1).max())


class Plain(Denoiser):
    """A network to which the states arrive as they are."""

    component = "transformer"
    patterns: ClassVar[dict[str, Any]] = {}

    def predict(self, noisy: Tensor, t: Tensor, told: Told) -> Tensor:
        raise NotImplementedError


def test_positions_without_text_are_not_counted_and_what_is_beyond_a_surrogate_stays() -> None:
    denoiser = Plain(torch.nn.Linear(1, 1), FlowPath(), (1, 1, 1))
    states = torch.arange(10.0).view(2, 5, 1)
    concept = Told(states, torch.tensor([[True, True, True, False, False], [True, True, False, False, False]]))
    surrogate = Told(states + 100, torch.tensor([[True, True, False, False, False], [True, True, True, True, False]]))
    first, second = paired(denoiser, concept, surrogate)
    assert first.shape == second.shape == (5, 1, 1)
    assert first.flatten().tolist() == [0, 1, 2, 5, 6]
    assert second.flatten().tolist() == [100, 101, 2, 105, 106]
    whole = paired(denoiser, replace(concept, mask=None), replace(surrogate, mask=None))
    assert [one.shape for one in whole] == [(2, 5, 1), (2, 5, 1)]
    torch.testing.assert_close(concept.mean().flatten(), torch.tensor([1.0, 5.5]))


def test_a_search_that_begins_anew_reads_the_new_captions_positions(bases: dict[str, Path]) -> None:
    base = load_base(bases["pixart-sigma"])
    empty, told = base.unconditional(), base.encode_prompts(PROMPTS[:1])
    search = Search(
        torch.zeros(1, *base.denoiser.latent_shape),
        Told.join(empty, empty),
        learning_rate=0.1,
        precision="fp32",
        device=base.device,
    )
    search.restart(1, told)
    assert search.states.mask is not None
    assert torch.equal(search.states.mask, Told.join(empty, told).mask)
    before = search.states.states.clone()
    search.step(base.denoiser, batch=2, generator=torch.Generator().manual_seed(0))
    moved = (search.states.states != before).any(dim=2)
    assert moved[1].any()
    assert not moved[~search.states.mask].any()


# ---------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("kind", MASKED)
def test_a_name_behind_the_last_token_that_is_read_is_found_from_the_tokenizer_alone(
    bases: dict[str, Path], kind: str
) -> None:
    (reader,), base = readers(find_base(bases[kind])), load_base(bases[kind])
    told = base.encode_prompts(PROMPTS)
    assert told.mask is not None
    assert [len(ids) for ids in reader.ids(PROMPTS)] == told.mask.sum(dim=1).tolist()
    for words, unread in ((3, []), (600, [0])):
        captions = [f"{'image ' * words}{name}" for name in ("cat", "dog")]
        states = base.encode_prompts(captions).states
        assert names_unread([reader], captions[:1], ["cat"]) == unread
        assert bool(torch.equal(states[0], states[1])) is bool(unread)


@pytest.mark.parametrize("kind", MASKED)
def test_prompts_and_the_empty_one_are_told_as_the_stock_pipeline_tells_them(bases: dict[str, Path], kind: str) -> None:
    base, stock = load_base(bases[kind]), stock_pipeline(bases[kind])
    asked = list(PROMPTS)
    given: dict[str, Any] = {"complex_human_instruction": sana.INSTRUCTION} if kind == "sana" else {}
    found = stock.encode_prompt(asked, negative_prompt=["", ""] if kind == "z-image" else "", **given)
    told, empty = base.encode_prompts(PROMPTS), base.unconditional()
    assert told.mask is not None
    assert empty.mask is not None
    if kind == "z-image":
        rows, negative = found
    else:
        states, mask, none, none_mask = found
        rows = [one[held.bool()] for one, held in zip(states, mask, strict=True)]
        negative = [one[held.bool()] for one, held in zip(none, none_mask, strict=True)]
    for i, row in enumerate(rows):
        torch.testing.assert_close(told.states[i][told.mask[i]], row)
    torch.testing.assert_close(empty.states[0][empty.mask[0]], negative[0])
    assert kind != "lumina2" or f"{stock.system_prompt} <Prompt Start> " == lumina2.SYSTEM


@pytest.mark.parametrize("kind", MASKED)
def test_doctor_knows_what_a_base_is_before_it_is_loaded(bases: dict[str, Path], kind: str) -> None:
    found = list(examine_base(str(bases[kind])))
    assert {finding.verdict for finding in found} == {"ok"}
    said = " ".join(finding.said for finding in found)
    length = {"pixart-sigma": 300, "sana": 299, "z-image": 512, "lumina2": 256}[kind]
    assert "64 x 64" in said
    assert f"{length} tokens of a prompt are read" in said


@pytest.mark.parametrize("kind", MASKED)
def test_a_runtime_holds_a_pipeline_to_what_it_was_after_pictures_too(bases: dict[str, Path], kind: str) -> None:
    for stock in (False, True):
        base = load_base(bases[kind])
        if stock:
            pipeline = stock_pipeline(bases[kind])
            base = type(base)(pipeline, base.sha256, base.folder)
        check_against_files(base.pipeline, read_pipeline(find_base(bases[kind])), origin=bases[kind])
        base.settle()
        kept = Integrity(base.pipeline)
        generate_batch(base, PROMPTS, [1, 2], steps=2, guidance=3.0, solver="ddim")
        kept.check(base.pipeline)
        with torch.no_grad():
            next(iter(base.network.parameters())).mul_(1.5)
        with pytest.raises(RefusedError, match="changed"):
            kept.check(base.pipeline)


@pytest.mark.parametrize("kind", MASKED)
def test_encoders_that_are_gone_have_told_the_same(bases: dict[str, Path], kind: str) -> None:
    plain, apart = load_base(bases[kind]), load_base(bases[kind], prompts=PROMPTS[:1])
    assert apart.pipeline.text_encoder is None
    for found, expected in (
        (apart.encode_prompts(PROMPTS), plain.encode_prompts(PROMPTS)),
        (apart.unconditional(), plain.unconditional()),
        (apart.encode_prompts([]), plain.encode_prompts([])),
    ):
        torch.testing.assert_close(found.tensors(), expected.tensors())


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("kind", "file", "changes", "message"),
    [
        (
            "pixart-sigma",
            "transformer",
            {"use_additional_conditions": True},
            "told the pictures' sizes, as PixArt-Alpha",
        ),
        ("pixart-sigma", "transformer", {"caption_channels": None}, "does not project its captions"),
        ("pixart-sigma", "scheduler", {"use_flow_sigmas": True}, "is a flow model .* in a pipeline of diffusion"),
        ("sana", "transformer", {"guidance_embeds": True}, "told the guidance .SANA-Sprint"),
        ("sana", "scheduler", {"use_flow_sigmas": False}, "is no flow"),
        ("z-image", "transformer", {"siglip_feat_dim": 8}, "shown pictures"),
        ("z-image", "vae", {"sample_size": 60}, "does not say a size of pictures that two latents divide .*60"),
        ("lumina2", "transformer", {"sample_size": None}, "does not say the size of its pictures"),
    ],
)
def test_what_a_family_does_not_support_is_named_before_anything_is_hashed(
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    file: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    def hashed(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr("fade.models.source.sha256_file", hashed)
    folder = tmp_path / "base"
    shutil.copytree(bases[kind], folder)
    find_base(folder)
    config = folder / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(BaseModelError, match=rf"{message}.*supported are .*PixArtSigmaPipeline .PixArt-Sigma."):
        load_base(folder)


def test_a_tokenizer_of_pieces_alone_says_how_it_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(bases["pixart-sigma"], folder)
    (folder / "tokenizer/tokenizer.json").rename(folder / "tokenizer/spiece.model")
    with pytest.raises(BaseModelError, match=r"lacks tokenizer/tokenizer.json.*spiece.model alone is not read: save"):
        find_base(folder)


def test_a_class_that_was_renamed_is_the_same_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """PixArt-Sigma was published with the class that its transformer had before."""
    folder = tmp_path / "base"
    shutil.copytree(bases["pixart-sigma"], folder)
    for file, changes in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))
    renamed, base = load_base(folder), load_base(bases["pixart-sigma"])
    assert renamed.sha256 != base.sha256
    assert type(renamed.network).__name__ == "PixArtTransformer2DModel"
    first, second = renamed.network.state_dict(), base.network.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_language_model_may_be_saved_whole(bases: dict[str, Path], tmp_path: Path) -> None:
    """Z-Image was published with the weights of a Qwen3 that also writes."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    shutil.copytree(bases["z-image"], folder)
    weights = folder / "text_encoder/model.safetensors"
    held = {f"model.{name}": tensor for name, tensor in load_file(weights).items()}
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, weights, metadata={"format": "pt"})
    whole, base = load_base(folder), load_base(bases["z-image"])
    assert torch.equal(whole.encode_prompts(PROMPTS).states, base.encode_prompts(PROMPTS).states)
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file(held, weights, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model.safetensors lacks layers.0.mlp.up_proj.weight"):
        load_base(folder)


def test_a_pipeline_without_a_loader_of_lora_files_is_offered_another_layout(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    assert not hasattr(stock_pipeline(bases["pixart-sigma"]), "load_lora_weights")
    tensors = {
        f"transformer.proj_out.lora_{half}.weight": torch.ones(shape)
        for half, shape in (("A", (1, 32)), ("B", (32, 1)))
    }
    for pipeline, loads in (("PixArtSigmaPipeline", False), ("SanaPipeline", True)):
        folder, out = tmp_path / pipeline, tmp_path / f"{pipeline}-lora"
        save_adapter(folder, tensors, {"base_sha256": "0" * 64, "pipeline": pipeline})
        if loads:
            export_adapter(folder, out, layout="diffusers")
        else:
            with pytest.raises(AdapterFormatError, match=r"PixArtSigmaPipeline loads no LoRA files.*'merged'.*'peft'"):
                export_adapter(folder, out, layout="diffusers")
        assert out.exists() is loads
        export_adapter(folder, tmp_path / f"{pipeline}-peft", layout="peft")
