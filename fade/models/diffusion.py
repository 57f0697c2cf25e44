"""What the families of diffusion models share: their path, their schedule of noise, and what it cannot be."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fade.models.base import Base, Config, Configs
from fade.models.paths import PREDICTIONS, DiffusionPath

_SCHEDULERS = (
    *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
    *("DEISMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep"),
    *("DPMSolverSDE", "UniPCMultistep", "SASolver", "DDIMInverse", "DPMSolverMultistepInverse"),
)
"""Solvers, without the ending ``Scheduler``, that are made from one schedule of noise, so that any of them draws."""


class Diffusion(Base):
    """A base that was trained to undo a diffusion's noise, drawn by any solver of its schedule."""

    @classmethod
    def predicts(cls, config: Configs) -> str:
        """``epsilon`` or ``v_prediction``."""
        return str(config("scheduler").get("prediction_type", "epsilon"))

    @property
    def path(self) -> DiffusionPath:
        """Its scheduler's."""
        scheduler = self.pipeline.scheduler
        return DiffusionPath(scheduler.alphas_cumprod, str(scheduler.config.prediction_type))

    @staticmethod
    def noise_schedule(scheduler: Any) -> tuple[object, Tensor | None]:
        """What is predicted, and the cumulative alphas."""
        return scheduler.config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)


def of_scheduler(name: str, config: Config) -> list[str]:
    """What of a diffusion's scheduler is not supported, each as a phrase that follows ``the base``."""
    predicts = str(config.get("prediction_type", "epsilon"))
    if name.startswith("Flow") or config.get("use_flow_sigmas") or predicts.startswith("flow"):
        return [f"is a flow model ({name}, which predicts {predicts!r}) in a pipeline of diffusion models"]
    if name.startswith("EDM") or config.get("timestep_type") == "continuous":
        return [f"is trained on the noise levels of EDM ({name})"]
    if name in ("LCMScheduler", "TCDScheduler"):
        return [f"is drawn by an {name}, in a few steps as it was distilled to: other solvers do not draw it"]
    found = [f"predicts {predicts!r}"] if predicts not in PREDICTIONS else []
    if name.removesuffix("Scheduler") not in _SCHEDULERS:
        found.append(f"has a {name}, of whose noise schedule nothing is known")
    return found
