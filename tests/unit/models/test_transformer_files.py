"""A transformer in a file of its own, under its release's names, beside a folder with the pipeline's other parts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.tiny.stock import stock_pipeline
from fade.adapters.exports import _base_folder
from fade.errors import BaseModelError, ConfigError
from fade.models.denoiser import weights_sha256
from fade.models.family import load_base
from fade.models.source import base_sha256, find_base
from tests.unit.models.erasing import latents

_PUBLISHED = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^time_text_embed\.timestep_embedder\.linear_(\d)", lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"^time_text_embed\.text_embedder\.linear_(\d)", lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"attn\.to_out\.0", "x_block.attn.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
)
"""diffusers' names of Stable Diffusion 3's tensors to those of its release."""


def _published(transformer: torch.nn.Module) -> dict[str, Tensor]:
    """A transformer's tensors as Stable Diffusion 3 was released: queries, keys, values in one, shift before scale."""
    found: dict[str, Tensor] = {}
    held = dict(transformer.state_dict())
    last = max(int(name.split(".")[1]) for name in held if name.startswith("transformer_blocks."))
    for name in [name for name in held if re.search(r"\.(to_q|add_q_proj)\.", name)]:
        stream = "x_block" if "to_q" in name else "context_block"
        block, ending = name.split(".")[1], name.rpartition(".")[2]
        parts = [held.pop(name.replace("to_q", f"to_{x}").replace("add_q", f"add_{x}")) for x in "qkv"]
        found[f"joint_blocks.{block}.{stream}.attn.qkv.{ending}"] = torch.cat(parts)
    for name, tensor in held.items():
        if name.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context")):
            tensor = torch.cat(tensor.chunk(2)[::-1])  # noqa: PLW2901
        for pattern, released in _PUBLISHED:
            name = re.sub(pattern, released, name)  # noqa: PLW2901
        found[name] = tensor
    return {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in found.items()}


def _beside(base: Path, file: Path, tensors: dict[str, Tensor]) -> Path:
    """The transformer's tensors in a file, and beside it the base without them."""
    save_file(tensors, file)
    shutil.copytree(base, file.with_suffix(""))
    for weights in (file.with_suffix("") / "transformer").glob("*.safetensors"):
        weights.unlink()
    return file


@pytest.mark.parametrize("kind", ["sd3", "flux-schnell"])
def test_a_transformer_in_a_file_is_the_one_in_the_folder(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    whole = load_base(bases[kind])
    # The release's names are made for the width of FLUX.1: a small one is read under diffusers' own.
    tensors = _published(whole.network) if kind == "sd3" else dict(whole.network.state_dict())
    assert (set(tensors) == set(whole.network.state_dict())) == (kind != "sd3")
    file = _beside(bases[kind], tmp_path / "one.safetensors", tensors)
    loaded = load_base(file)
    assert loaded.sha256 == base_sha256(file) != whole.sha256
    for part in find_base(file).held:
        assert weights_sha256(getattr(loaded.pipeline, part)) == weights_sha256(getattr(whole.pipeline, part)), part
    assert torch.equal(latents(loaded), latents(whole))
    apart = load_base(file, weights="bf16", prompts=["a cat image in neon style."])
    assert {parameter.dtype for parameter in apart.network.parameters()} == {torch.bfloat16}
    assert apart.pipeline.text_encoder is None
    with pytest.raises(ConfigError, match="is a file: save it as a folder"):
        _base_folder(file, loaded.sha256, adapter=tmp_path)


def test_a_transformers_file_that_does_not_fit_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    stock = stock_pipeline(bases["sd3"])
    tensors = _published(stock.transformer)
    file = _beside(bases["sd3"], tmp_path / "one.safetensors", tensors)
    before = base_sha256(file)
    name = "model.diffusion_model.context_embedder.weight"
    save_file({**tensors, name: tensors[name] + 1}, file)
    assert base_sha256(file) != before, "the file is part of what it is"
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(BaseModelError, match=r"one\.safetensors holds tensors of other shapes.*context_embedder"):
        load_base(file)
    save_file({**tensors, name: tensors[name] / 0}, file)
    with pytest.raises(BaseModelError, match=r"one\.safetensors holds NaN or infinite values"):
        load_base(file)
    save_file({key: tensor for key, tensor in tensors.items() if "joint_blocks.1.x_block.attn.proj" not in key}, file)
    with pytest.raises(BaseModelError, match=r"one\.safetensors does not hold the transformer"):
        load_base(file)
    save_file(load_file(bases["flux-dev"] / "transformer/diffusion_pytorch_model.safetensors"), file)
    with pytest.raises(BaseModelError, match=r"one\.safetensors does not hold the transformer"):
        load_base(file)
    shutil.rmtree(file.with_suffix(""))
    with pytest.raises(BaseModelError, match=r"a transformer alone, put the pipeline's folder.*beside it, as 'one'"):
        load_base(file)
    shutil.copytree(bases["pixart-sigma"], file.with_suffix(""))
    with pytest.raises(BaseModelError, match=r"diffusers reads no such file of this kind"):
        load_base(file)
