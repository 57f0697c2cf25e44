"""Other tools' adapters: read as stock libraries read them, or refused by what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.tiny.families import save_tiny
from benchmarks.tiny.stock import stock_pipeline
from fade.adapters.card import load_card
from fade.adapters.exports import PEFT_WEIGHTS, import_adapter
from fade.adapters.stock import LIMIT, Question, check_stored
from fade.adapters.store import put_in, save_adapter
from fade.errors import AdapterFormatError, FadeError
from fade.models.base import Base
from fade.models.deltas import plain_modules
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.steps.foreign import take_in

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("foreign") / "sdxl", "sdxl")


def _pairs(unet: Any, *, rank: int = 2, std: float = 0.2) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors for every module."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn((rank, *module.weight.shape[1:]), generator=draw) * 0.2,
            torch.randn((len(module.weight), rank, *[1] * (module.weight.dim() - 2)), generator=draw) * std,
        )
        for name, module in plain_modules(unet).items()
    }


def _off(base: Base, file: Path, folder: Path, stock: Any) -> float:
    """How far the imported adapter is from the stock pipeline that loaded the same file, in parts of its change."""
    ask = Question.of(base)
    plain = ask(base.denoiser)
    take_in(file, base, folder, {})
    put_in(base, load_file(next(folder.glob("*.safetensors"))), name="a", origin="a test")
    base.network.enable_adapters()
    ours, theirs = ask(base.denoiser), ask(base.denoiser.on(stock.unet.eval()))
    assert torch.linalg.vector_norm(theirs - plain) > 1e-2 * torch.linalg.vector_norm(plain)
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs - plain))


# --- read as stock libraries read them ---


def test_what_diffusers_training_scripts_save_is_read(base: StableDiffusion, tiny_base: Path, tmp_path: Path) -> None:
    trained = stock_pipeline(tiny_base)
    trained.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, weight in trained.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(2))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "out", unet_lora_layers=layers)
    assert any(".lora.down.weight" in key for key in load_file(next((tmp_path / "out").glob("*.safetensors"))))
    assert _off(base, tmp_path / "out", tmp_path / "a", trained) < LIMIT


@pytest.mark.parametrize("alpha", [2, 4])
def test_what_a_denoiser_saves_by_itself_keeps_its_alpha(
    base: StableDiffusion, tiny_base: Path, tmp_path: Path, alpha: int
) -> None:
    trained = stock_pipeline(tiny_base)
    trained.unet.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_k"]), adapter_name="a")
    for name, weight in trained.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(2))
    trained.unet.save_lora_adapter(tmp_path / "out", adapter_name="a")
    assert _off(base, tmp_path / "out", tmp_path / "a", trained) < LIMIT


def _published(name: str, layers: int) -> str:
    """A module of SDXL's denoiser as the original release, and kohya's scripts, call it; ``layers`` to a block."""
    count = layers + 1
    blocks = {
        r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)": ("input_blocks", lambda i, j: 1 + count * i + j),
        r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)": ("output_blocks", lambda i, j: count * i + j),
    }
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
             "conv_shortcut": "skip_connection"}  # fmt: skip
    for pattern, (start, number) in blocks.items():
        if found := re.fullmatch(pattern, name):
            i, kind, j, rest = int(found[1]), found[2], int(found[3]), found[4]
            return f"{start}.{number(i, j)}.{int(kind == 'attentions')}.{inner.get(rest, rest)}"
    if found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{count * (int(found[1]) + 1)}.0.op"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        at = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{at}.{inner.get(found[3], found[3])}"
    return {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }.get(name, "")  # fmt: skip


def test_kohyas_names_of_sdxl_are_read(sdxl: Path, tmp_path: Path) -> None:
    base, made, expected = load_base(sdxl), {}, {}
    for name, (a, b) in _pairs(base.network).items():
        if published := _published(name, base.network.config.layers_per_block):
            key = f"lora_unet_{published.replace('.', '_')}"
            made |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}
            expected[name] = (a, b / 2)
    assert any("input_blocks_" in key for key in made)
    assert any(key.endswith("_op.alpha") for key in made)
    save_file(made, tmp_path / "k.safetensors")
    read = import_adapter(tmp_path / "k.safetensors", base)
    assert {key.removeprefix("unet.").partition(".lora_")[0] for key in read} == set(expected)
    for name, (a, b) in expected.items():
        assert torch.equal(read[f"unet.{name}.lora_A.weight"], a), name
        assert torch.equal(read[f"unet.{name}.lora_B.weight"], b), name
    attention = {key: tensor for key, tensor in made.items() if "attn" in key}
    save_file(attention, tmp_path / "attention.safetensors")
    stock = stock_pipeline(sdxl)
    stock.load_lora_weights(tmp_path / "attention.safetensors")
    assert _off(base, tmp_path / "attention.safetensors", tmp_path / "a", stock) < LIMIT


@pytest.mark.parametrize("std", [1.0, 1e-2, 1e-5])
def test_a_small_alpha_beside_a_high_rank_loses_nothing(base: StableDiffusion, tmp_path: Path, std: float) -> None:
    made: dict[str, Tensor] = {}
    for name, (a, b) in _pairs(base.network, rank=128, std=std).items():
        if "attn" in name:
            key = f"lora_unet_{name.replace('.', '_')}"
            made |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(1.0)}
    save_file(made, tmp_path / "k.safetensors")
    take_in(tmp_path / "k.safetensors", base, tmp_path / "a", {})
    tensors = import_adapter(tmp_path / "k.safetensors", base)
    stored = load_file(next((tmp_path / "a").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32 if std == 1e-5 else torch.float16}
    one = f"unet.{QUERY}.lora_B.weight"
    for held in ("stored", "half"):
        written = stored[one].float() if held == "stored" else tensors[one].half().float()
        off = torch.linalg.vector_norm(written - tensors[one]) / torch.linalg.vector_norm(tensors[one])
        assert (off > 0.1) == (held == "half" and std == 1e-5)
        assert off < 1e-3 or held == "half"
    # A tensor that was lost is found, however little it changes.
    save_adapter(tmp_path / "b", {**tensors, one: torch.zeros_like(tensors[one])}, {"base_sha256": base.sha256})
    with pytest.raises(AdapterFormatError, match=re.escape(f"({one} differ)")):
        check_stored(base, tensors, tmp_path / "b")


def test_a_difference_is_taken_in_and_a_place_that_was_lost_is_found(base: StableDiffusion, tmp_path: Path) -> None:
    dense = torch.randn(base.network.get_submodule(QUERY).weight.shape, generator=torch.Generator().manual_seed(3))
    dense[0] = 0
    save_file({f"unet.{QUERY}.weight": dense}, tmp_path / "d.safetensors")
    take_in(tmp_path / "d.safetensors", base, tmp_path / "a", {})
    assert load_card(tmp_path / "a")["modules"] == 1, "its places and its values are of one"
    stored = load_file(next((tmp_path / "a").glob("*.safetensors")))
    places, values = stored[f"unet.{QUERY}.positions"].long(), stored[f"unet.{QUERY}.values"].float()
    torch.testing.assert_close(torch.zeros(dense.numel()).index_put((places,), values).view_as(dense), dense,
                               rtol=1e-3, atol=0)  # fmt: skip
    tensors = import_adapter(tmp_path / "d.safetensors", base)
    one = f"unet.{QUERY}.positions"
    save_adapter(tmp_path / "b", {**tensors, one: tensors[one] - 1}, {"base_sha256": base.sha256})
    with pytest.raises(AdapterFormatError, match=re.escape(f"({one} differ)")):
        check_stored(base, tensors, tmp_path / "b")


def test_an_adapter_that_changes_nothing_is_no_import_and_leaves_nothing(base: StableDiffusion, tmp_path: Path) -> None:
    zero = {f"unet.{QUERY}.lora_A.weight": torch.ones(2, 32), f"unet.{QUERY}.lora_B.weight": torch.zeros(32, 2)}
    save_file(zero, tmp_path / "zero.safetensors")
    with pytest.raises(AdapterFormatError, match="changes nothing"):
        take_in(tmp_path / "zero.safetensors", base, tmp_path / "a", {})
    assert not (tmp_path / "a").exists()


# --- refused by what they are ---


def test_peft_names_in_one_file_ask_for_their_configuration(base: StableDiffusion, tmp_path: Path) -> None:
    key = f"base_model.model.{QUERY}"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json: give the folder"):
        import_adapter(tmp_path / "one.safetensors", base)
    save_file(tensors, tmp_path / PEFT_WEIGHTS)
    with pytest.raises(FadeError, match=r"Missing file .*adapter_config\.json"):
        import_adapter(tmp_path / PEFT_WEIGHTS, base)


def test_odd_metadata_is_said(base: StableDiffusion, tmp_path: Path) -> None:
    tensors = {f"unet.{QUERY}.lora_A.weight": torch.ones(2, 32), f"unet.{QUERY}.lora_B.weight": torch.ones(32, 2)}
    good = {"unet.r": 2, "unet.lora_alpha": 2}
    path = tmp_path / "m.safetensors"
    for odd in (
        "{", "[1]", "3", "null", "[" * 100_000,
        *({**good, "unet.lora_alpha": value} for value in (None, "four", [2], True, float("nan"))),
        *({**good, "unet.r": value} for value in (None, "four", [2], True, float("nan"))),
        *({**good, "unet.rank_pattern": value} for value in (["to_q"], "to_q", {"(": 2}, {"to_q": None}, {"to_q": 9})),
    ):  # fmt: skip
        text = odd if isinstance(odd, str) else json.dumps(odd)
        save_file(tensors, path, metadata={"lora_adapter_metadata": text})
        with pytest.raises(AdapterFormatError, match=r"configuration|metadata"):
            import_adapter(path, base)
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(good)})
    assert import_adapter(path, base)


def test_each_other_kind_is_refused_by_its_name(base: StableDiffusion, tmp_path: Path) -> None:
    key = f"lora_unet_{QUERY.replace('.', '_')}"
    lora = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
    one = torch.ones(2, 2)
    save_file(lora, tmp_path / "x.safetensors")
    assert import_adapter(tmp_path / "x.safetensors", base)
    for extra, kind in (
        ({f"{key}.dora_scale": one}, "a DoRA"),
        ({f"unet.{QUERY}.lora_magnitude_vector": one}, "a DoRA"),
        ({f"{key}.hada_w1_a": one}, "a LoHa"),
        ({f"{key}.lokr_w1": one}, "a LoKr"),
        ({f"{key}.oft_blocks": one}, "an OFT"),
        ({f"{key}.lora_mid.weight": one}, "Tucker"),
        ({f"{key}.diff": one}, "whole layers"),
        ({f"{key}.lora_up.bias": one}, "biases"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": one}, "text encoder"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": one}, "text encoder"),
        ({"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": one}, "text encoder"),
        ({"transformer.blocks.0.attn.to_q.lora_A.weight": one}, "transformer"),
        ({"emb_params": one}, "textual inversion"),
        ({f"{key}.lora_up.weight": torch.ones(32, 2).to(torch.float8_e4m3fn)}, "fp8"),
        ({f"{key}.lora_up.weight": torch.ones(32, 2, dtype=torch.int8)}, "quantised"),
        ({f"{key}.lora_up.weight": torch.full((32, 2), float("nan"))}, "not finite"),
    ):
        save_file({**lora, **extra}, tmp_path / "x.safetensors")
        with pytest.raises(AdapterFormatError, match=kind):
            import_adapter(tmp_path / "x.safetensors", base)
    # Two names of one place, of which one would win unsaid.
    twice = {f"unet.{QUERY}.{end}.weight": torch.ones(2, 32) for end in ("lora_A", "lora.down")}
    save_file(twice, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFormatError, match="is a second lora_A"):
        import_adapter(tmp_path / "x.safetensors", base)


def test_whole_weights_are_no_difference(base: StableDiffusion, tmp_path: Path) -> None:
    weights = {f"unet.{name}.weight": module.weight.clone() for name, module in plain_modules(base.network).items()}
    draw = torch.Generator().manual_seed(1)
    change = {key: 0.1 * weight.std() * torch.randn(weight.shape, generator=draw) for key, weight in weights.items()}
    path = tmp_path / "d.safetensors"
    save_file(change, path)
    assert import_adapter(path, base)
    save_file({key: weights[key] + change[key] for key in weights}, path)
    with pytest.raises(AdapterFormatError, match=r"holds whole weights, no difference.*Subtract"):
        import_adapter(path, base)
    some = f"unet.{QUERY}.weight"
    save_file({**change, some: weights[some]}, path)
    with pytest.raises(AdapterFormatError, match=f"difference: {re.escape(QUERY)} are"):
        import_adapter(path, base)
    save_file({**change, "unet.conv_in.bias": base.network.conv_in.bias.clone()}, path)
    with pytest.raises(AdapterFormatError, match="biases"):
        import_adapter(path, base)
