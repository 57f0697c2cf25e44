"""What a method is, what it is given, and what it leaves.

A method is a function: it takes a base and the material of an erasure, and leaves a change on the denoiser that a
step then stores as an adapter. What comes before and after (splits, judging, attacks, registration, approval,
rollback) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from fade.config import DistillSettings, Settings
from fade.errors import ConfigError, nearest
from fade.methods.fade.examples import Examples
from fade.methods.fade.masks import Mask
from fade.methods.fade.processes import ALONE, Processes
from fade.models.told import Told
from fade.spec import Spec

STUDENT = "student"
"""What a method's change is called on the denoiser: a LoRA adapter, or a difference of weights, of that name."""


class MethodSettings(BaseModel):
    """A method's own settings: numbers above 0, each with a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="after")
    def _positive(self) -> MethodSettings:
        for name, value in self:
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{name} must be positive: got {value!r}")
        return self


class Step(Protocol):
    """One step of a method, from 1, with its losses."""

    @property
    def step(self) -> int:
        """Its number."""
        ...

    @property
    def forget_loss(self) -> float:
        """How far the concept is from where it shall be."""
        ...

    @property
    def retain_loss(self) -> float:
        """How far the rest has moved; 0 where a method has no such loss."""
        ...

    @property
    def at_hand(self) -> bool:
        """Whether its figures can be read at once: on a GPU, reading one waits until it is computed."""
        ...

    def figures(self) -> dict[str, Any]:
        """A row of the curve, by column."""
        ...


class Rows(Protocol):
    """The rows of a split, encoded when they are asked for."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def at(self, shares: Tensor) -> Rows:
        """Those that lie at these shares of the way from first to last, each in [0, 1)."""
        ...

    def whose(self) -> list[str]:
        """Of the split ``forget``: the erased concept that each row shows, the first where it shows several."""
        ...

    def latents(self) -> Tensor:
        """Of the pictures, (N, C, h, w)."""
        ...

    def captions(self) -> tuple[Told, Told]:
        """What each shows, and the same with the surrogate's name; N rows each."""
        ...

    def encoded(self, most: int | None = None) -> Examples:
        """Both; of more than ``most`` rows so many, drawn evenly."""
        ...


@dataclass(frozen=True)
class Material:
    """What an erasure's method learns from: its splits, encoded once and when they are asked for.

    Attributes:
        rows: gives the rows of a split: ``forget``, ``surrogate``, ``retain``, ``holdout``, ``held_out``.
        empty: the empty prompt, one row.
        mask: what may change, for a method that is ``masked``.
        processes: which of several this process is, for a method that shares its batches.
        told: gives further prompts that must keep their answer, of which there are no pictures; None: there are none.
        near: gives captions of the concept's neighbours, which an erasure is most likely to hurt; None: nobody asks.
        told_away: gives further captions of the concept, and the same with the surrogate's name, of which there are no
            pictures; None: there are none.
        notes: what else the adapter's card shall say, by name; a method adds to it.
    """

    rows: Callable[[str], Rows]
    empty: Told
    mask: Mask | None = None
    processes: Processes = ALONE
    told: Callable[[], Told] | None = None
    near: Callable[[], Told] | None = None
    told_away: Callable[[], tuple[Told, Told]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def forget(self) -> Tensor:
        """Latents of the concept's pictures, (N, C, h, w)."""
        return self.rows("forget").latents()

    @cached_property
    def _forget_captions(self) -> tuple[Told, Told]:
        return self.rows("forget").captions()

    @property
    def concept(self) -> Told:
        """Captions of the concept's pictures, N rows."""
        return self._forget_captions[0]

    @property
    def surrogate(self) -> Told:
        """The same captions with the surrogate's name instead of the concept's."""
        return self._forget_captions[1]

    @cached_property
    def anchor(self) -> Tensor:
        """Latents of the surrogate's pictures, (N, C, h, w)."""
        return self.rows("surrogate").latents()

    @cached_property
    def _anchor_captions(self) -> tuple[Told, Told]:
        return self.rows("surrogate").captions()

    @property
    def anchor_concept(self) -> Told:
        """Captions of the surrogate's pictures that name the concept, N rows."""
        return self._anchor_captions[0]

    @property
    def anchor_surrogate(self) -> Told:
        """The same captions with the surrogate's name."""
        return self._anchor_captions[1]

    @cached_property
    def retain(self) -> Tensor:
        """Latents of other pictures, (N, C, h, w)."""
        return self.rows("retain").latents()

    @cached_property
    def retain_prompts(self) -> Told:
        """Captions of the other pictures, N rows."""
        return self.rows("retain").captions()[0]


@dataclass(frozen=True, slots=True)
class Method:
    """How an adapter is made.

    Attributes:
        name: what it is asked for by, and what its settings are filed under.
        make: ``make(base, material, settings, precision=..., seed=...)`` takes the base, loaded, and leaves its
            change there under the name ``STUDENT``; yields each step when it has been taken.
        settings: the class of its settings, all with defaults.
        citation: where it was published.
        masked: whether the steps saliency and mask come before it.
        several: whether it erases several concepts at once.
        shares: whether several processes can share its batches.
    """

    name: str
    make: Callable[..., Iterator[Step]]
    settings: type[BaseModel]
    citation: str
    masked: bool = False
    several: bool = False
    shares: bool = False

    def check_able(self, spec: Spec, processes: int = 1) -> None:
        """Refuse, before anything is made, what it cannot do.

        Raises:
            ConfigError: it erases one concept, or runs in one process, and more are asked for.
        """
        if spec.also and not self.several:
            raise ConfigError(
                f"The method {self.name!r} erases one concept: got {len(spec.pairs)}. Erase each by itself, or take "
                "the method fade."
            )
        if processes > 1 and not self.shares:
            raise ConfigError(f"The method {self.name!r} runs in one process: got {processes}. Start it alone.")

    def configured(self, spec: Settings) -> Any:
        """Its settings in a spec: section ``distill`` for our own, else those in ``methods`` under its name.

        Raises:
            ConfigError: a setting is unknown, or a value wrong.
        """
        if self.settings is DistillSettings:
            return spec.distill.in_force
        return self.checked(spec.methods.get(self.name, {}))

    def checked(self, changes: dict[str, Any]) -> Any:
        """Its settings with some of them changed.

        Raises:
            ConfigError: unknown setting, or a value out of range or of another type; says what is known.
        """
        known = self.settings.model_fields
        if unknown := [name for name in changes if name not in known]:
            raise ConfigError(
                f"The method {self.name!r} has no setting {unknown[0]!r}. {nearest(unknown[0], list(known))}"
            )
        try:
            return self.settings(**changes)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join([self.name, *(str(part) for part in fault["loc"])])
            said = str(fault["msg"]).removeprefix("Value error, ")
            raise ConfigError(f"A setting of the method is wrong: {where}: {said} (got {fault['input']!r}).") from None

    def steps(self, spec: Settings) -> int:
        """How many steps it takes at most: 1 where its settings name none, as where it is solved."""
        return int(getattr(self.configured(spec), "steps", 1))
