from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from fade.adapters.card import CARD_NAME, DELTA_NAME, WEIGHTS_NAME, load_card
from fade.adapters.store import activate, apply_adapter, put_in, restore_base, save_adapter
from fade.errors import AdapterFormatError, ConfigError
from fade.files import sha256_file
from fade.methods.fade.masks import Mask, make_mask
from fade.methods.fade.saliency import random_saliency
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora, lora_layers
from fade.models.deltas import delta_weights
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base

MODULES = ("conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.1.resnets.0.conv1")


def _adapter(base: Path, folder: Path, *, seed: int = 1, base_sha256: str | None = None) -> Path:
    """An adapter that changes the output, trained alpha twice its rank."""
    sd = load_base(base)
    add_sparse_lora(sd.network, Mask("module", MODULES, 3, 3), rank=2, alpha=4.0, seed=seed, name="student")
    for layer in lora_layers(sd.network).values():
        torch.nn.init.normal_(layer.lora_B["student"].weight, generator=torch.Generator().manual_seed(seed))
    card = {"base_sha256": base_sha256 or sd.sha256, "trained_alpha": 4.0, "rank": 2}
    save_adapter(folder, adapter_tensors(sd.denoiser, "student"), card)
    return folder


def _predict(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([500, 500]), states).sample


def _delta_adapter(base: Path, folder: Path) -> tuple[Path, Tensor]:
    """An adapter of a weight mask, and what the network answers with it as trained."""
    sd = load_base(base)
    mask = make_mask(random_saliency(sd.network, "weight", seed=3), 0.2, granularity="weight")
    add_sparse_lora(sd.network, mask, rank=2, alpha=4.0, seed=1, name="student")
    for delta in delta_weights(sd.network).values():
        torch.nn.init.normal_(delta.parts["student"].lora_B, generator=torch.Generator().manual_seed(5))
    save_adapter(folder, adapter_tensors(sd.denoiser, "student"), {"base_sha256": sd.sha256})
    return folder, _predict(sd.network)


def test_a_weight_masks_adapter_loads_stacks_and_leaves_the_bases_bits(
    base: StableDiffusion, tiny_base: Path, tmp_path: Path
) -> None:
    folder, trained = _delta_adapter(tiny_base, tmp_path / "delta")
    assert load_card(folder)["type"] == "delta"
    base_output, bits = _predict(base.network), weights_sha256(base.network)
    assert not torch.allclose(trained, base_output, atol=1e-3)
    apply_adapter(base, folder, name="delta")
    assert torch.equal(_predict(base.network), base_output)
    activate(base, {"delta": 1.0})
    torch.testing.assert_close(_predict(base.network), trained, rtol=1e-2, atol=1e-2)  # stored as float16
    alone = _predict(base.network)
    apply_adapter(base, _adapter(tiny_base, tmp_path / "lora"), name="lora")
    assert torch.equal(_predict(base.network), alone)
    activate(base, {"delta": 1.0, "lora": 1.0})
    assert not torch.allclose(_predict(base.network), alone, atol=1e-3)
    activate(base, {"delta": 0.5})
    assert not torch.allclose(_predict(base.network), alone, atol=1e-3)
    activate(base, {})
    assert torch.equal(_predict(base.network), base_output)
    restore_base(base)
    assert weights_sha256(base.network) == bits


def test_a_weight_masks_adapter_of_another_network_is_refused(
    base: StableDiffusion, tiny_base: Path, tmp_path: Path
) -> None:
    folder, _ = _delta_adapter(tiny_base, tmp_path / "delta")
    tensors = load_file(folder / DELTA_NAME)
    some = next(key for key in tensors if key.endswith(".positions"))
    for broken, message in (
        ({**tensors, "unet.nowhere.positions": tensors[some]}, "nowhere found no module"),
        ({**tensors, some: tensors[some] + 10**8}, "positions outside the weight"),
        ({key: value for key, value in tensors.items() if key != some}, "lacks positions or values"),
    ):
        with pytest.raises(AdapterFormatError, match=message):
            put_in(base, broken, name="broken", origin="a test")


def test_equal_adapters_are_equal_bytes(tiny_base: Path, tmp_path: Path) -> None:
    one, two = _adapter(tiny_base, tmp_path / "one"), _adapter(tiny_base, tmp_path / "two")
    other = _adapter(tiny_base, tmp_path / "other", seed=2)
    for name in (WEIGHTS_NAME, CARD_NAME):
        assert sha256_file(one / name) == sha256_file(two / name)
        assert sha256_file(one / name) != sha256_file(other / name)


def test_loading_switching_stacking_and_restoring(base: StableDiffusion, tiny_base: Path, tmp_path: Path) -> None:
    base_output, bits = _predict(base.network), weights_sha256(base.network)
    for number in (1, 2):
        apply_adapter(base, _adapter(tiny_base, tmp_path / str(number), seed=number), name=f"a{number}")
        assert torch.equal(_predict(base.network), base_output), "a loaded adapter is off until it is activated"
    activate(base, {"a1": 1.0})
    first = _predict(base.network)
    activate(base, {"a2": 1.0})
    second = _predict(base.network)
    activate(base, {"a1": 1.0, "a2": 1.0})
    both = _predict(base.network)
    outputs = (base_output, first, second, both)
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outputs) for b in outputs[i + 1 :])
    activate(base, {"a1": 1.0, "a2": 0.0})
    torch.testing.assert_close(_predict(base.network), first)
    activate(base, {})
    assert torch.equal(_predict(base.network), base_output)
    restore_base(base)
    assert not lora_layers(base.network)
    assert weights_sha256(base.network) == bits
    assert torch.equal(_predict(base.network), base_output)


def test_active_adapters_stay_active_when_another_is_loaded(
    base: StableDiffusion, tiny_base: Path, tmp_path: Path
) -> None:
    apply_adapter(base, _adapter(tiny_base, tmp_path / "1"), name="one")
    activate(base, {"one": 0.7})
    output = _predict(base.network)
    apply_adapter(base, _adapter(tiny_base, tmp_path / "2", seed=2), name="two")
    assert base.active == {"one": 0.7}
    torch.testing.assert_close(_predict(base.network), output)


def test_stock_diffusers_loads_an_adapter_to_the_same_output(
    base: StableDiffusion, tiny_base: Path, tmp_path: Path
) -> None:
    folder = _adapter(tiny_base, tmp_path / "a")
    base_output = _predict(base.network)
    apply_adapter(base, folder, name="ours")
    activate(base, {"ours": 1.0})
    ours = _predict(base.network)
    assert not torch.allclose(ours, base_output, atol=1e-3)
    stock = StableDiffusionPipeline.from_pretrained(tiny_base, dtype=torch.float32)
    stock.load_lora_weights(folder)
    torch.testing.assert_close(_predict(stock.unet), ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CARD_NAME])
def test_a_changed_byte_is_refused(base: StableDiffusion, tiny_base: Path, tmp_path: Path, name: str) -> None:
    folder = _adapter(tiny_base, tmp_path / "a")
    load_card(folder)
    content = bytearray((folder / name).read_bytes())
    position = len(content) // 2 if name == WEIGHTS_NAME else content.index(b"adapter_sha256") + 20
    content[position] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterFormatError, match="was changed"):
        apply_adapter(base, folder, name="a")
    assert not lora_layers(base.network)


def test_an_adapter_of_another_base_is_refused(sd: StableDiffusion, tiny_base: Path, tmp_path: Path) -> None:
    folder = _adapter(tiny_base, tmp_path / "a", base_sha256="0" * 64)
    with pytest.raises(AdapterFormatError, match="belongs to the base 000000000000"):
        apply_adapter(sd, folder, name="a")


def test_a_tensor_that_finds_no_module_is_an_error(base: StableDiffusion, tmp_path: Path) -> None:
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(16, 2, 1, 1),
        "unet.nowhere.to_q.lora_A.weight": torch.ones(2, 4),
        "unet.nowhere.to_q.lora_B.weight": torch.ones(4, 2),
    }
    save_adapter(tmp_path / "a", tensors, {"base_sha256": base.sha256})
    with pytest.raises(AdapterFormatError, match="not used to its last tensor"):
        apply_adapter(base, tmp_path / "a", name="a")


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="not finite"):
        save_adapter(tmp_path / "a", {"unet.x.lora_A.weight": torch.tensor([float("nan")])}, {"base_sha256": "0"})
    assert not (tmp_path / "a").exists()


def test_missing_files_and_unknown_names_are_named(base: StableDiffusion, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"card\.json is missing"):
        load_card(tmp_path)
    folder = _adapter(tiny_base, tmp_path / "a")
    card = json.loads((folder / CARD_NAME).read_text())
    (folder / CARD_NAME).write_text(json.dumps({**card, "format": "other/9"}))
    with pytest.raises(AdapterFormatError, match="has the format 'other/9'"):
        load_card(folder)
    with pytest.raises(ConfigError, match="No adapter ghost is loaded"):
        activate(base, {"ghost": 1.0})
