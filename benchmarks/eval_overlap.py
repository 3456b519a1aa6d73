"""Compare the time of an evaluation with that of generating alone and of scoring alone.

Both run in parallel, so the evaluation should take as long as the slower one.

    python benchmarks/eval_overlap.py [--dataset examples/mini] [--recipe pocket-fastface] [--seeds 8]

The worker process is pinned to one core; this process and the scoring process share another. Models are
loaded and identities computed before the measurement: they do not matter in a run of hours, but would
dominate a short run.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastface_cli.evaluation import setup
from fastface_cli.evaluation.dataset import load_dataset
from fastface_cli.evaluation.engines import LocalPool, Outcome
from fastface_cli.evaluation.maker import ImageTask, Make, MakerFactory
from fastface_cli.evaluation.metrics.base import Metric
from fastface_cli.evaluation.runner import EvaluationPlan, Scoring, generate, score
from fastface_cli.evaluation.runs import Run
from fastface_cli.evaluation.scoring import Load, ScoringProcess, ToScore
from fastface_cli.recipe.files import load_recipe
from fastface_cli.settings import load_settings

CORES = sorted(os.sched_getaffinity(0))


def pinned(factory: MakerFactory, core: int, device: str) -> Make:
    """Create the maker of a worker and pin the worker to a core."""
    os.sched_setaffinity(0, {core})
    return factory(device)


class Warm(LocalPool):
    """A pool that is started once and used by several runs."""

    started = False

    def start(self, slot: int) -> None:
        if not self.started:
            super().start(slot)
        self.started = True

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()

    def warm_up(self, task: ImageTask) -> list[tuple[int, Outcome]]:
        self.start(0)
        self.send(0, task)
        return self.wait()


class Loaded(Scoring):
    """Scoring with a process that has already loaded its models."""

    def __init__(self, metrics: Sequence[Metric], load: Load) -> None:
        super().__init__(metrics, load)
        self._ready = super().judge()
        self._ready.send(ToScore(Path(), ()))
        self._ready.receive()

    def judge(self) -> ScoringProcess:
        return self._ready


@contextmanager
def fresh(folder: Path, info: dict[str, object], people: Path) -> Iterator[Run]:
    """Open a new run with computed identities."""
    with Run.open(folder, info) as run:
        shutil.copytree(people, folder / "identities")
        yield run


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("examples/mini"))
    parser.add_argument("--recipe", default="pocket-fastface")
    # The last chunk is scored after all images: two seconds, which is 6% of the time of 192 images.
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--metrics", default=None)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.sched_setaffinity(0, {CORES[0]})
    settings, machine = load_settings(), setup.WorkerSetup(device="cpu")
    recipes = {options.recipe: load_recipe(options.recipe).recipe}
    plan = EvaluationPlan(recipes, load_dataset(options.dataset), options.seeds)
    names = options.metrics.split(",") if options.metrics else setup.default_metrics(recipes, "fastface")

    def loaded() -> Loaded:
        """Load the metrics from scratch, so that no scores are cached."""
        scoring_setup = setup.scoring(names, recipes, machine, "fastface", settings)
        return Loaded(scoring_setup.metrics, scoring_setup.load)

    nothing = Scoring([], list)
    info = setup.describe(plan, machine, rules="fastface", split="full", metrics=names)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        people = setup.people(root / "first", recipes, machine, settings, print)
        row = next(plan.rows())
        subjects = {subject.name: subject for subject in plan.dataset.subjects}
        for subject in subjects.values():
            people.identity(subject, None, str(recipes[row.recipe].model.face))
        pool = Warm(functools.partial(pinned, MakerFactory(recipes), CORES[-1]), ["cpu"])
        pool.warm_up(ImageTask(row, people.identity(subjects[row.identity], None, "pocket-face")))
        print(f"{plan.count()} images, metrics {', '.join(names)}, cores {CORES[0]} and {CORES[-1]}")
        ratios = []
        for number in range(options.repeat):
            with fresh(root / f"apart{number}", info, root / "first/identities") as run:
                who = setup.people(run.folder, recipes, machine, settings, print)
                making = timed(lambda: generate(run, plan, lambda: pool, who, nothing))  # noqa: B023
                ready = loaded()
                scoring = timed(lambda: score(run, ready))  # noqa: B023
            with fresh(root / f"both{number}", info, root / "first/identities") as run:
                who = setup.people(run.folder, recipes, machine, settings, print)
                ready = loaded()
                both = timed(lambda: generate(run, plan, lambda: pool, who, ready))  # noqa: B023
            ratios.append(both / max(making, scoring))
            print(
                f"generating {making:6.2f} s   scoring {scoring:6.2f} s   together {both:6.2f} s   "
                f"together / longer {ratios[-1]:.3f}"
            )
        pool.end()
        print(f"median together / longer {sorted(ratios)[len(ratios) // 2]:.3f}")


if __name__ == "__main__":
    main()
