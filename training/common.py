"""What every stage shares: options, time budget, checkpoints, moving average, learning rate."""

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
    """The command line of a stage."""

    work: Path
    """Folder for caches and checkpoints; nothing in it is ever committed."""
    portraits: Path
    """Folder with ``portraits.zip``, ``labels.jsonl`` and ``embeddings.npy``."""
    teacher: Path
    """``MobileFaceNet.tflite``, for embeddings of augmented crops; optional, see README."""
    size: int
    """Side of the pictures in pixels, 128 or 256."""
    minutes: float
    """Time budget of this stage, counted over all its restarts."""
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
    """Seed every generator that a stage may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether bfloat16 pays: on a GPU always; a CPU without instructions for it is fifty times slower."""
    if device().type == "cuda":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        pictures = torch.ones(4, 32, 32, 32, dtype=dtype)
        kernels = torch.ones(32, 32, 3, 3, dtype=dtype)
        for _ in range(3):
            start = time.process_time()
            nn.functional.conv2d(pictures, kernels, padding=1)
            seconds[dtype] = time.process_time() - start
    return seconds[torch.bfloat16] < seconds[torch.float32]


def autocast() -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where it is the faster: it needs no loss scaling. Else float32."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=has_fast_bfloat16())


class Ema:
    """Exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average one step; early on it follows closely, so that short runs work."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(module.named_parameters())
        averages, values = list(self.shadow.values()), [current[name].detach() for name in self.shadow]
        torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


class Run:
    """A training loop's clock and memory: budget in minutes, checkpoints, learning rate.

    The learning rate follows the share of the *time* budget that is used, not a step count, so
    that a run always ends annealed however fast the machine is. A killed run resumes where its
    last checkpoint was; SIGTERM writes one more before leaving.
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
        """Share of the budget used, 0 to 1."""
        return min(1.0, self.seconds / self.budget) if self.budget > 0 else 1.0

    def rate(self, peak: float, warm_up: int = 100, floor: float = 0.02) -> float:
        """Learning rate now: linear warm-up in steps, then half a cosine in time."""
        decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return peak * min(1.0, (self.step + 1) / warm_up) * decay

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the budget is used up, saving on the way and at the end."""
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
        """Write the checkpoint beside, then rename: a kill leaves the old or the new one."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "seconds": self.seconds}
        temporary = self.path.with_suffix(".partial")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def log(self, every: int = 50, **values: float) -> None:
        """Print one line of figures now and then, to stderr: a stage may have a table to print."""
        if self.step % every == 0:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            clock = f"{self.seconds / 60:6.1f} min  step {self.step:6d}"
            print(f"{self.path.stem}  {clock}  {figures}", file=sys.stderr)


def load_part(path: Path, part: str) -> dict[str, Any]:
    """One entry of a checkpoint; for ``ema`` the averaged parameters by name."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)[part]
    return dict(state["shadow"]) if part == "ema" else state


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def pictures_to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, 3, h, w] in [-1, 1] on the training device."""
    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).to(device())
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def tensor_to_pictures(tensor: Tensor) -> np.ndarray:
    """float [n, 3, h, w] in [-1, 1] to uint8 [n, h, w, 3]."""
    scaled = tensor.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return np.asarray(scaled.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy())


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, rate: float, clip: float = 1.0) -> None:
    """One optimizer step on a loss, at a learning rate, with the gradient's norm clipped."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    step(optimizer, rate, clip)


def step(optimizer: torch.optim.Optimizer, rate: float, clip: float = 1.0) -> None:
    """One optimizer step on the gradients that are there, at a learning rate, with their norm clipped."""
    set_rate(optimizer, rate)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
