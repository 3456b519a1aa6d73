"""Pictures that another program made, as the published scripts name them: `INDEX.png`.

INDEX = place of the person in the program's order x number of prompts + place of the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..app.jobs import prompts_file
from ..errors import FastFaceError, UsageError, nearest
from ..output.metadata import installed_versions
from ..recipe.schema import Recipe
from .dataset import PHOTO_SUFFIXES, Dataset
from .maker import error_record
from .metrics.base import Rules
from .people import People
from .rows import Row
from .runner import EvaluationPlan
from .runs import Run


def read_order(file: Path, dataset: Dataset) -> list[str]:
    """People in the order that gave the indices.

    Args:
        file: names or file names, one a line.
        dataset: whose people they are.

    Raises:
        UsageError: a name that the data set does not have, one named twice, or one not named.
    """
    known = {subject.name for subject in dataset.subjects}
    order = []
    for line in prompts_file(file):
        name = Path(line).name
        if name not in known and Path(name).suffix.lower() in PHOTO_SUFFIXES:
            name = Path(name).stem
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"{file} names '{name}', who is not in the data set",
                f"did you mean '{near}'?" if near else None,
            )
        order.append(name)
    if missing := sorted(known - set(order)):
        raise UsageError(
            f"{file} does not name {', '.join(missing[:5])}",
            "every person stands in it once, also without pictures",
        )
    if len(order) > len(known):
        twice = next(name for name in order if order.count(name) > 1)
        raise UsageError(f"{file} names '{twice}' twice", "every person stands in it once")
    return order


def adopt(
    pictures: Path,
    folder: Path,
    dataset: Dataset,
    order: Path,
    *,
    name: str,
    recipe: Recipe,
    rules: Rules,
    split: str,
    log: Callable[[str], None],
) -> None:
    """Make a run of pictures that are there already; they are copied, unscored.

    Args:
        pictures: folder with INDEX.png.
        folder: RUN/.
        dataset: what they were made of.
        order: see `read_order`.
        name: what stands in the place of a recipe's name.
        recipe: whose face models measure them.
        rules: the protocol of scoring.
        split: for the record.
        log: told of what is missing.

    Raises:
        UsageError: no picture is there, or RUN holds something else.
    """
    people = {person: index for index, person in enumerate(read_order(order, dataset))}
    if not any((pictures / f"{index}.png").is_file() for index in range(len(people) * len(dataset.prompts))):
        raise UsageError(f"{pictures} holds no INDEX.png of this data set", "as 0.png, 1.png, ...")
    info = {
        "recipes": {name: recipe.model_copy(update={"name": name}).canonical()},
        "dataset": dataset.record(),
        "options": {
            "protocol": rules,
            "split": split,
            "seeds": 1,
            "stress": [],
            "identity_order": list(people),
        },
        "versions": dict(installed_versions()),
        "pictures": str(pictures),
        "metrics": [],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    plan = EvaluationPlan({name: recipe}, dataset)
    with Run.open(folder, info) as run:
        keeper = People(folder, {}, log)
        for subject in dataset.subjects:
            keeper.keep_photos(subject)
        known = run.rows()
        for row in plan.rows():
            if row.key not in known:
                index = people[row.identity] * len(dataset.prompts) + row.prompt_index
                run.add(*_picture(row, pictures / f"{index}.png"))


def _picture(row: Row, file: Path) -> tuple[Row, bytes | None]:
    try:
        return row, file.read_bytes()
    except OSError as error:
        missing = FastFaceError(f"there is no picture {file.name}: {error.strerror}", None)
        return replace(row, file=None, error=error_record(missing)), None
