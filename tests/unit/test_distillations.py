"""Every distillation recipe: its trajectory equals that of the snippet that its publisher gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverSinglestepScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from support.methods import recipe_of

from fastface_cli.models.loading import load_scheduler
from fastface_cli.models.schedulers import is_stochastic, model_times, with_steps
from fastface_cli.recipe.files import load_recipe
from fastface_cli.sampling.guidance import Step
from fastface_cli.sampling.loop import sample


class _ShiftedLCM(LCMScheduler):  # type: ignore[misc]
    """NitroFusion's scheduler, as its README describes it."""

    shift = 250

    def set_timesteps(self, *arguments: Any, **named: Any) -> None:
        super().set_timesteps(*arguments, **named)
        self.origin = self.timesteps.clone()
        self.timesteps = (self.timesteps * self.shift / self.config.num_train_timesteps).long()

    def step(self, output: Any, timestep: Any, sample: Any, **named: Any) -> Any:
        if self.step_index is None:
            self._step_index = 0
        shown, self.timesteps = self.timesteps, self.origin
        try:
            return super().step(output, self.origin[self._step_index], sample, **named)
        finally:
            self.timesteps = shown


def _steps(count: int, **named: Any) -> Callable[[Any], None]:
    return lambda scheduler: scheduler.set_timesteps(count, **named)


SNIPPETS: dict[str, tuple[Any, dict[str, Any], Callable[[Any], None]]] = {
    "dmd2": (LCMScheduler, {}, lambda s: s.set_timesteps(timesteps=[999, 749, 499, 249])),
    "tcd": (TCDScheduler, {}, _steps(4)),
    "pcm": (DDIMScheduler, {"timestep_spacing": "trailing"}, _steps(4)),
    "hypercfg": (DDIMScheduler, {"timestep_spacing": "trailing"}, _steps(8)),
    "nitro": (_ShiftedLCM, {"original_inference_steps": 4}, _steps(4)),
    "flash": (DPMSolverSinglestepScheduler, {"timestep_spacing": "trailing"}, _steps(7)),
}
"""Scheduler class, changes of the base's configuration, and the call that sets the steps."""


@pytest.mark.parametrize("model", SNIPPETS)
def test_trajectory(model: str, golden) -> None:
    recipe = load_recipe(model).recipe
    unet = UNet2DConditionModel.from_pretrained(golden / "pipe" / "unet").eval()
    pooled, times = torch.zeros(1, unet.config.projection_class_embeddings_input_dim - 48), torch.zeros(1, 6)
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)

    @torch.no_grad()
    def predict(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": times}
        out: torch.Tensor = unet(latents, time, text, added_cond_kwargs=added, return_dict=False)[0]
        return out

    kind, changes, set_steps = SNIPPETS[model]
    config = DDIMScheduler.load_config(golden / "pipe", subfolder="scheduler")
    theirs = kind.from_config(config, **changes)
    set_steps(theirs)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    latents, generator = noise * theirs.init_noise_sigma, torch.Generator().manual_seed(2)
    named = {"generator": generator} if kind in (LCMScheduler, TCDScheduler, _ShiftedLCM) else {}
    expected = []
    for time in theirs.timesteps:
        output = predict(theirs.scale_model_input(latents, time), time)
        latents = theirs.step(output, time, latents, **named, return_dict=False)[0]
        expected.append(latents)

    ours = with_steps(load_scheduler(recipe, golden / "pipe", None), recipe.sampling.steps)
    shown = model_times(ours)
    assert shown.tolist() == [float(time) for time in theirs.timesteps]
    steps = [Step(index, float(t), 1.0, 1.0, (2,)) for index, t in enumerate(ours.timesteps)]
    own = [torch.Generator().manual_seed(2)] if is_stochastic(ours) else None
    trace = sample(lambda x, step: predict(x, shown[step.index]), ours, noise, steps, own)
    for ours, other in zip(trace.latents, expected, strict=True):
        assert float((ours - other).norm() / other.norm()) < 1e-6


def test_settings_of_lcm_are_refused_elsewhere() -> None:
    from fastface_cli.errors import RecipeError

    for override, message in (
        ("model.scheduler.shift=250", "is for lcm"),
        ("model.scheduler.timesteps=[999]", "is for lcm"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("hyper", overrides=[override])
    with pytest.raises(RecipeError, match="distilled for 4 timesteps"):
        load_recipe("dmd2", overrides=["sampling.steps=3", "model.distillation=dmd2-sdxl-4-step-lora"])
    assert recipe_of().model.scheduler.shift is None
