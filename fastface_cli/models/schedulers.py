"""The supported schedulers: one line each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler


def _lcm_steps(scheduler: Any, steps: int) -> dict[str, Any]:
    # It selects its steps from those that it was distilled on, and rejects a larger number.
    return {"original_inference_steps": max(steps, scheduler.config.original_inference_steps)}


class SchedulerKind(NamedTuple):
    """A scheduler class and what the sampling loop must know of it."""

    scheduler: Any
    stochastic: bool = False
    """Its step draws noise from a generator."""
    step_arguments: Callable[[Any, int], dict[str, Any]] = lambda *_: {}
    """Further arguments of `set_timesteps`, from a scheduler and the number of steps."""


SCHEDULERS = {
    "ddim": SchedulerKind(DDIMScheduler),
    "euler": SchedulerKind(EulerDiscreteScheduler),
    "euler_ancestral": SchedulerKind(EulerAncestralDiscreteScheduler, stochastic=True),
    "lcm": SchedulerKind(LCMScheduler, stochastic=True, step_arguments=_lcm_steps),
}
"""By the name that recipes use."""


def kind_of(scheduler: Any) -> SchedulerKind:
    """The table's entry of a scheduler."""
    return next(kind for kind in SCHEDULERS.values() if type(scheduler) is kind.scheduler)


def is_stochastic(scheduler: Any) -> bool:
    """Whether a scheduler's step draws noise from a generator."""
    return kind_of(scheduler).stochastic


def with_steps(scheduler: Any, steps: int, device: torch.device | None = None) -> Any:
    """Copy a scheduler and set its timesteps, by default on the CPU: reading them does not wait then."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=device, **kind_of(scheduler).step_arguments(scheduler, steps))
    return scheduler
