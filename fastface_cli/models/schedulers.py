"""The supported schedulers: one line each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from ..recipe.schema import TIMESTEPS, Scheduler

SETTINGS = "fastface_settings"
"""The attribute of a scheduler with the recipe's settings that are not part of its configuration."""


def _lcm_steps(scheduler: Any, steps: int) -> dict[str, Any]:
    settings = settings_of(scheduler)
    if settings is not None and settings.timesteps is not None:
        return {"timesteps": list(settings.timesteps)}
    own = None if settings is None else settings.original_steps
    # It selects its steps from those that it was distilled on, and rejects a larger number.
    return {
        "num_inference_steps": steps,
        "original_inference_steps": own or max(steps, scheduler.config.original_inference_steps),
    }


def _count(_scheduler: Any, steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps}


class SchedulerKind(NamedTuple):
    """A scheduler class, and what the sampling loop needs to know about it."""

    scheduler: Any
    stochastic: bool = False
    """Its step draws noise from a generator."""
    step_arguments: Callable[[Any, int], dict[str, Any]] = _count
    """Arguments of `set_timesteps`, from a scheduler and the number of steps."""


SCHEDULERS = {
    "ddim": SchedulerKind(DDIMScheduler),
    "euler": SchedulerKind(EulerDiscreteScheduler),
    "euler_ancestral": SchedulerKind(EulerAncestralDiscreteScheduler, stochastic=True),
    "lcm": SchedulerKind(LCMScheduler, stochastic=True, step_arguments=_lcm_steps),
    "tcd": SchedulerKind(TCDScheduler, stochastic=True),
    "dpm_singlestep": SchedulerKind(DPMSolverSinglestepScheduler),
}
"""By the name that recipes use."""


def build_scheduler(settings: Scheduler, config: Mapping[str, Any]) -> Any:
    """Create a scheduler from a published configuration and the settings of a recipe."""
    changes = {} if settings.spacing is None else {"timestep_spacing": settings.spacing}
    scheduler = SCHEDULERS[settings.kind].scheduler.from_config(dict(config), **changes)
    setattr(scheduler, SETTINGS, settings)
    return scheduler


def settings_of(scheduler: Any) -> Scheduler | None:
    """Return the recipe's settings of a scheduler; None if `build_scheduler` did not create it."""
    return getattr(scheduler, SETTINGS, None)


def kind_of(scheduler: Any) -> SchedulerKind:
    """Return the entry of a scheduler in `SCHEDULERS`."""
    return next(kind for kind in SCHEDULERS.values() if type(scheduler) is kind.scheduler)


def is_stochastic(scheduler: Any) -> bool:
    """Return whether a step of the scheduler draws noise from a generator."""
    return kind_of(scheduler).stochastic


def with_steps(scheduler: Any, steps: int, device: torch.device | None = None) -> Any:
    """Copy a scheduler and set its timesteps, by default on the CPU, where reading them never waits."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(device=device, **kind_of(scheduler).step_arguments(scheduler, steps))
    return scheduler


def model_times(scheduler: Any) -> Tensor:
    """Return the timesteps that the UNet receives, [steps] float32: shifted if the recipe says so."""
    settings, times = settings_of(scheduler), scheduler.timesteps
    if settings is not None and settings.shift is not None:
        times = (times * settings.shift / TIMESTEPS).long()  # truncated to integers, as published
    model_input: Tensor = times.to(torch.float32)
    return model_input
