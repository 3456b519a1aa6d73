"""The guided prediction of one step: one UNet call over the branches that the step needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..recipe.schema import Attention, Guidance, Order
from . import guidance
from .attention import Chains
from .guidance import Branch, Step
from .processor import Conditions, Rows


def denoise(
    unet: torch.nn.Module,
    latents: Tensor,
    time: Tensor,
    rows: Rows,
    numbers: Sequence[float] | Tensor,
    order: Order,
    rescale: float,
    *,
    renorm: bool,
) -> Tensor:
    """Call the UNet over all branches of all images and combine its predictions; this function is compiled.

    Args:
        unet: inside `processor.installed`.
        latents: [images, C, h, w], as scaled by the scheduler.
        time: [], float32.
        rows: conditions of the [branches x images] rows.
        numbers, order, rescale, renorm: of `guidance.mix`.

    Returns:
        [images, C, h, w], float32.
    """
    return guidance.mix(predict(unet, latents, time, rows), numbers, order, rescale, renorm=renorm)


def predict(unet: torch.nn.Module, latents: Tensor, time: Tensor, rows: Rows) -> Tensor:
    """Call the UNet over the branches of `rows`: [branches, images, C, h, w]; arguments as in `denoise`."""
    branches = len(rows.pooled) // len(latents)
    sample = latents.to(rows.pooled.dtype).repeat(branches, 1, 1, 1)
    extra = {} if rows.extra is None else rows.extra(sample, time, rows)
    predicted: Tensor = unet(
        sample,
        time,
        encoder_hidden_states=rows,
        added_cond_kwargs={"text_embeds": rows.pooled, "time_ids": rows.time_ids},
        return_dict=False,
        **extra,
    )[0]
    return predicted.reshape(branches, *latents.shape)


@dataclass
class GuidedDenoiser:
    """The denoiser of one batch, as `loop.sample` calls it."""

    unet: torch.nn.Module
    conditions: Conditions
    guidance: Guidance
    attention: Attention
    times: Tensor
    """[steps] float32, on the device."""
    chains: Sequence[Chains]
    """The manipulation of each step."""
    call: Callable[..., Tensor] = denoise
    """`denoise`, or its compiled form."""
    one_branch: bool = False
    """Run independent branches one after another, which saves memory."""
    tensor_numbers: bool = False
    """Pass guidance weights as tensors: the graph of a compiled step must not depend on their values."""
    _selected: tuple[tuple[Branch, ...], Rows] | None = field(default=None, init=False)

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """Return the guided prediction of a step, [images, C, h, w] float32."""
        weights, time = self.guidance, self.times[step.index]
        branches = [guidance.BRANCHES[weights.order][index] for index in step.branches]
        numbers: Sequence[float] | Tensor = guidance.mixing(step, weights)
        renorm = guidance.is_renormed(step, weights)
        if self.one_branch and not guidance.couples_branches(self.attention, step.index):
            predictions = torch.cat(
                [predict(self.unet, latents, time, self._rows([branch], step)) for branch in branches]
            )
            return guidance.mix(predictions, numbers, weights.order, weights.rescale, renorm=renorm)
        if self.tensor_numbers:
            numbers = torch.tensor(numbers).to(latents.device)
        rows = self._rows(branches, step)
        return self.call(
            self.unet, latents, time, rows, numbers, weights.order, weights.rescale, renorm=renorm
        )

    def _rows(self, branches: Sequence[Branch], step: Step) -> Rows:
        """Return the rows of a UNet call, reusing those of the previous call if the branches are the same."""
        chains = self.chains[step.index]
        if self._selected is not None and self._selected[0] == tuple(branches):
            rows = replace(
                self._selected[1],
                chains=chains,
                scale=self.conditions.row_scale(step.index, len(branches)),
                has_identity=self.conditions.has_identity[step.index],
            )
        else:
            # The previous rows are freed first: they hold the keys and values of every layer.
            self._selected = None
            rows = self.conditions.select(branches, chains, step.index)
        self._selected = tuple(branches), rows
        return rows
