"""Import images of another program, named as the published scripts name them: `INDEX.png`.

INDEX = position of the person in the program's order x number of prompts + position of the prompt.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from ..app.jobs import prompts_file
from ..errors import FastFaceError, UsageError, nearest
from ..identity.photos import SUFFIXES
from ..output.metadata import installed_versions
from ..recipe.schema import Recipe
from .dataset import Dataset
from .maker import error_record
from .metrics.base import Rules
from .people import People
from .rows import Row
from .runner import EvaluationPlan
from .runs import Run


def read_order(file: Path, dataset: Dataset) -> list[str]:
    """Read the order of people that defines INDEX.

    Args:
        file: names or file names, one per line.
        dataset: the data set of these people.

    Raises:
        UsageError: a name is unknown, repeated or missing.
    """
    known = {subject.name for subject in dataset.subjects}
    order = []
    for line in prompts_file(file):
        name = Path(line).name
        if name not in known and Path(name).suffix.lower() in SUFFIXES:
            name = Path(name).stem
        if name not in known:
            near = nearest(name, known)
            raise UsageError(
                f"'{name}' in {file} is not in the data set",
                f"did you mean '{near}'?" if near else None,
            )
        order.append(name)
    if missing := sorted(known - set(order)):
        raise UsageError(
            f"{file} does not list {', '.join(missing[:5])}",
            "list every person once, also those without images",
        )
    if len(order) > len(known):
        twice = next(name for name in order if order.count(name) > 1)
        raise UsageError(f"{file} lists '{twice}' twice", "list every person once")
    return order


log = logging.getLogger(__name__)


def adopt(
    images: Path,
    folder: Path,
    dataset: Dataset,
    order: Path,
    *,
    name: str,
    recipe: Recipe,
    rules: Rules,
    split: str,
) -> None:
    """Create a run from existing images. Images are copied and not scored.

    Args:
        images: folder of INDEX.png.
        folder: RUN/.
        dataset: the data set that the images were generated from.
        order: see `read_order`.
        name: recipe name of the images.
        recipe: recipe whose face models score them.
        rules: evaluation protocol.
        split: prompt set, for the record.

    Raises:
        UsageError: there are no images, or RUN contains something else.
    """
    people = {person: index for index, person in enumerate(read_order(order, dataset))}
    if not any((images / f"{index}.png").is_file() for index in range(len(people) * len(dataset.prompts))):
        raise UsageError(f"{images} contains no INDEX.png of this data set", "expected 0.png, 1.png, ...")
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
        "pictures": str(images),
        "metrics": [],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    plan = EvaluationPlan({name: recipe}, dataset)
    with Run.open(folder, info) as run:
        photos = People(folder, {}, log.warning)
        for subject in dataset.subjects:
            photos.keep_photos(subject)
        known = run.rows()
        for row in plan.rows():
            if row.key not in known:
                index = people[row.identity] * len(dataset.prompts) + row.prompt_index
                run.add(*_read(row, images / f"{index}.png"))


def _read(row: Row, file: Path) -> tuple[Row, bytes | None]:
    try:
        return row, file.read_bytes()
    except OSError as error:
        missing = FastFaceError(f"cannot read {file.name}: {error.strerror}", None)
        return replace(row, file=None, error=error_record(missing)), None
