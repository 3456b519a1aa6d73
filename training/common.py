"""Code that all stages share: options, time budget, checkpoints, moving average, learning rate."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Options:
    """Command-line options of a stage."""

    work: Path
    """Folder for caches and checkpoints; never committed."""
    portraits: Path
    """Folder with ``portraits.zip``, ``labels.jsonl`` and ``embeddings.npy``."""
    teacher: Path
    """``MobileFaceNet.tflite``, for embeddings of augmented crops; optional, see README."""
    size: int
    """Image size in pixels, 128 or 256."""
    minutes: float
    """Time budget of this stage, over all restarts."""
    seed: int
    threads: int


def options(stage: str, minutes: float, argv: list[str] | None = None) -> Options:
    """Parse the options common to all stages; ``minutes`` is the stage's default budget."""
    parser = argparse.ArgumentParser(prog=f"python -m training.{stage}")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/fastface-training").expanduser())
    parser.add_argument("--portraits", type=Path, default=Path("../shared/portraits"))
    parser.add_argument("--teacher", type=Path, default=None)
    parser.add_argument("--size", type=int, choices=(128, 256), default=128)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")))
    values = vars(parser.parse_args(argv))
    values["teacher"] = values["teacher"] or values["work"] / "MobileFaceNet.tflite"
    settings = Options(**values)
    settings.work.mkdir(parents=True, exist_ok=True)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    seed_everything(settings.seed)
    return settings


def seed_everything(seed: int) -> None:
    """Seed all random number generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def device() -> torch.device:
    """Return the CUDA device if available, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def has_fast_bfloat16() -> bool:
    """Return whether bfloat16 is faster: on a CPU without instructions for it, it is 50 times slower."""
    if device().type == "cuda":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        images = torch.ones(4, 32, 32, 32, dtype=dtype)
        kernels = torch.ones(32, 32, 3, 3, dtype=dtype)
        for _ in range(3):
            start = time.process_time()
            nn.functional.conv2d(images, kernels, padding=1)
            seconds[dtype] = time.process_time() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def autocast() -> contextlib.AbstractContextManager[Any]:
    """Return a context that uses bfloat16 if it is faster (no loss scaling is needed), otherwise float32."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=has_fast_bfloat16())


class Ema:
    """Exponential moving average of a module's parameters, with warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Update the average; the decay starts low, so that short runs work."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(module.named_parameters())
        averages, values = list(self.shadow.values()), [current[name].detach() for name in self.shadow]
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Copy the average to the parameters of the module."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


class Run:
    """State of a training loop: time budget in minutes, checkpoints, learning rate.

    The learning rate depends on the elapsed share of the time budget, not on the step count, so that every
    run ends annealed on machines of any speed. A killed run resumes from its last checkpoint; on SIGTERM a
    checkpoint is written first.
    """

    def __init__(self, path: Path, minutes: float, parts: dict[str, Any], save_every: float = 120.0) -> None:
        self.path, self.budget, self.parts, self.save_every = path, minutes * 60, parts, save_every
        self.step = 0
        self.seconds = 0.0
        self.stopped = False
        if path.exists():
            state = torch.load(path, map_location=device(), weights_only=True)
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            for name, part in parts.items():
                if name in state:
                    part.load_state_dict(state[name])
            print(f"{path.stem}: resumed at step {self.step}, {self.seconds / 60:.1f} min", file=sys.stderr)
        for part in parts.values():
            if isinstance(part, torch.optim.Optimizer):
                for group in part.param_groups:
                    group["fused"], group["foreach"] = True, False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True

    @property
    def progress(self) -> float:
        """Elapsed share of the time budget, 0 to 1."""
        return min(1.0, self.seconds / self.budget) if self.budget > 0 else 1.0

    def rate(self, peak: float, warm_up: int = 100, floor: float = 0.02) -> float:
        """Return the current learning rate: linear warm-up in steps, then a half cosine in time."""
        decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return peak * min(1.0, (self.step + 1) / warm_up) * decay

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the time budget is used; save checkpoints regularly and at the end."""
        saved = time.monotonic()
        while self.seconds < self.budget and not self.stopped:
            start = time.monotonic()
            yield self.step
            self.step += 1
            self.seconds += time.monotonic() - start
            if time.monotonic() - saved > self.save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the checkpoint atomically: after a kill, the old or the new file exists."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "seconds": self.seconds}
        temporary = self.path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def log(self, every: int = 50, **values: float) -> None:
        """Print a line of values every few steps, to stderr because stdout is for results."""
        if self.step % every == 0:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            clock = f"{self.seconds / 60:6.1f} min  step {self.step:6d}"
            print(f"{self.path.stem}  {clock}  {figures}", file=sys.stderr)


def load_part(path: Path, part: str) -> dict[str, Any]:
    """Return one entry of a checkpoint; for ``ema``, the averaged parameters by name."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)[part]
    return dict(state["shadow"]) if part == "ema" else state


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def images_to_tensor(images: np.ndarray) -> Tensor:
    """Convert uint8 [n, h, w, 3] to float32 [n, 3, h, w] in [-1, 1] on the training device."""
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device())
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def tensor_to_images(tensor: Tensor) -> np.ndarray:
    """Convert float [n, 3, h, w] in [-1, 1] to uint8 [n, h, w, 3]."""
    scaled = tensor.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return np.asarray(scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy())


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float, clip: float = 1.0) -> None:
    """Run the backward pass and one optimizer step, with clipped gradient norm."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    step(optimizer, rate, clip)


def step(optimizer: torch.optim.Optimizer, rate: float, clip: float = 1.0) -> None:
    """Run one optimizer step on the current gradients, with clipped norm."""
    set_rate(optimizer, rate)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
