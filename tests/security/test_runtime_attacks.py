"""What is done to a pipeline so that it draws what is erased: each changes pictures, and each is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from numpy.typing import NDArray
from tokenizers import normalizers
from torch import nn

from benchmarks.tiny.families import KINDS, save_tiny
from benchmarks.tiny.stock import stock_pipeline
from fade.adapters.integrity import check_against_files
from fade.adapters.overlay import Overlay, using
from fade.adapters.runtime import Runtime
from fade.adapters.store import activate, apply_adapter
from fade.errors import BaseModelError, FadeError, RefusedError
from fade.models.base import Base
from fade.models.family import load_base, read_pipeline
from fade.models.generate import generate_batch
from fade.models.source import find_base
from tests.unit.adapters.test_adapters import _adapter, _predict
from tests.unit.adapters.test_runtime import PROMPTS, Release, picture
from tests.unit.models.test_families import _single_file

Attack = Callable[[Base, Path], Any]


@pytest.fixture(scope="module")
def erasing(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release with one adapter."""
    folder = tmp_path_factory.mktemp("erasing")
    release = Release(folder, tiny_base, Ed25519PrivateKey.generate())
    release.publish(_adapter(tiny_base, folder / "pool/1"))
    return release


@pytest.fixture(scope="module")
def other(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that nobody released, as one that undoes an erasure is."""
    return _adapter(tiny_base, tmp_path_factory.mktemp("other") / "1", seed=7)


def _start(release: Release, base: Base) -> Runtime:
    return Runtime(base, release.folder, public_key=release.key.public_key(), state=release.state)


def _unchecked(runtime: Runtime) -> NDArray[np.uint8]:
    """A picture under the live adapters, without the runtime's looks at its pipeline."""
    with using(runtime.refresh().adapters):
        return generate_batch(runtime.base, PROMPTS, [1], steps=2, guidance=2.0, solver="ddim")


def _edited(of: Callable[[Any], torch.Tensor]) -> Attack:
    """A weight edited as merging scripts do: past torch's counter of versions."""

    def edit(base: Base, _: Path) -> None:
        weight = of(base.pipeline)
        before = weight._version
        weight.data += 0.3 * torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight).sin()
        assert weight._version == before

    return edit


def _anti_adapter(base: Base, other: Path) -> None:
    apply_adapter(base, other, name="anti")
    activate(base, {"anti": 1.0})


def _other_spelling(base: Base, _: Path) -> None:
    backend = base.pipeline.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([backend.normalizer, normalizers.Replace("cat", "horse")])


def _other_noise(base: Base, _: Path) -> None:
    base.pipeline.scheduler = DDIMScheduler.from_config(base.pipeline.scheduler.config, beta_end=0.3)


def _no_middle(base: Base, _: Path) -> None:
    base.network.mid_block.register_forward_hook(lambda _module, inputs, _output: inputs[0])


def _another_denoiser(base: Any, _: Path) -> None:
    """In the pipeline, and where the loaded base keeps what it knows of it."""
    base.pipeline.unet = load_base(base.folder).network
    vars(base).pop("denoiser")


EVERYWHERE: dict[str, Attack] = {
    "fused projections": lambda base, _: base.pipeline.fuse_qkv_projections(),
    "a bias": _edited(lambda pipe: pipe.unet.conv_out.bias),
    "a norm": _edited(lambda pipe: pipe.unet.conv_norm_out.weight),
    "a convolution": _edited(lambda pipe: pipe.unet.conv_in.weight),
    "the text encoder": _edited(lambda pipe: pipe.text_encoder.get_input_embeddings().weight),
    "the autoencoder": _edited(lambda pipe: pipe.vae.decoder.conv_out.bias),
    "an anti-adapter": _anti_adapter,
    "free lunch": lambda base, _: base.pipeline.enable_freeu(s1=0.1, s2=0.1, b1=3.0, b2=3.0),
    "a hook": _no_middle,
    "a forward": lambda base, _: setattr(base.network.mid_block, "forward", lambda hidden, *_, **__: hidden),
    "a setting": lambda base, _: setattr(base.network.conv_norm_out, "eps", 10.0),
    "the tokenizer": _other_spelling,
    "the noise": _other_noise,
}
AFTERWARDS: dict[str, Attack] = {
    "another denoiser": _another_denoiser,
    "its memory": lambda base, _: vars(base.network.conv_in).update(_parameters={
        "weight": nn.Parameter(0.5 * base.network.conv_in.weight, requires_grad=False),
        "bias": base.network.conv_in.bias,
    }),
}  # fmt: skip


@pytest.mark.parametrize("attack", [*EVERYWHERE, *AFTERWARDS])
def test_a_pipeline_that_was_changed_after_the_runtime_began_draws_nothing(
    attack: str, erasing: Release, tiny_base: Path, other: Path
) -> None:
    with closing(_start(erasing, load_base(tiny_base))) as runtime:
        erased = picture(runtime)
        assert np.array_equal(_unchecked(runtime), erased)
        (EVERYWHERE | AFTERWARDS)[attack](runtime.base, other)
        assert not np.array_equal(_unchecked(runtime), erased)
        for draw in (lambda: picture(runtime), lambda: runtime(PROMPTS[0], num_inference_steps=1)):
            with pytest.raises(RefusedError, match="not what it was when the runtime began"):
                draw()


@pytest.mark.parametrize("attack", EVERYWHERE)
def test_a_pipeline_that_is_not_its_files_gets_no_runtime(
    attack: str, erasing: Release, tiny_base: Path, other: Path
) -> None:
    base = load_base(tiny_base)
    plain = generate_batch(base, PROMPTS, [1], steps=2, guidance=2.0, solver="ddim")
    EVERYWHERE[attack](base, other)
    if attack != "fused projections":  # without an adapter on them they answer the same
        assert not np.array_equal(generate_batch(base, PROMPTS, [1], steps=2, guidance=2.0, solver="ddim"), plain)
    with pytest.raises(BaseModelError, match=r"The pipeline is not the base in .* differ"):
        _start(erasing, base)


def test_a_class_that_was_changed_for_the_whole_program_is_seen(
    erasing: Release, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(_start(erasing, load_base(tiny_base))) as runtime:
        erased = picture(runtime)
        monkeypatch.setattr(type(runtime.unet.mid_block), "forward", lambda _self, hidden, *_, **__: hidden)
        assert not np.array_equal(_unchecked(runtime), erased)
        with pytest.raises(RefusedError, match=r"UNetMidBlock2DCrossAttn\.forward changed"):
            picture(runtime)
        monkeypatch.undo()
        assert np.array_equal(picture(runtime), erased)


def test_offloading_hooks_are_refused_because_their_removal_takes_the_adapters_off(
    erasing: Release, tiny_base: Path
) -> None:
    hooked = load_base(tiny_base)
    plain = _predict(hooked.network)
    for module in hooked.network.modules():
        add_hook_to_module(module, ModelHook())
    overlay = Overlay(hooked.denoiser)
    with using(overlay.prepare([])):
        assert torch.equal(_predict(hooked.network), plain)
    remove_hook_from_module(hooked.network, recurse=True)
    assert torch.equal(_predict(hooked.network), plain), "no request is open, and nothing refuses: the overlay is gone"
    hooked = load_base(tiny_base)
    for module in hooked.network.modules():
        add_hook_to_module(module, ModelHook())
    with pytest.raises(BaseModelError, match=r"forward.* differ"):
        _start(erasing, hooked)
    with closing(_start(erasing, load_base(tiny_base))) as runtime:
        erased = picture(runtime)
        add_hook_to_module(runtime.unet, ModelHook())
        with pytest.raises(RefusedError, match=r"unet\._hf_hook"):
            picture(runtime)
        remove_hook_from_module(runtime.unet)
        assert np.array_equal(picture(runtime), erased)


def test_the_denoiser_computes_in_its_own_runtimes_requests_alone(erasing: Release, tiny_base: Path) -> None:
    plain = load_base(tiny_base)
    answer = _predict(plain.network)
    with closing(_start(erasing, load_base(tiny_base))) as runtime, closing(_start(erasing, plain)) as second:
        unet = runtime.unet
        latents, states = torch.zeros(1, 4, 16, 16), torch.zeros(1, 16, 32)
        ways: list[Callable[[], Any]] = [
            lambda: _predict(unet),
            lambda: unet.forward(latents, 1, states),
            lambda: type(unet).forward(unet, latents, 1, states),
            lambda: unet.conv_in(latents),
            lambda: unet.conv_in.forward(latents),
        ]
        for way in ways:
            with pytest.raises(RefusedError, match="computes only for its requests"):
                way()
            # Another runtime's request is none of this one's.
            with second.serving(), pytest.raises(RefusedError, match="computes only for its requests"):
                way()
            with runtime.serving():
                way()
        with runtime.serving():
            assert not torch.allclose(_predict(unet), answer, atol=1e-3)


def test_what_a_callback_changes_between_two_steps_is_seen_at_the_end(erasing: Release, tiny_base: Path) -> None:
    def exchange(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.unet = load_base(tiny_base).network
        return {}

    def edit(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe.unet.conv_out.bias.data += 1
        return {}

    for callback, changed in ((exchange, "the pipeline's unet"), (edit, r"unet\.conv_out\.bias")):
        with closing(_start(erasing, load_base(tiny_base))) as runtime:
            runtime(PROMPTS[0], num_inference_steps=2, callback_on_step_end=lambda *_: {})
            with pytest.raises(RefusedError, match=f"{changed} changed"):
                runtime(PROMPTS[0], num_inference_steps=2, callback_on_step_end=callback)


def test_what_changes_nothing_in_a_picture_goes_on(erasing: Release, tiny_base: Path) -> None:
    base = load_base(tiny_base)
    base.pipeline.vae.enable_slicing()
    with closing(_start(erasing, base)) as runtime:
        erased = picture(runtime)
        for part in (runtime.unet, runtime.vae):
            for module in part.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:  # as moving a pipeline to another device does
                        module._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
        runtime.vae.disable_slicing()
        runtime.pipeline.scheduler = EulerDiscreteScheduler.from_config(runtime.scheduler.config)
        assert np.array_equal(picture(runtime), erased)
        runtime(PROMPTS[0], num_inference_steps=1)
        runtime.unet.conv_in.weight.data[0, 0, 0] += 1e-3
        with pytest.raises(RefusedError, match=r"unet\.conv_in\.weight changed"):
            picture(runtime)
        runtime.unet.conv_in.weight.data = load_base(tiny_base).network.conv_in.weight.data
        assert np.array_equal(picture(runtime), erased), "it is what it was again"


@contextmanager
def _swapped(path: Path) -> Iterator[None]:
    """Two words of a vocabulary exchanged."""
    kept = path.read_bytes()
    content = json.loads(kept)
    words = content.get("model", content).get("vocab", content)
    words["cat</w>"], words["horse</w>"] = words["horse</w>"], words["cat</w>"]
    path.write_text(json.dumps(content))
    yield
    path.write_bytes(kept)


def test_a_vocabulary_behind_a_linked_folder_belongs_to_the_base(
    erasing: Release, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.move(tmp_path / "base/tokenizer", tmp_path / "elsewhere")
    (tmp_path / "base/tokenizer").symlink_to(tmp_path / "elsewhere")
    linked = Release(tmp_path, tmp_path / "base", erasing.key)
    linked.publish()
    vocabulary = next(tmp_path.glob("elsewhere/tokenizer.json"))
    plain = generate_batch(load_base(linked.base), PROMPTS, [1], steps=2, guidance=2.0, solver="ddim")
    with _swapped(vocabulary):
        swapped = load_base(linked.base)
        drawn = generate_batch(swapped, PROMPTS, [1], steps=2, guidance=2.0, solver="ddim")
        assert not np.array_equal(drawn, plain)
        with pytest.raises(FadeError, match=r"tokenizer/tokenizer\.json"):
            _start(linked, swapped)
    # Nor may a pipeline keep what its files held for a moment.
    with pytest.raises(BaseModelError, match="tokenizer differ"):
        _start(linked, swapped)
    with closing(_start(linked, load_base(linked.base))) as runtime:
        assert np.array_equal(picture(runtime), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_base_as_it_was_loaded_is_its_files(kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", kind)
    anew = read_pipeline(find_base(folder))
    half = stock_pipeline(folder).to(torch.float16)
    for pipeline in (
        stock_pipeline(folder),
        half,
        *(load_base(folder, weights=held).pipeline for held in ("fp32", "bf16")),
    ):
        check_against_files(pipeline, anew, origin=folder)
    if (folder / "unet").is_dir():  # of the others no single file is read
        single = _single_file(folder, tmp_path / "one.safetensors")
        shutil.copytree(folder, single.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "unet/config.json").read_text())
        (folder / "unet/config.json").write_text(json.dumps({**config, "sample_size": [config["sample_size"]] * 2}))
        for pipeline in (stock_pipeline(folder), load_base(folder).pipeline):
            check_against_files(pipeline, read_pipeline(find_base(folder)), origin=folder)
        check_against_files(load_base(single).pipeline, read_pipeline(find_base(single)), origin=single)
    another = save_tiny(tmp_path / "another", kind, seed=5)
    with pytest.raises(BaseModelError, match=r"weight.* differ"):
        check_against_files(stock_pipeline(another), anew, origin=folder)
