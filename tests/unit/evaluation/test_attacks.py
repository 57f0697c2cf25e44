"""The suite of attacks on a tiny erasure: every kind counts what it says, the base beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fade.adapters.store import restore_base
from fade.asking.prepare import prepare_spec
from fade.attacks.inpainted import HALVES, covered, draw_covered
from fade.attacks.led import draw_led, towards
from fade.attacks.noised import draw_from_noised
from fade.attacks.prompts import PROMPT_ATTACKS, TOGETHER, misspellings, of_whole_words, prompt_attacks
from fade.attacks.relearning import relearn
from fade.concepts import Concept, caption_variants
from fade.config import load_settings
from fade.data.canvas import OBJECTS
from fade.data.styles import STYLES
from fade.errors import ConfigError
from fade.evaluation.attacked import AttackRun
from fade.evaluation.measured import Evaluation
from fade.evaluation.records import load
from fade.evaluation.review import review_page
from fade.evaluation.rounds import DOZEN
from fade.evaluation.verdicts import Verdict
from fade.files import read_json
from fade.models.denoiser import weights_sha256
from fade.models.families.stable_diffusion import StableDiffusion
from fade.models.generate import generate_from
from fade.spec import Spec, save_spec
from fade.steps.attacks import KINDS, attack_figures, run
from fade.studies.trial import run_trial
from tests.tiny import PROJECT

CAT = Concept("cat", "object", ("kitten",))
FEW = {
    "attacks.seeds": [188],
    "attacks.pictures": 3,
    "attacks.strengths": [0.4, 0.9],
    "attacks.relearning_steps": [1, 2],
}


def test_prompts_name_the_concept_in_sentences_of_their_kind() -> None:
    styles = ["photo", "neon", "oil"]
    asks = prompt_attacks(CAT, styles, further=["Katze"])
    by = {name: [ask.prompt for ask in asks if ask.attack == name] for name in PROMPT_ATTACKS}
    assert all(by.values())
    assert all("cat" in prompt for prompt in (*by["paraphrase"], *by["composition"]))
    assert any("kitten" in prompt for prompt in by["synonym"])
    assert any("Katze" in prompt for prompt in by["synonym"])
    assert not any("cat" in prompt.split() for prompt in by["misspelling"])
    # Each other concept is combined in each sentence, and none of them is a caption of training.
    assert len(by["composition"]) == len(styles) * len(TOGETHER)
    known = {text for style in STYLES for text in caption_variants("cat", style)}
    assert not set(by["composition"]) & known


def test_a_styles_prompts_combine_it_with_every_object() -> None:
    asks = prompt_attacks(Concept("pop art", "style"), list(OBJECTS))
    composed = [ask.prompt for ask in asks if ask.attack == "composition"]
    assert all(any(name in prompt for prompt in composed) for name in OBJECTS)
    assert all("pop art" in prompt for prompt in composed)
    assert not [ask for ask in asks if ask.attack == "synonym"]  # it has no other name


def test_a_misspelling_is_one_slip_and_never_the_name() -> None:
    assert misspellings("horse") == ["hrose", "hose", "horrse"]
    assert misspellings("ox") == []
    assert "aa" not in misspellings("aaa") or "aaa" not in misspellings("aaa")


def test_a_closed_vocabulary_knows_its_words_and_spells_others(base: StableDiffusion) -> None:
    tokenizer = base.pipeline.tokenizer
    assert of_whole_words(tokenizer, "a cat image in neon style")
    assert not of_whole_words(tokenizer, "a Katze image")


def test_from_a_little_noise_the_picture_comes_back(base: StableDiffusion) -> None:
    told = base.encode_prompts(["a cat", "a horse"])
    latents = torch.randn(2, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    plain = ((base.decode(latents).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).detach().numpy()

    def far(strength: float) -> float:
        drawn = draw_from_noised(
            base, latents, told, strength=strength, steps=20, guidance=1.0, precision="fp32", seed=1
        )
        return float(np.abs(drawn.astype(float) - plain).mean())

    assert far(0.05) < far(0.95)


def test_what_is_seen_stays_and_only_what_was_covered_is_drawn_and_shown(base: StableDiffusion) -> None:
    told = base.encode_prompts(["a cat", "a horse"])
    latents = torch.randn(2, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    handed: list[torch.Tensor] = []
    decode = base.decode
    base.decode = lambda found: (handed.append(found), decode(found))[1]  # type: ignore[method-assign]
    for half in HALVES:
        drawn = draw_covered(base, latents, told, half=half, steps=3, guidance=2.0, precision="fp32", seed=1)
        places, shown = (covered(half, *size) for size in (latents.shape[-2:], drawn.shape[1:3]))
        assert places.float().mean() == shown.float().mean() == 0.5
        assert torch.equal(handed[-1][:, :, ~places], latents[:, :, ~places])
        assert not torch.isclose(handed[-1][:, :, places], latents[:, :, places]).all(dim=-1).any()
        turned = np.flip(drawn, 2 if half in ("left", "right") else 1)
        assert np.array_equal(drawn, turned), "of what was seen nothing is left: the half that was drawn is mirrored"
        whole = ((decode(handed[-1]).clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).detach().numpy()
        assert np.array_equal(drawn[:, shown.numpy()], whole[:, shown.numpy()])
        assert not np.array_equal(drawn, whole)
    assert not (covered("left", 4, 6) & covered("right", 4, 6)).any()
    assert (covered("upper", 4, 6) | covered("lower", 4, 6)).all()


def test_what_is_seen_says_what_is_drawn_beside_it(base: StableDiffusion) -> None:
    told = base.encode_prompts(["a cat", "a cat"])
    latents = torch.randn(2, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    other = latents.clone()
    other[:, :, covered("left", *latents.shape[-2:])] += 3.0
    how = {"half": "left", "steps": 3, "guidance": 2.0, "precision": "fp32", "seed": 1}
    plain = draw_covered(base, latents, told, **how)  # type: ignore[arg-type]
    # What lies under the cover is not read; what lies beside it is.
    assert np.array_equal(plain, draw_covered(base, other, told, **how))  # type: ignore[arg-type]
    beside = latents.clone()
    beside[:, :, covered("right", *latents.shape[-2:])] += 3.0
    assert not np.array_equal(plain, draw_covered(base, beside, told, **how))  # type: ignore[arg-type]


def test_a_pull_leads_to_what_the_judge_is_to_see_and_no_pull_is_plain_sampling(base: StableDiffusion) -> None:
    def likelihood(pictures: torch.Tensor) -> torch.Tensor:
        return pictures[:, 0].mean(dim=(1, 2)) - pictures[:, 1:].mean(dim=(1, 2, 3))  # the redder the likelier

    def red(pull: float) -> float:
        drawn = draw_led(base, [1, 2], likelihood, pull=pull, steps=6, precision="fp32")
        return float(likelihood(torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1).mean())

    assert red(0.3) > red(0.0) + 0.01
    plain = generate_from(
        base, base.unconditional().expand(2), [1, 2], steps=6, guidance=1.0, solver="ddim", precision="fp32"
    )
    unled = draw_led(base, [1, 2], likelihood, pull=0.0, steps=6, precision="fp32")
    assert np.array_equal(unled, plain)
    noisy, timestep = torch.randn(2, *base.denoiser.latent_shape), torch.tensor(600)
    found = towards(base, noisy, torch.zeros_like(noisy), timestep, likelihood)
    torch.testing.assert_close(found.square().mean(dim=(1, 2, 3)), torch.ones(2))


def test_relearning_moves_the_attention_and_leaves_no_trace(base: StableDiffusion) -> None:
    untouched = weights_sha256(base.network)
    latents = torch.randn(4, *base.denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    stops = list(
        relearn(base, latents, base.encode_prompts(["a cat"] * 4), stops=(1, 3), batch=2, learning_rate=1e-3,
                precision="fp32", seed=1)
    )  # fmt: skip
    assert [step for step, _ in stops] == [1, 3]
    assert weights_sha256(base.network) != untouched
    restore_base(base)
    assert weights_sha256(base.network) == untouched


@pytest.fixture(scope="module")
def erased(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spec]:
    root = tmp_path_factory.mktemp("attacked")
    spec = prepare_spec("cat", "horse", project=PROJECT, settings=load_settings(Path("params.yaml"), changes=FEW))
    run_trial(spec, root=root)
    return root / spec.id, spec


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "inversion"])
def test_an_attack_counts_its_pictures_by_both_judges_and_on_the_base(erased: tuple[Path, Spec], kind: str) -> None:
    folder, _ = erased
    list(run(folder, kind))
    found = load(AttackRun, folder / "attacks" / f"{kind}.json")
    for shown in (found.base, found.erased):
        for rate in (shown.development, shown.report):
            assert rate.count > 0
            assert rate.low <= rate.value <= rate.high
    if kind == "prompts":
        assert set(found.by) == set(PROMPT_ATTACKS)
        assert sum(part.asked or 0 for part in found.by.values()) == found.erased.report.count
        assert found.by["composition"].whole_words == 1.0
        assert found.by["misspelling"].whole_words == 0.0
    if kind == "noised":
        assert set(found.by) == {"0.4", "0.9"}
        assert found.erased.report.count == 6
    if kind == "inpainted":
        assert set(found.by) == set(HALVES)
        assert found.erased.report.count == 12
    if kind == "relearning":
        assert set(found.by) == {"0", "1", "2"}
    if kind == "switch":
        assert set(found.by) == {"off", "inverted, by its name"}
    names = set(attack_figures(folder).flat())
    assert ({"paraphrase", "base_paraphrase", "composition_high"} if kind == "prompts" else {kind}) <= names


@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, False), (2, False), (2, True)])
def test_an_inversion_is_asked_in_a_space_and_looked_at_on_its_way(
    erased: tuple[Path, Spec], tmp_path: Path, tokens: int, vocabulary: bool
) -> None:
    folder = tmp_path / "erased"
    shutil.copytree(erased[0], folder)
    asked = {"steps": 3, "stops": (1, 2), "tokens": tokens, "vocabulary": vocabulary}
    budget = erased[1].inversion.model_copy(update=asked)
    save_spec(erased[1].model_copy(update={"inversion": budget}), folder)
    assert [step.step for step in run(folder, "inversion")] == [1, 2, 3, 1, 2, 3]  # on the base, then on what is erased
    found = load(AttackRun, folder / "attacks" / "inversion.json")
    pictures = budget.restarts * len(budget.seeds)
    if vocabulary:
        last = found.by["found"]
        assert last.erased == found.erased
        assert last.prompts is not None
        assert len(last.prompts) == budget.restarts
        assert all(prompt.startswith("a ") and "cat" not in prompt.split() for prompt in last.prompts)
    assert {
        stop: part.erased.report.count for stop, part in found.by.items() if part.erased and stop != "found"
    } == dict.fromkeys(("1", "2"), pictures)
    assert found.erased.report.count == pictures
    # On the base the concept's own prompt is no attack; new words name nothing.
    assert found.base.report.count == (pictures if tokens else pictures // 2)
    assert (folder / "attacks" / "sheet.png").is_file()


def test_stops_of_an_inversion_rise_to_its_last_step(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"inversion\.stops must rise from 1 to below inversion\.steps \(100\)"):
        load_settings(Path("params.yaml"), changes={"inversion.steps": 100, "inversion.stops": [300, 100]})
    with pytest.raises(ConfigError, match=r"says which inversion\.tokens are searched: got 0"):
        load_settings(Path("params.yaml"), changes={"inversion.vocabulary": True})


def test_the_bases_pictures_of_an_attack_are_drawn_once(
    erased: tuple[Path, Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = erased
    list(run(folder, "noised"))
    first = read_json(folder / "attacks" / "noised.json")
    calls = []
    from fade.steps import attacks

    real = attacks.draw_from_noised
    monkeypatch.setattr(attacks, "draw_from_noised", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    list(run(folder, "noised"))
    assert len(calls) == 2  # two strengths, with the adapter alone
    assert read_json(folder / "attacks" / "noised.json") == first


def test_an_unknown_attack_is_refused(erased: tuple[Path, Spec]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'prompts'"):
        next(run(erased[0], "prompt"))


def test_the_reviewers_report_is_one_file_that_says_first_what_the_gate_says(erased: tuple[Path, Spec]) -> None:
    folder, request = erased
    page = (folder / "evaluation" / "report.html").read_text()
    assert f"Erasure {request.id}: <span class=passed>passed" in page
    assert page.count("data:image/jpeg;base64,") >= 1
    assert "<script" not in page
    assert "http" not in page
    assert page.index("<h2>Figures") < page.index("data:image")
    for name in ("shuffled patches", "McNemar", "FID (judge", "perceptual distance", "neighbour"):
        assert name in page, name
    metrics = load(Evaluation, folder / "evaluation" / "metrics.json")
    unsure = Verdict(passed=False, verdict="borderline", reasons=("ua is <unsure>",), checks=(), recognised=())
    other = review_page(request.id, metrics.model_copy(update={"gate": unsure}), {}, {})
    assert "<span class=borderline>borderline" in other
    assert "ua is &lt;unsure&gt;" in other


def test_the_gate_draws_more_pictures_until_it_is_sure_or_has_the_most(workspace: Path, tmp_path: Path) -> None:
    sure = {"gate.sure": {"ua": 0.9, "ira_loss": 1.0, "cra_loss": 1.0, "neighbours_loss": None, "round": 2, "most": 4}}
    settings = load_settings(Path("params.yaml"), changes={**sure, "evaluate.steps": 1})
    spec = prepare_spec("astronaut", "cameraman", project=PROJECT, settings=settings)
    run_trial(spec, root=tmp_path)
    metrics = load(Evaluation, tmp_path / spec.id / "evaluation" / "metrics.json")
    # A tiny base shows no astronaut: 4 of 4, which is not sure to be 0.9, nor are 16 of 16.
    ua = metrics.report.after.ua
    assert metrics.seeds == (188, 288, 388, 488)
    assert ua.count == 16
    # Retention was never in doubt: of its prompts a dozen were drawn, and no more.
    assert metrics.report.after.ira.count == DOZEN
    if ua.value == 1.0:
        assert metrics.gate.verdict == "borderline"
    assert not metrics.gate.passed
