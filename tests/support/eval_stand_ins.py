"""What tests of evaluation runs put in the place of models: people, makers, workers and metrics."""

from __future__ import annotations

import functools
import os
import queue
import signal
import time
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image

from fastface_cli.errors import DeviceError, NoFaceError
from fastface_cli.evaluation import runner
from fastface_cli.evaluation.dataset import Dataset, Subject
from fastface_cli.evaluation.engines import Lost, Outcome, Pool, work
from fastface_cli.evaluation.maker import Factory, ImageOutcome, ImageTask, failed
from fastface_cli.evaluation.metrics.base import Column, Context, Needs, Sample, Scores
from fastface_cli.evaluation.runner import EvaluationPlan
from fastface_cli.evaluation.scoring import Judged, Load, ToScore, judging
from fastface_cli.identity.identity import Identity
from fastface_cli.output.images import encode_png
from fastface_cli.recipe.files import load_recipe

SIDE = 8


def dataset(people: int = 3, prompts: int = 4) -> Dataset:
    names = [f"p{index:03d}" for index in range(people)]
    subjects = tuple(Subject(name, (Path(f"{name}.png"),), None, {"even": name[-1]}) for name in names)
    texts = tuple(f"prompt {index}" for index in range(prompts))
    return Dataset("made-up", subjects, texts, "hash", dict.fromkeys(names, "mark"))


def plan(
    people: int = 3, prompts: int = 4, *, recipes: tuple[str, ...] = ("pocket",), **more
) -> EvaluationPlan:
    known = {name: load_recipe("pocket").recipe.model_copy(update={"name": name}) for name in recipes}
    return EvaluationPlan(known, dataset(people, prompts), **more)


def info(of: EvaluationPlan) -> dict:
    return {
        "recipes": {name: recipe.canonical() for name, recipe in of.recipes.items()},
        "dataset": of.dataset.record(),
        "options": {"seeds": of.seeds, "stress": list(of.stresses), "protocol": "fastface"},
        "versions": {"fastface": "0"},
        "metrics": [],
    }


@functools.cache
def somebody() -> Identity:
    embedding = np.zeros((1, 512), np.float32)
    embedding[0, 0] = 1
    return Identity(embedding, np.zeros((1, 224, 224, 3), np.uint8), np.ones(1, np.float32))


class People:
    """Everybody has the same face; those in `faceless` have none."""

    def __init__(self, faceless: tuple[str, ...] = ()) -> None:
        self.faceless = faceless
        self.asked: list[tuple[str, str | None]] = []

    def keep_photos(self, subject: Subject) -> None:
        pass

    def identity(self, subject: Subject, stress: str | None, face: str) -> Identity:
        self.asked.append((subject.name, stress))
        if subject.name in self.faceless:
            raise NoFaceError(f"no face found in {subject.name}")
        return somebody()


def image(task: ImageTask) -> bytes:
    """A plain picture whose color is of the row's seed."""
    color = (task.row.seed % 256, task.row.seed // 256 % 256, len(task.row.recipe))
    return encode_png(Image.new("RGB", (SIDE, SIDE), color))


def make(task: ImageTask) -> ImageOutcome:
    """What a worker does, in a moment."""
    if task.row.prompt == "too large":
        return failed(task.row, DeviceError("out of memory on cpu"))
    return ImageOutcome(task.row, image(task))


def plain(device: str):
    return make


def slow(device: str):
    def make_one(task: ImageTask) -> ImageOutcome:
        time.sleep(0.02)
        return make(task)

    return make_one


def broken(device: str):
    raise DeviceError("there is no such device", "another one")


class Dying:
    """A factory whose workers kill themselves over an image, `times` times for each (a folder counts)."""

    def __init__(self, folder: Path, prompt: str, times: int) -> None:
        self.folder, self.prompt, self.times = folder, prompt, times

    def __call__(self, device: str):
        return self.make_one

    def make_one(self, task: ImageTask) -> ImageOutcome:
        if task.row.prompt == self.prompt:
            for attempt in range(self.times):
                mark = self.folder / f"{task.row.key.replace('/', '-')}.{attempt}"
                if not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
        return make(task)


class Here(Pool):
    """Workers that are this process; answers come last in, first out."""

    def __init__(self, factory: Factory = plain, size: int = 2) -> None:
        self.size = size
        self.closed = False
        self.sent = 0
        self._one = work(factory, "cpu")
        self._waiting: deque[tuple[int, ImageTask]] = deque()

    def start(self, slot: int) -> None:
        pass

    def send(self, slot: int, task: ImageTask) -> None:
        self.sent += 1
        self._waiting.append((slot, task))

    def wait(self) -> list[tuple[int, Outcome]]:
        slot, task = self._waiting.pop()
        return [(slot, self._one(task))]

    def close(self) -> None:
        self.closed = True


class Losing(Here):
    """Every worker is lost, always."""

    def wait(self) -> list[tuple[int, Outcome]]:
        slot, _ = self._waiting.pop()
        return [(slot, Lost("a test"))]


class Brightness:
    """Mean red of a picture, and its rank in the run; counts the batches that it sees."""

    name = "brightness"
    summary = "mean red"
    columns = (
        Column("brightness", "red", True, "", "Mean of the red channel."),
        Column("brightness_rank", "rank", None, "", "Place among all."),
    )
    needs = Needs()

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def load(self, context: Context) -> None:
        pass

    def score(self, samples: list[Sample]) -> list[Scores]:
        self.batches.append([sample.key for sample in samples])
        return [{"brightness": float(np.asarray(sample.image)[..., 0].mean())} for sample in samples]

    def vectors(self, samples: list[Sample]) -> list[dict[str, np.ndarray]]:
        return [{"red": np.asarray(sample.image)[0, :1, 0].astype(np.float32)} for sample in samples]

    def finish(self, rows, vectors) -> dict[str, Scores]:
        order = sorted(vectors, key=lambda key: (float(vectors[key]["red"][0]), key))
        return {key: {"brightness_rank": float(place)} for place, key in enumerate(order)}


class Deadly(Brightness):
    """Ends its process over the first batch."""

    def score(self, samples: list[Sample]) -> list[Scores]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


class Exiting(Brightness):
    """Wants to end its process."""

    def score(self, samples: list[Sample]) -> list[Scores]:
        raise SystemExit(1)


class Unpicklable(Brightness):
    """Gives what no other process can be sent."""

    def vectors(self, samples: list[Sample]) -> list[dict[str, np.ndarray]]:
        return [{"red": lambda: None} for _ in samples]


class Endless(Brightness):
    """Never comes to its end."""

    def score(self, samples: list[Sample]) -> list[Scores]:
        time.sleep(3600)
        return []


class ScoringInPlace:
    """A judge that is this process."""

    def __init__(self, load: Load) -> None:
        self._one = judging(load)
        self._answers: queue.Queue[Judged] = queue.Queue()

    def send(self, request: ToScore) -> None:
        self._answers.put(self._one(request))

    def receive(self) -> Judged:
        return self._answers.get()

    def terminate(self) -> None:
        pass

    def close(self) -> None:
        pass


class Scoring(runner.Scoring):
    """Scoring in this process."""

    def judge(self) -> ScoringInPlace:
        return ScoringInPlace(self.load)


def scoring(metric: Brightness | None = None, *, process: bool = False) -> runner.Scoring:
    metrics = [metric or Brightness()]
    return (runner.Scoring if process else Scoring)(metrics, functools.partial(list, metrics))


def no_scoring() -> runner.Scoring:
    return Scoring([], list)
