"""What published edits of the text's projections share: the states that they read, and UCE's equation."""

from __future__ import annotations

import torch
from torch import Tensor

from fade.methods.closed_form import held, paired
from fade.methods.method import Material, MethodSettings
from fade.models.base import Base
from fade.models.told import Told


class EditSettings(MethodSettings):
    """Weights of UCE's two sums and of its damping."""

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    damping: float = 0.5


def edited(base: Base, material: Material) -> tuple[Tensor, Tensor, Tensor]:
    """States of the concept, of its surrogate, paired, and of what is preserved; (N, D), (N, D), (M, D) float64.

    A caption that many pictures share counts once: the sums are over captions.
    """
    concept, surrogate = (_rows(states) for states in paired(base.denoiser, material.concept, material.surrogate))
    others = Told.join(material.retain_prompts, material.empty)
    preserved = _rows(held(base.denoiser.read(others.states), others.mask))
    concept, surrogate = torch.unique(torch.cat([concept, surrogate], dim=1), dim=0).chunk(2, dim=1)
    return concept, surrogate, torch.unique(preserved, dim=0)


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1]).double()


def solve(weight: Tensor, concept: Tensor, surrogate: Tensor, preserved: Tensor, settings: EditSettings) -> Tensor:
    """The new weight (out, in); states are rows, (N, in) and, paired, (N, in), and (M, in), float64."""
    erase, keep, damping = settings.erase_scale, settings.preserve_scale, settings.damping
    unit = torch.eye(weight.shape[1], dtype=weight.dtype)
    aim = erase * surrogate.T @ concept + keep * preserved.T @ preserved + damping * unit
    metric = erase * concept.T @ concept + keep * preserved.T @ preserved + damping * unit
    return torch.linalg.solve(metric, (weight @ aim).T).T
