"""The settings of each step of an erasure: section ``erasure`` of params.yaml, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fade.errors import ConfigError
from fade.files import read_yaml
from fade.hardware import AUTO_PRECISION, Precision, fast_precision

DRAWN_BY = ("steps", "guidance", "solver", "batch", "precision")
"""Of the section ``evaluate``: how the base draws pictures."""
BY_KIND = ("distill.start", "distill.learning_rate")
"""Settings of which each kind of base has its own where nobody gives them (``Base.defaults``, fade.asking.by_kind)."""
OUR_METHOD = "fade"
"""The method whose settings are the sections ``saliency``, ``mask`` and ``distill``."""
ATTACKS = {
    "prompts": ("paraphrase", "synonym", "misspelling", "composition"),
    "noised": ("noised",),
    "inpainted": ("inpainted",),
    "relearning": ("relearning",),
    "switch": ("switch",),
    "inversion": ("inversion",),
}
"""Attacks by the kind that is run (fade/steps/attacks.py)."""


class StrictModel(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitSettings(StrictModel):
    """How many pictures of each pair (object x style) go into the splits."""

    seed: int = Field(42, description="of every draw of this step")
    forget_per_pair: int = Field(8, ge=1, description="pictures to forget of each object in each style")
    retain_per_pair: int = Field(3, ge=1, description="of every other pair")
    neighbour_factor: int = Field(1, ge=1, description="times as many to retain of what is most like the concept")
    holdout_per_pair: int = Field(4, ge=1, description="kept from training, to measure on")


class SaliencySettings(StrictModel):
    """Which gradient ranks the weights, over how many groups of how many pictures.

    ``denoising`` is the paper's; ``contrast`` divides it by the same on the retain set; ``distillation``
    is the gradient of the distillation loss itself; ``gain`` is how much of that loss a first step would
    take away; ``decrement`` is how far it could fall along the gradient with the retained answers counted
    (the last four ours); ``random`` is the control.
    """

    seed: int = Field(42, description="of every draw of this step")
    score: Literal["denoising", "contrast", "distillation", "gain", "decrement", "random"] = Field(
        "gain", description="what ranks the parts of the network"
    )
    groups: int | None = Field(
        None, ge=1, description="gradients that the score is the mean of; null: 1 for whole modules by gain, else 8"
    )
    group_size: int = Field(16, ge=1, description="examples of each gradient")
    at_once: int | None = Field(None, ge=1, description="examples through the network at a time; memory only")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass; memory")
    precision: Precision = Field("fp32", description="of the gradients")


class MaskSettings(StrictModel):
    """What may change: which share, of what, and within which modules.

    ``none`` is the control without a mask. ``attention`` are the published targets.
    """

    granularity: Literal["none", "module", "neuron", "weight"] = Field(
        "module", description="what is kept or left out as a whole"
    )
    density: float = Field(0.75, gt=0, le=1, description="share that may change")
    within: Literal["all", "attention", "cross_attention"] = Field("all", description="modules that are asked at all")


class DeepSettings(StrictModel):
    """Training against inversion, for ``depth: deep`` (fade/methods/fade/adversary.py)."""

    steps: int = Field(240, ge=1, description="in the place of distill.steps")
    retain_weight: float = Field(2.0, gt=0, description="in the place of distill.retain_weight")
    distill_batch: int = Field(16, ge=2, description="in the place of distill.batch")
    states: int = Field(4, ge=1, description="states searched at once")
    lifetime: int = Field(80, ge=1, description="steps of a state's search")
    batch: int = Field(16, ge=1, description="examples of each step of a search")
    learning_rate: float = Field(0.05, gt=0, description="of the search")
    size: int = Field(64, ge=1, description="states kept when their search is over")
    share: float = Field(0.5, ge=0, le=1, description="forget examples with such a state, of those not denied")
    empty_share: float = Field(0.1, ge=0, le=1, description="forget examples without caption, of those not denied")
    retain_share: float = Field(0.0, ge=0, le=1, description="retain examples with such a state")
    grown: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a lifetime from which on a state counts",
        exclude_if=lambda grown: grown == 0,
    )
    deny_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="forget examples that give way whatever is said",
        exclude_if=lambda share: share == 0,
    )
    deny_strength: float = Field(
        0.6,
        gt=0,
        le=1,
        description="how far, of the way to the surrogate's picture",
        exclude_if=lambda strength: strength == 0.6,
    )

    @model_validator(mode="after")
    def _leave_some(self) -> DeepSettings:
        if self.share + self.empty_share >= 1:
            raise ValueError(
                f"deep.share + deep.empty_share must leave captions to some forget examples: got "
                f"{self.share + self.empty_share}, expected less than 1"
            )
        return self


class ClosedFormSettings(StrictModel):
    """The linear change of the text path that training may begin with (fade/methods/closed_form.py)."""

    retain_weight: float = Field(3.0, gt=0, description="of the other texts against the concept's")
    ridge: float = Field(1e-3, gt=0, description="share of the mean square of a text state's entries")
    shut: int = Field(0, ge=0, description="directions of the text's states that are shut besides, without training")
    whole: bool = Field(
        False,
        description="go the whole way in the mean, where the least squares fall short",
        exclude_if=lambda on: not on,
    )


class DistillSettings(StrictModel):
    """Self-distillation; defaults were chosen on the canvas (README, "The method").

    ``start: closed_form`` begins with the closed form instead of with no change; with 0 steps that is all.
    """

    seed: int = Field(42, description="of every draw of this step")
    start: Literal["zero", "closed_form"] = Field("zero", description="what the adapter begins with")
    closed_form: ClosedFormSettings = ClosedFormSettings()
    steps: int = Field(120, ge=0, description="optimiser steps")
    batch: int = Field(4, ge=2, description="forget examples a step; as many retain examples")
    rank: int = Field(6, ge=1, description="of the adapter's matrices")
    alpha: float = Field(6.0, gt=0, description="the adapter is scaled by alpha / rank")
    learning_rate: float = Field(2e-3, gt=0, description="of AdamW")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    clip_norm: float = Field(1.0, gt=0, description="longest gradient")
    forget_weight: float = Field(1.0, ge=0, description="of the concept's loss")
    retain_weight: float = Field(1.0, ge=0, description="of the other captions' loss")
    timesteps: Literal["uniform", "power", "disagreement"] = Field("power", description="where they are drawn")
    timestep_power: float = Field(0.25, gt=0, description="power: t = T u^power; 1 is uniform, less draws noisier")
    pictures: Literal["forget", "surrogate", "mixed", "generated"] = Field(
        "mixed", description="whose noised pictures forget examples are"
    )
    surrogate_share: float = Field(0.5, ge=0, le=1, description="mixed, generated: z_t that shows the surrogate")
    empty_caption_share: float = Field(0.1, ge=0, le=1, description="retain examples without caption")
    stop_at: float | None = Field(None, gt=0, lt=1, description="end at this share of the held-out disagreement")
    check_every: int = Field(10, ge=1, description="steps between two looks, for stop_at")
    depth: Literal["name", "deep"] = Field("name", description="name, or against inversion too")
    deep: DeepSettings = DeepSettings()
    precision: Precision = Field("fp32", description="of training")
    pool: int | None = Field(None, ge=2, description="examples of each half that the teacher answers once; or fresh")
    micro_batch: int | None = Field(None, ge=1, description="examples forward and backward at a time; memory only")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass; memory")

    @model_validator(mode="after")
    def _change_something(self) -> DistillSettings:
        if self.in_force.steps == 0 and self.start == "zero":
            raise ValueError(
                "distill.steps is 0, so nothing would change: expected at least 1, or distill.start closed_form"
            )
        if self.closed_form.shut and (self.start, self.in_force.steps) != ("closed_form", 0):
            raise ValueError(
                "distill.closed_form.shut is of the closed form alone, for training would open again what it shuts: "
                f"expected distill.start closed_form and distill.steps 0, got {self.start} and {self.in_force.steps}"
            )
        if self.pool is not None and self.pool < self.batch:
            raise ValueError(f"distill.pool is {self.pool}: expected at least distill.batch, which is {self.batch}")
        return self

    @property
    def in_force(self) -> DistillSettings:
        """The settings that training follows: ``deep`` brings steps, retain weight and batch of its own."""
        if self.depth == "name":
            return self
        deep = self.deep
        return self.model_copy(
            update={"steps": deep.steps, "retain_weight": deep.retain_weight, "batch": deep.distill_batch}
        )

    def with_steps(self, steps: int) -> DistillSettings:
        """The same with another number of steps, at either depth."""
        return self.model_copy(update={"steps": steps, "deep": self.deep.model_copy(update={"steps": steps})})


class TuneSettings(StrictModel):
    """How an erasure finds its own settings, for ``settings: auto`` (fade/steps/tune.py).

    What moves: the closed form's retain weight, then, from the best of these, the steps of distillation, its
    weights, its surrogate share and its timestep law. All else of ``distill`` stays as it is set.
    """

    point: int | None = Field(None, ge=0, description="point that a person takes of those tried; null: the best")
    tries: int = Field(7, ge=1, description="points looked at, at most")
    solved: int = Field(3, ge=1, description="of these closed forms, at most")
    rank: int = Field(2, ge=1, description="of the closed forms")
    steps: tuple[int, ...] = Field((60, 120, 240, 480), description="of distillation, after which it is looked at")
    pictures: int = Field(24, ge=1, description="of a look: of the concept's prompts, of neighbours and of others each")
    solver_steps: int = Field(8, ge=1, description="with which a look's pictures are drawn")

    @model_validator(mode="after")
    def _rise(self) -> TuneSettings:
        if list(self.steps) != sorted(set(self.steps)) or min(self.steps, default=1) < 1:
            raise ValueError(f"tune.steps must rise from 1: got {self.steps}")
        return self


class EvaluateSettings(StrictModel):
    """The canvas protocol: every pair x every seed. Seeds are UnlearnCanvas' own."""

    seeds: tuple[int, ...] = Field((188, 288, 588, 688, 888), description="pictures of every prompt, one for each")
    whole: bool = Field(
        False,
        description="whether all of these are drawn, as benchmarks do, though the gate is sure before",
        exclude_if=lambda whole: not whole,
    )
    steps: int = Field(10, ge=1, description="of the solver")
    guidance: float = Field(4.0, ge=0, description="classifier-free guidance; at most 1: none, the prompt alone")
    solver: Literal["ddim", "dpm++"] = Field("dpm++", description="how pictures are drawn")
    batch: int = Field(120, ge=1, description="pictures at a time")
    precision: Precision = Field("fp32", description="of drawing")
    features: str | None = Field(None, description="extractor of FID and KID beside the judge's: TorchScript or folder")
    clip: str | None = Field(None, description="folder of a CLIP that scores how pictures fit their prompts")

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides the pictures, JSON-ready; what looks at them does not."""
        return self.model_dump(mode="json", include={*DRAWN_BY, "seeds"})


class InversionSettings(StrictModel):
    """White-box inversion (fade/attacks/inversion.py): its budget, and how many pictures it draws."""

    seed: int = Field(42, description="of every draw of this step")
    steps: int = Field(100, ge=1, description="of Adam on the text states")
    batch: int = Field(16, ge=1, description="examples a step")
    learning_rate: float = Field(0.05, gt=0, description="of Adam")
    restarts: int = Field(4, ge=2, description="text states searched; half begin at the concept's prompts")
    pooled: bool = Field(True, description="search pooled states too, on bases that are told one")
    seeds: tuple[int, ...] = Field(
        (188, 288, 588, 688, 888, 988), description="pictures of each state and pair, one for each"
    )
    stops: tuple[int, ...] = Field((), description="fewer steps after which it is looked at too: the curve")
    tokens: int = Field(
        0, ge=0, description="new tokens before the text encoder, searched instead of states; 0: states"
    )
    vocabulary: bool = Field(
        False,
        description="those tokens are of the vocabulary, as anybody could write them (`fade/attacks/vocabulary.py`)",
        exclude_if=lambda vocabulary: not vocabulary,
    )

    @model_validator(mode="after")
    def _rise(self) -> InversionSettings:
        if list(self.looks) != sorted({0, *self.looks} - {0}):
            raise ValueError(
                f"inversion.stops must rise from 1 to below inversion.steps ({self.steps}): got {self.stops}"
            )
        if self.vocabulary and not self.tokens:
            raise ValueError("inversion.vocabulary says which inversion.tokens are searched: got 0 of them, expected 1")
        return self

    @property
    def looks(self) -> tuple[int, ...]:
        """Every number of steps after which it is looked at, the last of them ``steps``."""
        return (*self.stops, self.steps)


class AttackSettings(StrictModel):
    """The suite of attacks beside inversion (fade/steps/attacks.py): budgets and how many pictures each draws."""

    seed: int = Field(42, description="of every draw of this step")
    seeds: tuple[int, ...] = Field((188, 288), min_length=1, description="of every prompt's pictures")
    names: tuple[str, ...] = Field((), description="further words for the concept: synonyms, other languages")
    strengths: tuple[float, ...] = Field((0.5, 0.7, 0.9), description="noised pictures: share of the way to noise")
    pictures: int = Field(16, ge=1, description="pictures noised at each strength, and covered by each half")
    relearning_steps: tuple[int, ...] = Field((10, 20, 40), description="fine-tuning steps after which it is judged")
    relearning_batch: int = Field(8, ge=1, description="pictures a step")
    relearning_rate: float = Field(1e-4, gt=0, description="of AdamW")

    @model_validator(mode="after")
    def _in_range(self) -> AttackSettings:
        if any(not 0 < strength < 1 for strength in self.strengths):
            raise ValueError(f"attacks.strengths must lie between 0 and 1: got {self.strengths}")
        if (
            list(self.relearning_steps) != sorted(set(self.relearning_steps))
            or min(self.relearning_steps, default=1) < 1
        ):
            raise ValueError(f"attacks.relearning_steps must rise from 1: got {self.relearning_steps}")
        return self


class GateBounds(StrictModel):
    """What the *bounds* of the figures must reach, and how often a decision may be wrong (fade/evaluation/gate.py).

    Pictures are added until every decision is sure or all of ``most`` seeds are drawn (fade/evaluation/rounds.py).
    """

    ua: float = Field(0.85, ge=0, le=1, description="least, of UA's lower bound")
    ira_loss: float = Field(0.03, ge=0, le=1, description="most, of the loss' upper bound")
    cra_loss: float = Field(0.03, ge=0, le=1, description="most, of the loss' upper bound")
    neighbours_loss: float | None = Field(0.15, ge=0, le=1, description="of each neighbour; None: not asked")
    surrogate: float = Field(
        0.75, ge=0, le=1, description="least, of the surrogate share's lower bound, of what is reachable"
    )
    mush: float = Field(0.15, ge=0, le=1, description="most, of the upper bound of what became mush")
    error_rate: float = Field(0.05, gt=0, lt=0.5, description="most wrong decisions of all")
    round: int = Field(5, ge=1, description="dozens of pictures that are added at a time, at most")
    most: int = Field(20, ge=1, description="seeds at most")


class Gate(StrictModel):
    """What an erasure must reach to be offered for approval (fractions of 1).

    ``ua``, ``ira_loss``, ``cra_loss``, ``surrogate`` and ``mush`` are asked of the figures themselves, ``sure`` of
    their bounds; without ``sure`` the bounds are not asked. ``ua`` and ``surrogate`` are shares of what the base's own
    pictures of the surrogate reach (fade/evaluation/gate.py). ``recognised``: of the base's own pictures, so that no
    judge decides what it cannot see; an erasure of which that is not sure is *unjudged*. ``attacks``: the most that an
    attack's upper bound may reach, by its name; an erasure runs them before it is judged, and one that was not run
    does not pass.
    """

    ua: float = Field(0.99, ge=0, le=1, description="least UA, of what is reachable")
    ira_loss: float = Field(0.01, ge=0, le=1, description="most that IRA may lose")
    cra_loss: float = Field(0.01, ge=0, le=1, description="most that CRA may lose")
    surrogate: float = Field(0.9, ge=0, le=1, description="least share that shows the surrogate, of what is reachable")
    mush: float = Field(0.02, ge=0, le=1, description="most that the scrambled share may lie above the base's")
    recognised: float = Field(
        0.5, ge=0, le=1, description="least share the judge surely recognises before, lower bound"
    )
    doubt: bool = Field(
        False,
        description="whether the judge was never trained on what it judges: where it does not surely recognise the "
        "concept it decides nothing, not even a failure; too few pictures of what is kept are borderline; its own "
        "errors are granted to IRA and CRA",
        exclude_if=lambda doubt: not doubt,
    )
    sure: GateBounds | None = None
    attacks: dict[str, float] | None = Field(None, description="attack to the most of its upper bound")

    @model_validator(mode="after")
    def _known_attacks(self) -> Gate:
        known = [name for names in ATTACKS.values() for name in names]
        for name, most in (self.attacks or {}).items():
            if name not in known:
                raise ValueError(f"gate.attacks names {name!r}: expected one of {', '.join(known)}")
            if not 0 <= most <= 1:
                raise ValueError(f"gate.attacks.{name} is the most a bound may reach, 0 to 1: got {most}")
        return self

    @property
    def attack_kinds(self) -> tuple[str, ...]:
        """What must be run before this gate can judge."""
        return tuple(kind for kind, names in ATTACKS.items() if set(names) & set(self.attacks or {}))


class Settings(StrictModel):
    """The settings of every step of an erasure: the section ``erasure`` of params.yaml."""

    split: SplitSettings = SplitSettings()
    saliency: SaliencySettings = SaliencySettings()
    mask: MaskSettings = MaskSettings()
    distill: DistillSettings = DistillSettings()
    tune: TuneSettings = TuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    inversion: InversionSettings = InversionSettings()
    attacks: AttackSettings = AttackSettings()
    gate: Gate = Gate()
    method: str = Field(OUR_METHOD, min_length=1, description="what makes the adapter (fade/methods/registry.py)")
    settings: Literal["auto", "fixed"] = Field("auto", description="auto: found for each erasure; fixed: as they stand")
    methods: dict[str, dict[str, Any]] = Field({}, description="settings of methods other than fade, by their names")
    threads: int = Field(2, ge=1, description="of the processor; part of what decides the bytes")
    weights: Literal["fp32", "bf16"] = Field("fp32", description="how the denoiser's weights are held; bf16 rounds")

    @property
    def why_fixed(self) -> str:
        """Why nothing is found by itself, in words; empty if settings are."""
        if self.settings == "fixed":
            return "settings: fixed is asked for"
        if self.method != OUR_METHOD:
            return f"the method {self.method} has no settings that are found"
        if self.distill.depth != "name":
            return "of distill.depth deep the settings are as they stand"
        if self.mask.granularity in ("neuron", "weight"):
            return f"with masks by {self.mask.granularity} the settings are as they stand"
        return ""


def explained(error: ValidationError, where: str) -> ConfigError:
    """A validation error in our words: every faulty field, what was got and what is expected."""
    faults = "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'spec'}: {fault['msg']} (got {fault['input']!r})"
        if fault["type"] != "value_error"
        else str(fault["msg"]).removeprefix("Value error, ")
        for fault in error.errors()
    )
    return ConfigError(f"{where}: {faults}.")


def one_seed(seed: int) -> dict[str, int]:
    """Changes of settings, by dotted name, that make every draw an adapter comes from one by this seed."""
    return {f"{name}.seed": seed for name in ("split", "saliency", "distill")}


def by_hand(name: str) -> bool:
    """Whether who gives this setting decides by it how the adapter is made."""
    section, _, part = name.partition(".")
    return section in ("method", "distill", "mask", "saliency") and part not in ("seed", "precision")


def load_settings(path: Path, *, changes: Mapping[str, Any] | None = None) -> Settings:
    """The section ``erasure`` of params.yaml.

    ``weights: auto``, and a precision that is ``auto`` or left out, become what is fast on this machine, so that a
    spec always says in which it was computed. Of ``BY_KIND`` one that is ``auto`` is as if left out: a spec has what
    its base's kind has.

    Args:
        changes: settings by dotted name, e.g. ``mask.density``, that take the place of the file's. Whoever gives one
            of those that make the adapter, or a method, gives all: ``settings`` is then ``fixed`` if not given too.

    Raises:
        ConfigError: the file is missing, or a value or key in it or in the changes is wrong.
    """
    section = read_yaml(path).get("erasure", {})
    if changes and "settings" not in changes and any(map(by_hand, changes)):
        section["settings"] = "fixed"
    for name, value in (changes or {}).items():
        *parents, last = name.split(".")
        at = section
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise ConfigError(f"Setting {name!r} does not exist: {parent!r} has no parts.")
        at[last] = value
    for name in BY_KIND:
        step, _, part = name.partition(".")
        if isinstance(given := section.get(step), dict) and given.get(part) == "auto":
            del given[part]
    _as_is_fast_here(section)
    try:
        return Settings(**section)
    except ValidationError as error:
        raise explained(error, f"Section 'erasure' of {path}") from None


def _as_is_fast_here(section: dict[str, Any]) -> None:
    """Put what this machine computes fast where ``auto`` stands, or no precision."""
    for step in ("saliency", "distill", "evaluate"):
        given = section.setdefault(step, {})
        if isinstance(given, dict) and given.get("precision", AUTO_PRECISION) == AUTO_PRECISION:
            given["precision"] = fast_precision()
    if section.get("weights") == AUTO_PRECISION:
        section["weights"] = fast_precision()
