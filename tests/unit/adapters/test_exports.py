"""Exports are judged by stock libraries: what they compute must be what this library computes."""

from __future__ import annotations

import json
import random
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fade.adapters import stock
from fade.adapters.card import WEIGHTS_NAME, load_card, weights_path
from fade.adapters.exports import Layout, export_adapter, import_adapter
from fade.adapters.stock import deviation
from fade.adapters.store import activate, apply_adapter, put_in, restore_base, save_adapter
from fade.errors import AdapterFormatError, ConfigError
from fade.files import sha256_file
from fade.methods.fade.masks import Mask
from fade.methods.fade.sparse_lora import adapter_tensors, add_sparse_lora, lora_layers
from fade.models.deltas import delta_weights, plain_modules
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.source import base_sha256
from tests.tiny import save_tiny_base

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
MODULES = tuple(sorted(("conv_in", "up_blocks.1.resnets.0.conv1", "mid_block.attentions.0.proj_in", QUERY)))
LORA_LAYOUTS: tuple[Layout, ...] = ("diffusers", "peft", "kohya")
# float16 tensors in float32 arithmetic on both sides: only the order of sums differs.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _predict(unet: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([500, 500]), states).sample


def _mask(base: StableDiffusion, kind: str) -> Mask:
    draw = torch.Generator().manual_seed(3)
    weights = {name: plain_modules(base.network)[name].weight for name in MODULES}
    if kind == "neuron":
        rows = {name: torch.arange(weight.shape[0]) % 3 == 0 for name, weight in weights.items()}
        columns = {name: torch.arange(weight.shape[1]) % 2 == 0 for name, weight in weights.items()}
        return Mask("neuron", MODULES, 1, 1, rows=rows, columns=columns)
    if kind == "weight":
        kept = {name: torch.rand(weight.shape, generator=draw) < 0.3 for name, weight in weights.items()}
        return Mask("weight", MODULES, 1, 1, weights=kept)
    every = tuple(sorted(plain_modules(base.network)))
    return Mask("module", every if kind == "every module" else MODULES, 1, 1)


def _adapter(base: Path, folder: Path, kind: str) -> Path:
    """An adapter that changes the output, trained with alpha twice its rank."""
    sd, draw = load_base(base), torch.Generator().manual_seed(1)
    add_sparse_lora(sd.network, mask := _mask(sd, kind), rank=2, alpha=4.0, seed=1, name="student")
    for name, layer in lora_layers(sd.network).items():
        weight = layer.lora_B["student"].weight
        torch.nn.init.normal_(weight, std=0.3, generator=draw)
        if name in mask.rows:
            weight.data *= mask.rows[name].view(-1, *[1] * (weight.dim() - 1))
    for delta in delta_weights(sd.network).values():
        torch.nn.init.normal_(delta.parts["student"].lora_B, std=0.3, generator=draw)
    save_adapter(folder, adapter_tensors(sd.denoiser, "student"), {"base_sha256": sd.sha256})
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    kinds = ("module", "neuron", "weight", "every module")
    return {kind: _adapter(tiny_base, folder / kind.replace(" ", "_"), kind) for kind in kinds}


@pytest.fixture(scope="module")
def ours(tiny_base: Path, adapters: dict[str, Path]) -> Callable[..., Tensor]:
    """What this library predicts with an adapter; it is not what the base predicts."""
    sd = load_base(tiny_base)
    plain = _predict(sd.network)

    def predict(kind: str, strength: float = 1.0) -> Tensor:
        apply_adapter(sd, adapters[kind], name="a")
        activate(sd, {"a": strength})
        found = _predict(sd.network)
        restore_base(sd)
        assert (found - plain).abs().max() > 1e-2
        return found

    return predict


def _stock(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def _out(folder: Path, layout: str) -> Path:
    return folder / ("out.safetensors" if layout in ("kohya", "difference") else "out")


def _stock_prediction(tiny_base: Path, exported: Path, layout: Layout) -> Tensor:
    """Through libraries that know nothing of this one."""
    stock = _stock(exported if layout == "merged" else tiny_base)
    if layout in ("diffusers", "kohya"):
        stock.load_lora_weights(exported)
    elif layout == "peft":
        return _predict(PeftModel.from_pretrained(stock.unet, exported))
    elif layout == "difference":
        weights = stock.unet.state_dict()
        for key, tensor in load_file(exported).items():
            assert tensor.dtype == torch.float32
            weights[key.removeprefix("unet.")] += tensor
    return _predict(stock.unet)


def _for_merging(tiny_base: Path, adapter: Path, folder: Path) -> tuple[Path, Path]:
    """The base stored in float32, and the adapter bound to it: the tiny base is float16 and rounds a sum."""
    _stock(tiny_base).save_pretrained(folder / "base32")
    card = {"base_sha256": base_sha256(folder / "base32")}
    save_adapter(folder / "for32", load_file(weights_path(adapter, load_card(adapter))), card)
    return folder / "base32", folder / "for32"


CASES = [(kind, layout) for kind in ("module", "neuron", "every module") for layout in (*LORA_LAYOUTS, "merged")]
CASES += [("neuron", "difference"), ("weight", "difference"), ("weight", "merged")]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_stock_libraries_predict_what_this_one_predicts(
    tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], ours: Callable[..., Tensor], kind: str, layout: Layout
) -> None:
    base, adapter = tiny_base, adapters[kind]
    if layout == "merged":
        base, adapter = _for_merging(tiny_base, adapter, tmp_path)
    out = export_adapter(adapter, _out(tmp_path, layout), layout=layout, base=base)
    torch.testing.assert_close(_stock_prediction(tiny_base, out, layout), ours(kind), **CLOSE)


@pytest.mark.parametrize("layout", [*LORA_LAYOUTS, "difference", "merged"])
def test_an_export_is_checked_by_loading_it_back_and_a_lost_part_is_found(
    tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], layout: Layout
) -> None:
    adapter, out = adapters["neuron"], _out(tmp_path, layout)
    export_adapter(adapter, out, layout=layout, strength=0.5, base=tiny_base if layout == "merged" else None)
    given = {"layout": layout, "adapter": adapter, "base": tiny_base}
    assert deviation(out, strength=0.5, **given) < (0.1 if layout == "merged" else 1e-3)
    with pytest.raises(AdapterFormatError, match="a tensor or a factor is lost"):
        deviation(out, strength=1.0, **given)
    if layout == "merged":
        return
    file = next(out.rglob("*.safetensors")) if out.is_dir() else out
    with safe_open(file, framework="pt") as stored:
        tensors, metadata = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()  # noqa: SIM118
    gone = next(key for key in sorted(tensors) if key.endswith(("lora_B.weight", "lora_up.weight", ".weight")))
    save_file({**tensors, gone: torch.zeros_like(tensors[gone])}, file, metadata)
    with pytest.raises(AdapterFormatError, match="a tensor or a factor is lost"):
        deviation(out, strength=0.5, **given)


def test_the_two_models_are_never_held_at_once(
    tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, held = tmp_path / "out.safetensors", []
    export_adapter(adapters["neuron"], out, layout="kohya")
    load, theirs = stock.load_base, stock._stock_network

    def remembered(base: Path) -> Any:
        loaded = load(base)
        held.append(weakref.ref(loaded.network))
        assert held[-1]() is not None
        return loaded

    def alone(*given: Any) -> Any:
        assert [one() for one in held] == [None]
        return theirs(*given)

    monkeypatch.setattr(stock, "load_base", remembered)
    monkeypatch.setattr(stock, "_stock_network", alone)
    assert stock.deviation(out, layout="kohya", adapter=adapters["neuron"], base=tiny_base) < 1e-3
    assert len(held) == 1


@pytest.mark.parametrize("layout", [*LORA_LAYOUTS, "difference", "merged"])
def test_strength_scales_the_difference(
    tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], ours: Callable[..., Tensor], layout: Layout
) -> None:
    base, adapter = tiny_base, adapters["module"]
    if layout == "merged":
        base, adapter = _for_merging(tiny_base, adapter, tmp_path)
    out = export_adapter(adapter, _out(tmp_path, layout), layout=layout, base=base, strength=0.4)
    expected = ours("module", 0.4)
    assert (expected - ours("module")).abs().max() > 1e-2
    torch.testing.assert_close(_stock_prediction(tiny_base, out, layout), expected, **CLOSE)


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_modules_of_different_ranks_keep_their_strength(
    base: StableDiffusion, tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], layout: Layout
) -> None:
    tensors = load_file(adapters["module"] / WEIGHTS_NAME)
    for part, dim in (("A", 0), ("B", 1)):
        key = f"unet.{QUERY}.lora_{part}.weight"
        tensors[key] = tensors[key].narrow(dim, 0, 1)
    save_adapter(tmp_path / "a", tensors, {"base_sha256": base.sha256})
    plain = _predict(base.network)
    put_in(base, load_file(tmp_path / "a" / WEIGHTS_NAME), name="a", origin="test")
    activate(base, {"a": 1.0})
    expected = _predict(base.network)
    assert (expected - plain).abs().max() > 1e-2
    out = export_adapter(tmp_path / "a", _out(tmp_path, layout), layout=layout)
    torch.testing.assert_close(_stock_prediction(tiny_base, out, layout), expected, **CLOSE)
    back = import_adapter(out, load_base(tiny_base))
    assert len(back[f"unet.{QUERY}.lora_A.weight"]) == (2 if layout == "kohya" else 1)
    product = back[f"unet.{QUERY}.lora_B.weight"] @ back[f"unet.{QUERY}.lora_A.weight"]
    asked = tensors[f"unet.{QUERY}.lora_B.weight"].float() @ tensors[f"unet.{QUERY}.lora_A.weight"].float()
    torch.testing.assert_close(product, asked, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["neuron", "every module"])
@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_a_lora_comes_back_as_it_went(
    base: StableDiffusion, tmp_path: Path, adapters: dict[str, Path], layout: Layout, kind: str
) -> None:
    before = load_file(adapters[kind] / WEIGHTS_NAME)
    out = export_adapter(adapters[kind], _out(tmp_path, layout), layout=layout)
    back = import_adapter(out, base)
    assert set(back) == set(before)
    for key, tensor in before.items():
        assert torch.equal(back[key], tensor.float()), key
    assert import_adapter(out, base, layout=layout).keys() == back.keys()


@pytest.mark.parametrize("kind", ["module", "weight"])
def test_a_difference_comes_back_as_it_went(
    sd: StableDiffusion,
    tiny_base: Path,
    tmp_path: Path,
    adapters: dict[str, Path],
    ours: Callable[..., Tensor],
    kind: str,
) -> None:
    expected = ours(kind)
    out = export_adapter(adapters[kind], tmp_path / "d.safetensors", layout="difference", base=tiny_base)
    back = import_adapter(out, sd)
    if kind == "weight":
        before = load_file(adapters[kind] / "weight_delta.safetensors")
        for module in MODULES:
            kept = before[f"unet.{module}.values"] != 0
            assert torch.equal(back[f"unet.{module}.positions"], before[f"unet.{module}.positions"][kept])
            assert torch.equal(back[f"unet.{module}.values"], before[f"unet.{module}.values"][kept].float())
    put_in(sd, back, name="back", origin="test")
    activate(sd, {"back": 1.0})
    torch.testing.assert_close(_predict(sd.network), expected, **CLOSE)


def _foreign(folder: Path, layout: str) -> tuple[Path, Tensor, Tensor]:
    """A LoRA of rank 4 with alpha 2 as other tools write it: half of B A."""
    draw = torch.Generator().manual_seed(5)
    a, b = torch.randn(4, 32, generator=draw), torch.randn(32, 4, generator=draw)
    if layout == "kohya":
        name, path = f"lora_unet_{QUERY.replace('.', '_')}", folder / "foreign.safetensors"
        tensors = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(2.0)}
        save_file(tensors, path)
    elif layout == "peft":
        path = folder / "foreign"
        path.mkdir()
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["to_q"]}
        config |= {"rank_pattern": {"attn2.to_q": 4}, "alpha_pattern": {"attn2.to_q": 2}}
        (path / "adapter_config.json").write_text(json.dumps(config))
        prefix = f"base_model.model.{QUERY}"
        save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, path / "adapter_model.safetensors")
    else:
        path = folder / "foreign.safetensors"
        tensors = {f"unet.{QUERY}.lora_A.weight": a, f"unet.{QUERY}.lora_B.weight": b}
        config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": [QUERY]}
        save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(config)})
    return path, a, b


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_a_foreign_alpha_is_honoured(base: StableDiffusion, tiny_base: Path, tmp_path: Path, layout: Layout) -> None:
    path, a, b = _foreign(tmp_path, layout)
    tensors = import_adapter(path, base)
    assert torch.equal(tensors[f"unet.{QUERY}.lora_A.weight"], a)
    torch.testing.assert_close(tensors[f"unet.{QUERY}.lora_B.weight"], b / 2, rtol=1e-6, atol=0)
    plain = _predict(base.network)
    put_in(base, tensors, name="foreign", origin="test")
    activate(base, {"foreign": 1.0})
    found = _predict(base.network)
    assert (found - plain).abs().max() > 1e-2
    weight = (stock := _stock(tiny_base).unet).get_submodule(QUERY).weight
    weight.data += 0.5 * b @ a
    torch.testing.assert_close(found, _predict(stock), **CLOSE)
    if layout != "peft":  # stock peft would want the to_q this file leaves out
        torch.testing.assert_close(_stock_prediction(tiny_base, path, layout), found, **CLOSE)


def test_rank_stabilised_scaling_is_honoured_and_dora_refused(base: StableDiffusion, tmp_path: Path) -> None:
    path, _, b = _foreign(tmp_path, "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    torch.testing.assert_close(import_adapter(path, base)[f"unet.{QUERY}.lora_B.weight"], b, rtol=1e-6, atol=0)
    for change in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"rank_pattern": {}}):
        (path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(AdapterFormatError, match=r"no plain LoRA|configuration says 8"):
            import_adapter(path, base)


@pytest.mark.parametrize("layout", [*LORA_LAYOUTS, "difference", "merged"])
def test_equal_exports_are_equal_bytes(
    tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], layout: Layout
) -> None:
    digests = []
    for name in ("one", "two"):
        out = export_adapter(adapters["module"], _out(tmp_path / name, layout), layout=layout, base=tiny_base)
        files = sorted(path for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file())
        digests.append([(path.relative_to(out.parent), sha256_file(path)) for path in files])
        assert [path.name for path in (tmp_path / name).iterdir()] == [out.name]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("layout", LORA_LAYOUTS)
def test_a_weight_level_adapter_is_refused_as_a_lora(tmp_path: Path, adapters: dict[str, Path], layout: Layout) -> None:
    with pytest.raises(AdapterFormatError, match="'difference' or 'merged'"):
        export_adapter(adapters["weight"], _out(tmp_path, layout), layout=layout)
    assert not list(tmp_path.iterdir())


def test_modules_that_kohyas_names_lose_are_named(base: StableDiffusion, tmp_path: Path) -> None:
    tensors = {
        f"unet.{module}.lora_{part}.weight": torch.ones(2, 2)
        for module in ("add_embedding.linear_1", "class_embedding.linear_2", "time_embedding.linear_1")
        for part in "AB"
    }
    save_adapter(tmp_path / "a", tensors, {"base_sha256": base.sha256})
    with pytest.raises(AdapterFormatError, match=r"hold add_embedding\.linear_1, class_embedding\.linear_2: diff"):
        export_adapter(tmp_path / "a", tmp_path / "k.safetensors", layout="kohya")
    assert not (tmp_path / "k.safetensors").exists()


def test_a_merged_model_keeps_the_bases_precision_and_everything_but_the_change(
    sd: StableDiffusion, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(sd.folder, half)
    (half / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"weights before the change")
    tensors = load_file(adapters["module"] / WEIGHTS_NAME)
    out = export_adapter(adapters["module"], tmp_path / "merged", layout="merged", base=half)
    assert not list(out.rglob("*.bin"))
    before, after = (load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (half, out))
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert {key for key in after if not torch.equal(after[key], before[key])} == {f"{m}.weight" for m in MODULES}
    for module in MODULES:
        a, b = (tensors[f"unet.{module}.lora_{part}.weight"].float().flatten(1) for part in "AB")
        expected = before[f"{module}.weight"].float() + (b @ a).view_as(before[f"{module}.weight"])
        # One rounding to float16: half a unit in the last of 11 bits.
        torch.testing.assert_close(after[f"{module}.weight"].float(), expected, rtol=2**-11, atol=1e-7)
    for part in ("vae", "text_encoder"):
        assert sorted(map(sha256_file, (half / part).iterdir())) == sorted(map(sha256_file, (out / part).iterdir()))


def test_another_base_is_refused(tmp_path: Path, adapters: dict[str, Path]) -> None:
    save_tiny_base(tmp_path / "other", seed=9)
    for layout in ("merged", "difference"):
        with pytest.raises(AdapterFormatError, match="belongs to the base"):
            export_adapter(adapters["module"], _out(tmp_path, layout), layout=layout, base=tmp_path / "other")
    with pytest.raises(ConfigError, match="give the base's folder"):
        export_adapter(adapters["module"], tmp_path / "out", layout="merged")
    with pytest.raises(ConfigError, match="give the base's folder"):
        export_adapter(adapters["weight"], tmp_path / "out.safetensors", layout="difference")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_damaged_adapter_is_not_exported(tiny_base: Path, tmp_path: Path) -> None:
    folder = _adapter(tiny_base, tmp_path / "a", "module")
    content = bytearray((folder / WEIGHTS_NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(AdapterFormatError, match="was changed"):
        export_adapter(folder, tmp_path / "out", layout="diffusers")


def test_other_peoples_files_are_not_replaced(tmp_path: Path, adapters: dict[str, Path]) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "precious.safetensors").write_bytes(b"1")
    for layout in ("diffusers", "peft", "merged"):
        with pytest.raises(ConfigError, match="exists"):
            export_adapter(adapters["module"], tmp_path / "loras", layout=layout)
    with pytest.raises(ConfigError, match=r"ends in \.safetensors"):
        export_adapter(adapters["module"], tmp_path / "loras", layout="kohya")
    with pytest.raises(ConfigError, match="Unknown layout"):
        export_adapter(adapters["module"], tmp_path / "x", layout="ldm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="finite"):
        export_adapter(adapters["module"], tmp_path / "x", layout="peft", strength=float("nan"))


@pytest.mark.parametrize("layout", [*LORA_LAYOUTS, "difference"])
def test_tensors_without_a_use_are_named(
    sd: StableDiffusion, tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], layout: Layout
) -> None:
    out = export_adapter(adapters["module"], _out(tmp_path, layout), layout=layout, base=tiny_base)
    import_adapter(out, sd)
    path = next(out.glob("*.safetensors")) if out.is_dir() else out
    tensors, bits = load_file(path), weights_sha256(sd.network)
    one = next(key for key in sorted(tensors) if "conv_in" in key)
    key = one.replace("conv_in", "conv_inn")
    save_file({**tensors, key: tensors[one].clone()}, path)
    with pytest.raises(AdapterFormatError, match="finds no use") as raised:
        import_adapter(out, sd, layout=layout)
    assert f": {key} finds no use" in str(raised.value)
    assert "Did you mean" in str(raised.value)
    # What is of a known kind is called by its name.
    for key, kind in ((f"lora_te_{one}", "text encoder"), (f"{one.rpartition('.')[0]}.dora_scale", "DoRA")):
        save_file({**tensors, key: tensors[one].clone()}, path)
        with pytest.raises(AdapterFormatError, match=kind):
            import_adapter(out, sd, layout=layout)
    save_file({key: tensor[..., :1].clone() if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}, path)
    with pytest.raises(AdapterFormatError, match="the base's weight"):
        import_adapter(out, sd)
    save_file({key: tensor for key, tensor in tensors.items() if key != one and "lora_" in key}, path)
    if layout in ("diffusers", "peft"):
        with pytest.raises(AdapterFormatError, match="lacks a half"):
            import_adapter(out, sd)
    assert weights_sha256(sd.network) == bits


@pytest.mark.parametrize("seed", [1, 2])
def test_a_hundred_random_operations_leave_the_bases_bits(
    tiny_base: Path, tmp_path: Path, adapters: dict[str, Path], seed: int
) -> None:
    """Load, stack, switch, merge into a copy, take out: adapters of all granularities, in any order."""
    sd, draw = load_base(tiny_base), random.Random(seed)
    bits, untouched = weights_sha256(sd.network), _predict(sd.network)
    loaded: list[str] = []
    counted: Counter[str] = Counter()
    for number in range(100):
        action = draw.choice(["load", "load", "stack", "stack", "off", "merge", "restore"])
        changed = False
        if action == "load":
            loaded.append(f"a{number}")
            apply_adapter(sd, adapters[draw.choice(sorted(adapters))], name=loaded[-1])
        elif action == "stack" and loaded:
            chosen = draw.sample(loaded, draw.randint(1, min(3, len(loaded))))
            activate(sd, {name: draw.uniform(0.2, 1.5) for name in chosen})
            changed = True
        elif action == "off":
            activate(sd, {})
        elif action == "merge":
            folder = adapters[draw.choice(sorted(adapters))]
            merged = export_adapter(folder, tmp_path / f"merged{number}", layout="merged", base=tiny_base)
            assert base_sha256(merged) != sd.sha256
        elif action == "restore":
            restore_base(sd)
            loaded.clear()
        counted[action] += 1
        assert base_sha256(tiny_base) == sd.sha256
        if changed:
            assert not torch.equal(_predict(sd.network), untouched)
        elif action in ("off", "restore"):
            assert torch.equal(_predict(sd.network), untouched)
    assert min(counted.values()) >= 5
    restore_base(sd)
    assert weights_sha256(sd.network) == bits
    assert torch.equal(_predict(sd.network), untouched)


def test_a_kohya_alpha_of_several_numbers_is_refused(
    base: StableDiffusion, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    file = export_adapter(adapters["module"], tmp_path / "kohya.safetensors", layout="kohya")
    tensors = load_file(file)
    assert import_adapter(file, base)
    name = next(key for key in tensors if key.endswith(".alpha"))
    tensors[name] = torch.ones(2)
    save_file(tensors, file)
    with pytest.raises(AdapterFormatError, match="one finite number"):
        import_adapter(file, base)


def test_only_safetensors_are_read(base: StableDiffusion, tmp_path: Path, adapters: dict[str, Path]) -> None:
    torch.save({"unet.conv_in.weight": torch.ones(1)}, tmp_path / "a.bin")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.bin").read_bytes())
    for source, message in (
        (tmp_path / "a.bin", "only that format"),
        (tmp_path / "a.safetensors", "not a safetensors file"),
        (tmp_path / "none", "No safetensors file"),
        (tmp_path, "No adapter in"),
        (adapters["module"], "adapter of this library already"),
        (base.folder, "whole model"),
    ):
        with pytest.raises(AdapterFormatError, match=message):
            import_adapter(source, base)
