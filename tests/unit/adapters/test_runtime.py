from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from fade.adapters.card import load_card, weights_path
from fade.adapters.manifest import MANIFEST_NAME, PERMISSION_NAME, Manifest, permit, publish, read_manifest
from fade.adapters.overlay import Changed, Factors, Overlay, using
from fade.adapters.runtime import Runtime
from fade.adapters.store import activate, apply_adapter
from fade.errors import AdapterFormatError, BaseModelError, ConfigError, RefusedError, SignatureError
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.family import load_base
from fade.models.generate import generate_batch
from fade.signing import KEY_VARIABLE, canonical, public_key, read_signed, sign, signing_key, verify, write_signed
from tests.chaos import swap, tamper
from tests.unit.adapters.test_adapters import _adapter, _delta_adapter, _predict

PROMPTS = ["a cat image in neon style."]


@pytest.fixture(scope="module")
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two low-rank adapters and one sparse difference."""
    folder = tmp_path_factory.mktemp("adapters")
    found = [_adapter(tiny_base, folder / str(seed), seed=seed) for seed in (1, 2)]
    return [*found, _delta_adapter(tiny_base, folder / "delta")[0]]


class Release:
    """A release of the tiny base, and a runtime on it."""

    def __init__(self, folder: Path, base: Path, key: Ed25519PrivateKey) -> None:
        self.folder, self.base, self.key = folder / "release", base, key
        self.state = folder / "state.json"

    def publish(self, *adapters: Path, weight: float = 1.0) -> Manifest:
        named = [(f"erasure-{folder.parent.name}-{folder.name}/1", folder, weight) for folder in adapters]
        return publish(self.folder, named, base=self.base, key=self.key)

    def runtime(self) -> Runtime:
        return Runtime(load_base(self.base), self.folder, public_key=self.key.public_key(), state=self.state)


@pytest.fixture
def release(tmp_path: Path, tiny_base: Path, key: Ed25519PrivateKey) -> Release:
    return Release(tmp_path, tiny_base, key)


def picture(runtime: Runtime, seed: int = 1) -> NDArray[np.uint8]:
    return runtime.generate(PROMPTS, [seed], steps=2, guidance=2.0)[0]


def reference(base: Path, adapters: list[Path], seed: int = 1) -> NDArray[np.uint8]:
    """The same through peft: an implementation that shares no line with the overlay."""
    sd = load_base(base)
    for i, folder in enumerate(adapters):
        apply_adapter(sd, folder, name=f"a{i}")
    activate(sd, {f"a{i}": 1.0 for i in range(len(adapters))})
    return generate_batch(sd, PROMPTS, [seed], steps=2, guidance=2.0, solver="ddim")


# --- signed files ---


def test_a_signed_file_has_one_spelling_and_any_other_is_refused(key: Ed25519PrivateKey) -> None:
    payload = {"b": [1, 2.5, None], "a": "Zoë"}
    data = sign(payload, "test/1", key)
    assert verify(data, "test/1", key.public_key(), origin="x") == payload
    other = Ed25519PrivateKey.generate()
    for changed, message in (
        (data.replace(b'  "key"', b'\t "key"'), "x was changed: byte 2 "),
        (data.replace(b'"kind"', b'"kine"'), "x is no signed file"),
        (data[:-1], "x was changed: byte"),
        (data + b" ", "x was changed: byte"),
        (data.replace(b"2.5", b"2.6"), "signature does not hold"),
        (_capital(data), "signature does not hold"),
        (data.replace(b"test/1", b"test/2"), "of the kind 'test/2'"),
        (data[: len(data) // 2], "x is damaged: .* at byte"),
        (b"\xff" + data, "byte 0 is no UTF-8"),
        (b"[1]", "is no signed file"),
        (b"[" * 100_000, "x is damaged"),
        (sign(payload, "test/1", other), "is signed by the key"),
        (sign(payload, "test/1", other).replace(_id(other), _id(key)), "signature does not hold"),
    ):
        assert changed != data
        with pytest.raises(SignatureError, match=message):
            verify(changed, "test/1", key.public_key(), origin="x")
    with pytest.raises(ConfigError, match="not finite"):
        canonical({"a": float("nan")})


def _capital(data: bytes) -> bytes:
    """One letter of the signature as a capital: the same number, another byte."""
    at = data.index(b'"signature": "') + len(b'"signature": "')
    return data[:at] + data[at:].replace(b"a", b"A", 1)


def _id(key: Ed25519PrivateKey) -> bytes:
    from fade.signing import key_id

    return key_id(key.public_key()).encode()


def test_the_signing_key_is_made_once_for_its_owner_alone_or_comes_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    key = signing_key(tmp_path)
    assert (tmp_path / "signing.pem").stat().st_mode & 0o077 == 0
    assert signing_key(tmp_path).private_bytes_raw() == key.private_bytes_raw()
    write_signed(tmp_path / "x.json", {"a": 1}, "test/1", key)
    assert read_signed(tmp_path / "x.json", "test/1", public_key(tmp_path / "public.pem")) == {"a": 1}
    monkeypatch.setenv(KEY_VARIABLE, (tmp_path / "signing.pem").read_text())
    assert signing_key(tmp_path / "other").private_bytes_raw() == key.private_bytes_raw()
    assert not (tmp_path / "other/signing.pem").exists()
    monkeypatch.setenv(KEY_VARIABLE, "no key")
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} is no unencrypted private key"):
        signing_key(tmp_path)
    with pytest.raises(ConfigError, match="No public key in"):
        public_key(tmp_path / "nowhere.pem")
    (tmp_path / "bad.pem").write_text("no key")
    with pytest.raises(ConfigError, match="no public key in PEM"):
        public_key(tmp_path / "bad.pem")


# --- the overlay against peft ---


def test_the_overlay_answers_what_peft_answers_and_leaves_the_bases_bits(
    base: StableDiffusion, tiny_base: Path, adapters: list[Path]
) -> None:
    modules, bits, plain = (
        list(dict(base.network.named_modules())),
        weights_sha256(base.network),
        _predict(base.network),
    )
    overlay = Overlay(base.denoiser)
    tensors = [load_file(weights_path(folder, load_card(folder))) for folder in adapters]
    for chosen in ([0], [2], [0, 1], [0, 1, 2]):
        peft = load_base(tiny_base)
        for i in chosen:
            apply_adapter(peft, adapters[i], name=f"a{i}")
        activate(peft, {f"a{i}": 0.5 for i in chosen})
        expected = _predict(peft.network)
        prepared = overlay.prepare([(f"a{i}", 0.5, tensors[i]) for i in chosen])
        with using(prepared):
            answer = _predict(base.network)
        assert not torch.allclose(answer, plain, atol=1e-3)
        torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-4)
        with using(overlay.prepare([])):
            assert torch.equal(_predict(base.network), plain)
    with pytest.raises(RefusedError, match="computes only for its requests"):
        _predict(base.network)
    overlay.remove()
    assert torch.equal(_predict(base.network), plain)
    assert weights_sha256(base.network) == bits
    assert list(dict(base.network.named_modules())) == modules


def test_many_low_rank_adapters_cost_no_more_memory_than_the_weights_they_change(
    base: StableDiffusion, adapters: list[Path]
) -> None:
    overlay = Overlay(base.denoiser)
    tensors = load_file(weights_path(adapters[0], load_card(adapters[0])))
    one = overlay.prepare([("a", 1.0, tensors)])
    assert any(isinstance(change, Factors) for change in one.changes.values())
    many = overlay.prepare([("a", 0.01, tensors)] * 100)
    assert all(isinstance(change, Changed) for change in many.changes.values())
    with using(one):
        expected = _predict(base.network)
    with using(many):
        torch.testing.assert_close(_predict(base.network), expected, rtol=1e-3, atol=1e-4)


def test_a_tensor_that_does_not_fit_is_refused(base: StableDiffusion, adapters: list[Path]) -> None:
    overlay = Overlay(base.denoiser)
    low, delta = (load_file(weights_path(folder, load_card(folder))) for folder in (adapters[0], adapters[2]))
    down = next(name for name in low if name.endswith("lora_A.weight"))
    some = next(name for name in delta if name.endswith(".positions"))
    for broken, message in (
        ({**low, "unet.nowhere.lora_A.weight": low[down]}, "nowhere.lora_A.weight found no module"),
        ({name: tensor for name, tensor in low.items() if name != down}, "lacks one half"),
        ({**low, down: low[down][:, :1]}, "does not fit"),
        ({**low, down: low[down] * float("nan")}, "not finite"),
        ({**delta, some: delta[some] + 10**8}, "positions outside"),
        ({**delta, some: delta[some][:-1]}, "positions, "),
    ):
        with pytest.raises(AdapterFormatError, match=message):
            overlay.prepare([("broken", 1.0, broken)])


# --- the runtime ---


def test_a_new_release_takes_over_without_a_restart_and_the_bases_picture_comes_back(
    release: Release, tiny_base: Path, adapters: list[Path]
) -> None:
    base = reference(tiny_base, [])
    release.publish()
    runtime = release.runtime()
    assert np.array_equal(picture(runtime), base)
    for chosen in ([adapters[0]], adapters, [adapters[2]]):
        manifest = release.publish(*chosen)
        drawn, under = runtime.generate(PROMPTS, [1], steps=2, guidance=2.0)
        assert under == manifest == runtime.manifest
        assert not np.array_equal(drawn, base)
        assert np.abs(drawn.astype(int) - reference(tiny_base, chosen)).max() <= 2, "rounding apart, as peft draws it"
        alone, _ = runtime.generate(PROMPTS, [1], steps=2, guidance=2.0, base_only=True)
        assert np.array_equal(alone, base)
    release.publish(adapters[0], weight=0.5)
    half = picture(runtime)
    release.publish()
    assert not np.array_equal(half, base)
    assert np.array_equal(picture(runtime), base)


def test_three_lines_for_a_diffusers_program(
    release: Release, tiny_base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(KEY_VARIABLE, "")
    release.key = signing_key(tmp_path / "keys")

    def call(pipeline: object) -> NDArray[np.uint8]:
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "output_type": "np"}
        return pipeline(PROMPTS[0], **options).images  # type: ignore[operator, no-any-return]

    stock = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    plain, tokenizer = call(stock), type(stock.tokenizer)
    release.publish(adapters[0])
    pipe = Runtime(stock, release.folder, public_key=tmp_path / "keys/public.pem")
    erased = call(pipe)
    assert np.abs(erased - plain).max() > 1e-3
    assert pipe.scheduler is stock.scheduler, "other attributes are the pipeline's"
    with pytest.raises(RefusedError, match="call the runtime instead of the pipeline"):
        call(stock)
    with ThreadPoolExecutor(3) as pool:  # several at once, each with a scheduler of its own
        assert all(np.array_equal(again, erased) for again in pool.map(lambda _: call(pipe), range(3)))
    release.publish()
    assert np.array_equal(call(pipe), plain)
    pipe.close()
    assert type(stock.tokenizer) is tokenizer
    assert np.array_equal(call(stock), plain)
    assert list((tmp_path / "xdg/fade").glob("releases-*.json"))


def test_requests_at_once_do_not_read_each_others_padding(
    release: Release, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fast tokenizer keeps padding in itself: a stock pipeline's requests draw from each other's lengths."""
    base = load_base(tiny_base)
    tokenizer = base.pipeline.tokenizer
    pads = PreTrainedTokenizerFast.set_truncation_and_padding

    def length(padding: str) -> int:
        return len(tokenizer(PROMPTS, padding=padding, truncation=True, max_length=16).input_ids[0])

    def at_once() -> list[int]:
        """Two requests, each held where it has set its padding until the other has, or has had time to."""
        both = Barrier(2)

        def set_and_wait(*arguments: Any, **options: Any) -> None:
            pads(*arguments, **options)
            with suppress(BrokenBarrierError):
                both.wait(timeout=0.5)

        with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
            patched.setattr(PreTrainedTokenizerFast, "set_truncation_and_padding", set_and_wait)
            return list(pool.map(length, ["longest", "max_length"]))

    alone = [length("longest"), length("max_length")]
    assert alone[0] != alone[1]
    mixed = at_once()
    assert mixed != alone, "nothing is shown where a plain tokenizer does not mix them"
    assert mixed[0] == mixed[1]
    release.publish()
    with closing(Runtime(base, release.folder, public_key=release.key.public_key(), state=release.state)):
        assert at_once() == alone


def test_it_fails_closed_and_recovers(release: Release, adapters: list[Path]) -> None:
    path = release.folder / MANIFEST_NAME
    with pytest.raises(RefusedError, match=r"No such file.*manifest\.json|manifest\.json"):
        release.runtime()
    manifest = release.publish(adapters[0])
    runtime = release.runtime()
    expected, good = picture(runtime), path.read_bytes()
    for damage in (good[:-2], good.replace(b'"weight": 1.0', b'"weight": 0.0'), None):
        if damage is None:
            path.unlink()
        else:
            assert damage != good
            path.write_bytes(damage)
        for _ in range(2):
            with pytest.raises(RefusedError, match="Nothing is generated"):
                picture(runtime)
        assert runtime.manifest is None
        assert "manifest.json" in runtime.refusal
        path.write_bytes(good)
        assert np.array_equal(picture(runtime), expected)
    # Another key's release, however well made, is not this one's.
    other = Release(release.folder.parent / "other", release.base, Ed25519PrivateKey.generate())
    other.publish()
    path.write_bytes((other.folder / MANIFEST_NAME).read_bytes())
    with pytest.raises(RefusedError, match="is signed by the key"):
        picture(runtime)
    path.write_bytes(good)
    assert np.array_equal(picture(runtime), expected)
    # A changed adapter counts for whoever has to read it: the next runtime, or the next release.
    weights = release.folder / "adapters" / manifest.adapters[0].card_sha256 / manifest.adapters[0].file
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert np.array_equal(picture(runtime), expected)
    with pytest.raises(RefusedError, match=rf"{weights.name} was changed"):
        release.runtime()
    release.publish(adapters[0], adapters[1])  # publishing deposits a damaged adapter anew
    assert not np.array_equal(picture(runtime), expected)


def test_an_older_release_needs_a_signed_permission(release: Release, adapters: list[Path]) -> None:
    path = release.folder / MANIFEST_NAME
    old = release.publish()
    bytes_of_old = path.read_bytes()
    runtime = release.runtime()
    base = picture(runtime)
    release.publish(adapters[0])
    erased = picture(runtime)
    assert not np.array_equal(base, erased)
    path.write_bytes(bytes_of_old)
    for again in (runtime.refresh, release.runtime):  # in the same process and after a restart
        with pytest.raises(RefusedError, match="counter 1, but 2 was in force"):
            again()
    for wrong in ({"seen": 1}, {"key": Ed25519PrivateKey.generate()}):
        permit(release.folder, old, **{"seen": 2, "reason": "restored", "key": release.key, **wrong})  # type: ignore[arg-type]
        with pytest.raises(RefusedError, match=r"in force|is signed by the key"):
            runtime.refresh()
    permit(release.folder, old, seen=2, reason="restored", key=release.key)
    assert np.array_equal(picture(runtime), base)
    permission = (release.folder / PERMISSION_NAME).read_bytes()
    (release.folder / PERMISSION_NAME).unlink()
    assert np.array_equal(picture(release.runtime()), base), "taken over, it is the one in force"
    (release.folder / PERMISSION_NAME).write_bytes(permission)
    # What was stepped back from is abandoned: the next release has a counter above it.
    assert release.publish(adapters[1]).counter == 3
    runtime.refresh()
    # The same counter with other content is no release either.
    second = Release(release.folder.parent / "second", release.base, release.key)
    assert [second.publish(*some).counter for some in ([], [adapters[0]], [])] == [1, 2, 3]
    path.write_bytes((second.folder / MANIFEST_NAME).read_bytes())
    with pytest.raises(RefusedError, match="Two manifests have this counter"):
        runtime.refresh()
    release.state.write_text("{}")
    with pytest.raises(RefusedError, match="does not say which release was seen last"):
        release.runtime()


def test_another_base_or_a_changed_file_of_it_is_refused(
    release: Release, adapters: list[Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(release.base, base)
    release.publish(adapters[0])
    release.base = base
    assert release.runtime().manifest
    config = base / "scheduler/scheduler_config.json"
    kept = config.read_bytes()
    for path, content in (
        (config, kept + b" "),
        (base / "unet/extra.json", b"{}"),
    ):
        assert content != kept
        path.write_bytes(content)
        with pytest.raises(RefusedError, match=path.name):
            release.runtime()
        path.unlink()
        config.write_bytes(kept)
    sd = load_base(base)
    sd.network.conv_in.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(BaseModelError, match=r"conv_in\.weight differ"):
        Runtime(sd, release.folder, public_key=release.key.public_key(), state=release.state)


def test_what_cannot_be_published_leaves_the_release_as_it_was(release: Release, adapters: list[Path]) -> None:
    manifest = release.publish(adapters[0])
    foreign = _adapter(release.base, release.folder.parent / "foreign", base_sha256="0" * 64)
    for named, error, message in (
        ([("a", adapters[0], 1.0), ("a", adapters[1], 1.0)], ConfigError, "live once"),
        ([("a", adapters[0], float("nan"))], ConfigError, "not a finite"),
        ([("a", foreign, 1.0)], AdapterFormatError, "belongs to the base 000000000000"),
        ([("a", release.folder, 1.0)], AdapterFormatError, "No adapter in"),
    ):
        with pytest.raises(error, match=message):
            publish(release.folder, named, base=release.base, key=release.key)
    with pytest.raises(ConfigError, match="holds the line 'live'"):
        publish(release.folder, [], base=release.base, key=release.key, name="other")
    with pytest.raises(SignatureError, match="is signed by the key"):
        publish(release.folder, [], base=release.base, key=Ed25519PrivateKey.generate())
    assert read_manifest(release.folder, release.key.public_key()) == manifest
    following = release.publish()
    assert (following.counter, following.previous_sha256) == (manifest.counter + 1, manifest.sha256)


def test_each_picture_belongs_to_exactly_one_release_while_adapters_come_and_go_under_load(tmp_path: Path) -> None:
    """The short form of ``tests/chaos/swap.py``."""
    found = swap.run(12, 5, tmp_path)
    assert found["releases"] == 24
    assert found["pictures"] > 24
    assert found["sets_seen"] > 12, "most releases were seen by a request"
    assert found["compared"] == swap.COMPARED
    assert swap.is_right(found), found
    assert not swap.is_right({**found, "wrong": 1})


def test_nothing_tampered_with_is_accepted(tmp_path: Path) -> None:
    """The short form of ``tests/chaos/tamper.py``."""
    found = tamper.run(504, 1, tmp_path)
    assert found["cases"] == 504
    assert found["accepted"] == 0, found
    assert min(found["by_target"].values()) >= 500 // 7
