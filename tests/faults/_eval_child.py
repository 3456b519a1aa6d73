"""One small evaluation with real identities, references, images, rows and vectors, but without models.

python -m tests.faults._eval_child PHOTOS RUN    starts or resumes the run; exit code as `fastface eval`
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import eval_stand_ins as stand_in
from support.face_stand_ins import SquareAnalyzer, drawn

from fastface_cli.errors import FastFaceError
from fastface_cli.evaluation.dataset import load_dataset
from fastface_cli.evaluation.people import People
from fastface_cli.evaluation.runner import EvaluationPlan, generate, joined
from fastface_cli.evaluation.runs import Run
from fastface_cli.recipe.files import load_recipe

PEOPLE, PROMPTS = 6, 20
ROWS = PEOPLE * PROMPTS


def write_photos(folder: Path) -> Path:
    """Photos of six people, and prompts."""
    (folder / "id_photos").mkdir(parents=True)
    for index in range(PEOPLE):
        photo = drawn((240, 200), (60, 40, 100, 7 + index))
        photo.save(folder / "id_photos" / f"p{index}.png")
    (folder / "prompts.txt").write_text("".join(f"prompt {index}\n" for index in range(PROMPTS)))
    return folder


def run(photos: Path, folder: Path) -> list[dict[str, Any]]:
    """Run or resume; return the rows without times."""
    recipe = load_recipe("pocket").recipe
    plan = EvaluationPlan({recipe.name: recipe}, load_dataset(photos))
    with Run.open(folder, stand_in.info(plan)) as opened:
        people = People(folder, {str(recipe.model.face): SquareAnalyzer}, lambda _: None)
        metric = stand_in.Brightness()
        generate(opened, plan, lambda: stand_in.Here(stand_in.slow), people, stand_in.scoring(metric))
        return [replace(row, seconds=None).to_json() for row in joined(opened, [metric])]


def contents(photos: Path, folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """The rows of a finished run, and its images, references and identities."""
    rows = run(photos, folder)
    files = [path for name in ("images", "references", "identities") for path in (folder / name).rglob("*")]
    return rows, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.is_file()}


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]))
    except FastFaceError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
