"""`fastface eval`: generate a data set with recipes, score it, and work with the finished run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import FastFaceError, UsageError, nearest
from . import options
from .completion import complete_metric, complete_recipe

if TYPE_CHECKING:
    from ..evaluation.dataset import Dataset
    from ..evaluation.metrics.base import Rules
    from ..evaluation.runner import RunObserver
    from ..evaluation.runs import Run
    from ..recipe.schema import Recipe

app = typer.Typer(
    short_help="Compare recipes on a data set.",
    invoke_without_command=True,
)

DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset", metavar="DIR", help="Folder of photos and prompts, JSONL manifest, or 'diversefaces'."
    ),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", help="Prompts file, one per line; replaces the data set's."),
]
SplitOption = Annotated[
    str, typer.Option(help="Prompt set of the published data set: full, realistic or style.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="RUN", help="Output folder of the run.", show_default=False),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        help="Metrics, comma-separated (id,clip-l14); 'none' to score later.",
        show_default="those that fit the models",
        autocompletion=complete_metric,
    ),
]
ProtocolOption = Annotated[
    str, typer.Option(help="Protocol: fastface, or published (the paper's, with its known bugs).")
]


@app.callback()
def evaluate(
    context: typer.Context,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Recipe to compare; repeatable. The first one is the baseline.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    dataset: DatasetOption = None,
    output: OutputOption = None,
    prompts: PromptsOption = None,
    split: SplitOption = "full",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Number of images per person and prompt.")] = 1,
    stress: Annotated[
        str | None,
        typer.Option(help="Also use degraded photos: blur,lowlight,occlusion,jpeg,small."),
    ] = None,
    metrics: MetricsOption = None,
    protocol: ProtocolOption = "fastface",
    engine: Annotated[str, typer.Option(help="Where workers run: local, or ray for a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of worker processes.", show_default="one per GPU")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads per process, on a CPU.")] = 1,
    shard: Annotated[str, typer.Option(help="Part of the run: 2/8 is the second of eight.")] = "1/1",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry failed images.")] = False,
    set_: options.SetOption = None,
    stack: options.StackOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    offline: options.OfflineOption = False,
    commercial: options.CommercialOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare recipes on a data set, with 95% confidence intervals.

    Generates an image for every recipe, person and prompt, scores the images and compares the recipes. Run
    the same command again to resume an interrupted run.

    Examples:

      fastface eval --recipe pocket-fastface --recipe pocket-baseline --dataset examples/mini -o run/

      fastface eval --recipe hyper-fastface --recipe hyper-baseline --dataset diversefaces --seeds 2 -o run/
    """
    if context.invoked_subcommand is not None:
        return
    if not recipe or dataset is None or output is None:
        raise UsageError(
            "eval needs --recipe, --dataset and -o",
            "fastface eval --recipe pocket-fastface --recipe pocket-baseline --dataset examples/mini -o run/",
        )
    from ..evaluation import setup
    from ..evaluation.runner import EvaluationPlan, generate
    from ..evaluation.runs import Run
    from ..evaluation.stress import parse_stresses
    from ..settings import load_settings

    settings = load_settings()
    rules = _rules(protocol)
    if engine not in ("local", "ray"):
        raise UsageError(f"unknown engine '{engine}'", "use local or ray")
    worker_setup = setup.WorkerSetup(
        engine="ray" if engine == "ray" else "local",
        address=address,
        workers=workers,
        threads=threads,
        device=device or settings.device,
        dtype=dtype,
        offline=True if offline else None,
    )
    plan = EvaluationPlan(
        _recipes(recipe, set_ or [], stack, rules),
        _dataset(dataset, prompts, split, rules),
        seeds,
        parse_stresses(stress or ""),
        _shard(shard),
    )
    names = _metrics(metrics, plan.recipes, rules)
    if commercial:
        _check_licenses(plan.recipes, names)
    setup.check_machine(plan.recipes, worker_setup)
    with console.download_bars() as progress:
        scoring = setup.scoring(names, plan.recipes, worker_setup, rules, settings, progress)
    info = setup.describe(plan, worker_setup, rules=rules, split=split, metrics=names)
    with console.download_bars() as progress:
        people = setup.people(output, plan.recipes, worker_setup, settings, console.note, progress)
    with Run.open(output, info) as run:
        with _progress(plan.count()) as observer:
            generate(
                run,
                plan,
                lambda: setup.pool(plan, worker_setup),
                people,
                scoring,
                retry_failed=retry_failed,
                observer=observer,
            )
        _finish(run, as_json=as_json)


@app.command()
def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of INDEX.png images.")],
    metrics: MetricsOption = None,
    again: Annotated[bool, typer.Option("--again", help="Also replace existing scores.")] = False,
    identity_order: Annotated[
        Path | None, typer.Option(metavar="FILE", help="People in the order of INDEX.png, one per line.")
    ] = None,
    dataset: DatasetOption = None,
    prompts: PromptsOption = None,
    split: SplitOption = "full",
    name: Annotated[str, typer.Option(help="Recipe name of INDEX.png in the report.")] = "pictures",
    output: OutputOption = None,
    face: Annotated[
        str, typer.Option(metavar="RECIPE", help="Recipe whose face models score INDEX.png.")
    ] = "hyper-fastface",
    protocol: Annotated[
        str | None, typer.Option(help="Protocol: fastface or published.", show_default="the run's")
    ] = None,
    device: options.DeviceOption = None,
    offline: options.OfflineOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Score a run later or with more metrics, or score images of another program.

    Examples:

      fastface eval score run/ --metrics image-reward

      fastface eval score theirs/ --dataset diversefaces --identity-order order.txt -o run/
    """
    from ..evaluation import setup
    from ..evaluation.foreign import adopt
    from ..evaluation.runner import score as score_run
    from ..evaluation.runs import Run
    from ..recipe.schema import Recipe
    from ..settings import load_settings

    settings = load_settings()
    worker_setup = setup.WorkerSetup(device=device or settings.device, offline=True if offline else None)
    if (run / "run.json").is_file():
        if identity_order is not None or dataset is not None or output is not None:
            raise UsageError(
                f"{run} is a run, which already has its data set", "omit --dataset, --identity-order and -o"
            )
        folder = run
    else:
        if identity_order is None or dataset is None or output is None:
            raise UsageError(
                f"{run} is not a run",
                "to score images of another program, add --dataset, --identity-order and -o",
            )
        check_name(name, "choose another --name")
        rules = _rules(protocol or "fastface")
        (recipe,) = _recipes([face], [], None).values()  # keyed by its own name, not by --face
        adopt(
            run,
            output,
            _dataset(dataset, prompts, split, rules),
            identity_order,
            name=name,
            recipe=recipe,
            rules=rules,
            split=split,
        )
        folder = output
    with Run.reopen(folder) as opened:
        rules = _rules(protocol or opened.info["options"]["protocol"])
        recipes = {
            key: Recipe.model_validate(value, strict=False) for key, value in opened.info["recipes"].items()
        }
        names = _metrics(metrics, recipes, rules)
        with console.download_bars() as progress:
            scoring = setup.scoring(names, recipes, worker_setup, rules, settings, progress)
        with _progress(len(opened.rows()), making=False) as observer:
            score_run(opened, scoring, observer, again=again)
        _finish(opened, as_json=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run; it may be unfinished.")],
    as_json: options.JsonOption = False,
) -> None:
    """Write the tables and the report page of a run again.

    Example: fastface eval report run/
    """
    from ..evaluation.runs import Run

    with Run.reopen(run) as opened:
        _finish(opened, as_json=as_json)


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that contains runs.")],
    as_json: options.JsonOption = False,
) -> None:
    """Write a page that lists all runs of a folder, with their results and links to their reports.

    Example: fastface eval index .
    """
    from ..evaluation.index import write_index

    page, runs = write_index(folder)
    if as_json:
        console.print_json(
            {"ok": True, "index": str(page), "runs": [str(run) for run in runs], "error": None}
        )
    else:
        console.line(str(page))


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Runs made with --shard.")],
    output: OutputOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Merge the shards of a run.

    Example: fastface eval merge shard1/ shard2/ -o run/
    """
    from ..evaluation.merge import merge as merge_shards
    from ..evaluation.runs import Run

    if output is None:
        raise UsageError("eval merge needs -o", "fastface eval merge shard1/ shard2/ -o run/")
    merge_shards(shards, output)
    with Run.reopen(output) as run:
        _finish(run, as_json=as_json)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Baseline run.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Run to compare with the baseline.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="A=B",
            help="Pair of recipes to compare; repeatable.",
            show_default="same names",
        ),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compare two finished runs over the same people, prompts and seeds.

    Example: fastface eval compare before/ after/
    """
    from ..evaluation.compare import compare_runs, comparison_tables

    comparison = compare_runs(run_a, run_b, recipes=_recipe_pairs(recipe or []) or None)
    if as_json:
        console.print_json(
            {"ok": True, "runs": [str(run_a), str(run_b)], **comparison.to_json(), "error": None}
        )
        return
    for table in comparison_tables(comparison):
        console.print_table(table.title, table.columns, table.rows)
    for pairing in comparison.pairings:
        if pairing.changed:
            console.note(f"the recipes differ (before: {pairing.a} in {run_a}, now: {pairing.b} in {run_b}):")
            console.note("\n".join(pairing.changed))
        if any(pairing.alone):
            console.note(f"{pairing.b}: {sum(pairing.alone)} images are only in one run and are ignored")
        if pairing.other_seeds:
            console.note(f"{pairing.b}: {pairing.other_seeds} of {pairing.pairs} pairs have different seeds")
    if comparison.changed:
        console.note(f"the runs differ (before: {run_a}, now: {run_b}):")
        console.note("\n".join(comparison.changed))


def _recipe_pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        first, equals, second = text.partition("=")
        if not (first and equals and second):
            raise UsageError(f"--recipe '{text}' is not a pair", "write it as FIRST=SECOND")
        pairs[first] = second
    return pairs


def _finish(run: Run, *, as_json: bool) -> None:
    """Write the tables and the report page, and print the results.

    Raises:
        FastFaceError: every image failed.
    """
    from ..evaluation.metrics.base import columns_of, make_metrics
    from ..evaluation.report import FEW
    from ..evaluation.runner import finish, metrics_of
    from ..evaluation.table import tables

    metrics = make_metrics(metrics_of(run.folder))
    summary = finish(run, metrics, columns_of(metrics))
    counts = summary["counts"].values()
    failed, generated = sum(count["failed"] for count in counts), sum(count["images"] for count in counts)
    page = run.folder / "report.html"
    if as_json:
        console.print_json(
            {"ok": True, "run": str(run.folder), "report": str(page), "summary": summary, "error": None}
        )
    else:
        for table in tables(summary):
            console.print_table(table.title, table.columns, table.rows)
        console.line(str(page))
    if failed:
        console.note(f"{failed} of {failed + generated} images failed; the report lists the reasons")
    if 0 < len(summary["identities"]) < FEW:
        console.note(f"results for fewer than {FEW} identities do not generalize; use about 50")
    if failed and not generated:
        raise FastFaceError("all images failed", f"{page} lists the reasons")


def check_name(name: str, hint: str = "rename the recipe") -> None:
    """Check that the images of a recipe can be in a folder of its name, on any system.

    Raises:
        UsageError: the name is empty, too long, or not a plain file name.
    """
    from ..evaluation.dataset import LONGEST, names_a_folder

    if "+" in name or not names_a_folder(name):
        raise UsageError(
            f"recipe name {name[:80]!r} is not a valid folder name",
            f"{hint}: use letters and dashes, at most {LONGEST} bytes",
        )


def _recipes(
    names: Sequence[str], overrides: list[str], stack: Path | None, rules: Rules = "fastface"
) -> dict[str, Recipe]:
    from ..recipe.files import load_recipe

    flags = {}
    if rules == "published":  # used for the published data set; the paper's single images use 0.6
        flags["adapter.lora_scale"] = (0.8, "--protocol published")
        console.note("adapter.lora_scale is 0.8, as in the published data set; change it with --set")
    recipes: dict[str, Recipe] = {}
    for name in names:
        recipe = load_recipe(name, overrides=overrides, flags=flags, stack=stack).recipe
        if recipe.name in recipes:
            raise UsageError(
                f"two recipes are called '{recipe.name}'", "copy one of them to a file with another name"
            )
        check_name(recipe.name)
        recipes[recipe.name] = recipe
    return recipes


def _dataset(name: str, prompts: Path | None, split: str, rules: Rules) -> Dataset:
    from ..evaluation.dataset import SPLITS, load_dataset
    from ..evaluation.download import DIVERSEFACES, diversefaces_folder

    chosen = next((name for name in SPLITS if name == split), None)
    if chosen is None:
        raise UsageError(f"unknown split '{split}'", f"use one of {', '.join(SPLITS)}")
    path = Path(name).expanduser()
    if name == DIVERSEFACES and not path.exists():
        from ..settings import load_settings

        path = diversefaces_folder(load_settings())
        if not path.is_dir():
            raise UsageError("diversefaces is not downloaded", "fastface download diversefaces")
    dataset = load_dataset(path, prompts=prompts, split=chosen, lower=rules == "published")
    repeated = [text for text, count in Counter(dataset.prompts).items() if count > 1]
    if repeated:
        prompts_are = "prompt is" if len(repeated) == 1 else "prompts are"
        console.note(
            f"{len(repeated)} {prompts_are} repeated, for example '{repeated[0][:80]}': "
            "each repetition counts as a separate prompt"
        )
    return dataset


def _metrics(given: str | None, recipes: Mapping[str, Recipe], rules: Rules) -> list[str]:
    from ..evaluation.setup import default_metrics

    if given is None:
        return default_metrics(recipes, rules)
    names = [part.strip() for part in given.split(",") if part.strip()]
    return [] if names == ["none"] else names


def _check_licenses(recipes: Mapping[str, Recipe], metrics: Sequence[str]) -> None:
    """Refuse recipes and metrics whose models forbid commercial use.

    Raises:
        LicenseError: a model forbids it.
    """
    from ..app.licensing import artifacts_of, check_commercial
    from ..evaluation.metrics.base import registry
    from ..store.manifest import resolve

    parts = [part for recipe in recipes.values() for part in artifacts_of(recipe).values()]
    known = registry()
    parts += [resolve(need) for name in metrics if name in known for need in known[name]().needs.artifacts]
    check_commercial(parts, "this run")


def _rules(protocol: str) -> Rules:
    if protocol == "fastface":
        return "fastface"
    if protocol == "published":
        return "published"
    near = nearest(protocol, ("fastface", "published"))
    raise UsageError(
        f"unknown protocol '{protocol}'",
        f"did you mean '{near}'?" if near else "use fastface or published",
    )


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard '{text}' is not valid", "write it as 2/8: the second of eight")
    return int(match[1]), int(match[2])


@contextmanager
def _progress(total: int, *, making: bool = True) -> Iterator[RunObserver]:
    """Show progress bars of generation and scoring."""
    from ..evaluation.runner import RunObserver

    with console.step_progress() as progress:
        generated = progress.add_task("generated", total=total, visible=making)
        scored = progress.add_task("scored", total=total)

        def advance(task: Any, count: int) -> None:
            progress.advance(task, count)

        yield RunObserver(
            console.note, lambda count: advance(generated, count), lambda count: advance(scored, count)
        )
