"""`fastface eval`: a data set through recipes, measured; and what is done with such a run afterwards."""

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
from .completion import complete_field, complete_metric, complete_recipe
from .options import DeviceOption, DtypeOption

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
    typer.Option("--dataset", metavar="DIR", help="Photos and prompts, a JSONL manifest, or 'diversefaces'."),
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", help="Prompts, one a line, in place of the data set's.")
]
SplitOption = Annotated[
    str, typer.Option(help="Prompts of the published data set: full, realistic or style.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.", show_default=False)
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        help="Names, as 'id,clip-l14'; 'none' measures later.",
        show_default="what fits the models",
        autocompletion=complete_metric,
    ),
]
ProtocolOption = Annotated[
    str, typer.Option(help="fastface, or published: as the paper did, with its faults.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Fetch nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def evaluate(
    context: typer.Context,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Recipe to compare; repeat it. The first one is the measure.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    dataset: DatasetOption = None,
    output: OutputOption = None,
    prompts: PromptsOption = None,
    split: SplitOption = "full",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each person and prompt.")] = 1,
    stress: Annotated[
        str | None, typer.Option(help="Degrade the photos too: blur,lowlight,occlusion,jpeg,small.")
    ] = None,
    metrics: MetricsOption = None,
    protocol: ProtocolOption = "fastface",
    engine: Annotated[str, typer.Option(help="local, or ray for many machines.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that make pictures.", show_default="one a GPU")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of a process, on a CPU.")] = 1,
    shard: Annotated[str, typer.Option(help="A part of the run, as 2/8.")] = "1/1",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed pictures again.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change all recipes: sampling.width=64.", autocompletion=complete_field),
    ] = None,
    stack: Annotated[Path | None, typer.Option(help="Folder of local weights for the models.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    commercial: Annotated[
        bool, typer.Option("--commercial", help="Refuse models whose license forbids commercial use.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say which recipe is better, by how much, and how sure that is.

    Every prompt is made with every person of a data set and every recipe, measured and compared. The same
    command goes on where it was stopped.

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
        raise UsageError(f"there is no engine '{engine}'", "use local or ray")
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
    scoring = setup.scoring(names, plan.recipes, worker_setup, rules, settings)
    info = setup.describe(plan, worker_setup, rules=rules, split=split, metrics=names)
    people = setup.people(output, plan.recipes, worker_setup, settings, console.note)
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
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a folder of INDEX.png.")],
    metrics: MetricsOption = None,
    again: Annotated[bool, typer.Option("--again", help="Also what is scored already.")] = False,
    identity_order: Annotated[
        Path | None, typer.Option(metavar="FILE", help="People in the order of INDEX.png, one a line.")
    ] = None,
    dataset: DatasetOption = None,
    prompts: PromptsOption = None,
    split: SplitOption = "full",
    name: Annotated[str, typer.Option(help="What to call the pictures of INDEX.png.")] = "pictures",
    output: OutputOption = None,
    face: Annotated[
        str, typer.Option(metavar="RECIPE", help="Whose face models measure INDEX.png.")
    ] = "hyper-fastface",
    protocol: Annotated[
        str | None, typer.Option(help="fastface or published.", show_default="the run's")
    ] = None,
    device: DeviceOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a run later or by more metrics, or score pictures that another program made.

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
                f"{run} is a run and knows its data set", "leave out --dataset, --identity-order and -o"
            )
        folder = run
    else:
        if identity_order is None or dataset is None or output is None:
            raise UsageError(
                f"{run} is not a run",
                "for pictures of another program give --dataset, --identity-order and -o",
            )
        rules = _rules(protocol or "fastface")
        (recipe,) = _recipes([face], [], None).values()  # by its own name, whatever it was called here
        adopt(
            run,
            output,
            _dataset(dataset, prompts, split, rules),
            identity_order,
            name=name,
            recipe=recipe,
            rules=rules,
            split=split,
            log=console.note,
        )
        folder = output
    with Run.reopen(folder) as opened:
        rules = _rules(protocol or opened.info["options"]["protocol"])
        recipes = {
            key: Recipe.model_validate(value, strict=False) for key, value in opened.info["recipes"].items()
        }
        names = _metrics(metrics, recipes, rules)
        scoring = setup.scoring(names, recipes, worker_setup, rules, settings)
        with _progress(len(opened.rows()), making=False) as observer:
            score_run(opened, scoring, observer, again=again)
        _finish(opened, as_json=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    as_json: JsonOption = False,
) -> None:
    """Write the numbers and the page of a run anew, from what it holds.

    Example: fastface eval report run/
    """
    from ..evaluation.runs import Run

    with Run.reopen(run) as opened:
        _finish(opened, as_json=as_json)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Runs made with --shard.")],
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Join the shards of a run that were made apart.

    Example: fastface eval merge shard1/ shard2/ -o run/
    """
    from ..evaluation.merge import merge as merge_shards
    from ..evaluation.runs import Run

    if output is None:
        raise UsageError("merge needs -o", "fastface eval merge shard1/ shard2/ -o run/")
    merge_shards(shards, output)
    with Run.reopen(output) as run:
        _finish(run, as_json=as_json)


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run that is compared with.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The other one.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="A=B",
            help="Which recipe of RUN_A goes with which of RUN_B; repeat it.",
            show_default="those of one name",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What changed from one finished run to another, over the same people, prompts and seeds.

    Example: fastface eval compare before/ after/
    """
    from ..evaluation.compare import compare_runs, comparison_tables

    found = compare_runs(run_a, run_b, recipes=_recipe_pairs(recipe or []) or None)
    if as_json:
        console.print_json({"ok": True, "runs": [str(run_a), str(run_b)], **found.to_json(), "error": None})
        return
    for table in comparison_tables(found):
        console.print_table(table.title, table.columns, table.rows)
    for pairing in found.pairings:
        if pairing.changed:
            console.note(f"the recipes differ (then: {pairing.a} in {run_a}, now: {pairing.b} in {run_b}):")
            console.note("\n".join(pairing.changed))
        if any(pairing.alone):
            console.note(f"{pairing.b}: {sum(pairing.alone)} images are in one run alone and do not count")
        if pairing.other_seeds:
            console.note(f"{pairing.b}: {pairing.other_seeds} of {pairing.pairs} pairs have different seeds")
    if found.changed:
        console.note(f"the runs differ (then: {run_a}, now: {run_b}):")
        console.note("\n".join(found.changed))


def _recipe_pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        first, equals, second = text.partition("=")
        if not (first and equals and second):
            raise UsageError(f"--recipe '{text}' is no pair", "write it as FIRST=SECOND")
        pairs[first] = second
    return pairs


def _finish(run: Run, *, as_json: bool) -> None:
    """Write the numbers and the page, and show them.

    Raises:
        FastFaceError: there is not one picture.
    """
    from ..evaluation.metrics.base import columns_of, make_metrics
    from ..evaluation.report import FEW
    from ..evaluation.runner import finish, metrics_of
    from ..evaluation.table import tables

    metrics = make_metrics(metrics_of(run.folder))
    summary = finish(run, metrics, columns_of(metrics))
    counts = summary["counts"].values()
    failed, made = sum(one["failed"] for one in counts), sum(one["images"] for one in counts)
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
        console.note(f"{failed} of {failed + made} pictures could not be made; the page lists why")
    if 0 < len(summary["identities"]) < FEW:
        console.note(f"fewer than {FEW} identities say little about people in general; better are 50")
    if failed and not made:
        raise FastFaceError("not one picture could be made", f"{page} lists why")


def _recipes(
    names: Sequence[str], overrides: list[str], stack: Path | None, rules: Rules = "fastface"
) -> dict[str, Recipe]:
    from ..recipe.files import load_recipe

    flags = {}
    if rules == "published":  # its data set was drawn so; single pictures were drawn with 0.6
        flags["adapter.lora_scale"] = (0.8, "--protocol published")
        console.note("adapter.lora_scale is 0.8, as in the published data set; --set changes it")
    found: dict[str, Recipe] = {}
    for name in names:
        recipe = load_recipe(name, overrides=overrides, flags=flags, stack=stack).recipe
        if recipe.name in found:
            raise UsageError(
                f"two recipes are called '{recipe.name}'", "copy one of them to a file of another name"
            )
        if re.search(r'[/\\:*?"<>|+]', recipe.name):
            raise UsageError(
                f"'{recipe.name}' cannot name a folder", "rename the recipe's file: letters and dashes"
            )
        found[recipe.name] = recipe
    return found


def _dataset(name: str, prompts: Path | None, split: str, rules: Rules) -> Dataset:
    from ..evaluation.dataset import SPLITS, load_dataset
    from ..evaluation.download import DIVERSEFACES, diversefaces_folder

    chosen = next((one for one in SPLITS if one == split), None)
    if chosen is None:
        raise UsageError(f"there is no split '{split}'", f"use one of {', '.join(SPLITS)}")
    path = Path(name).expanduser()
    if name == DIVERSEFACES and not path.exists():
        from ..settings import load_settings

        path = diversefaces_folder(load_settings())
        if not path.is_dir():
            raise UsageError("diversefaces has not been fetched", "fastface download diversefaces")
    found = load_dataset(path, prompts=prompts, split=chosen, lower=rules == "published")
    again = [text for text, count in Counter(found.prompts).items() if count > 1]
    if again:
        console.note(
            f"{len(again)} prompt{' is' if len(again) == 1 else 's are'} given more than once, "
            f"as '{again[0][:80]}': "
            "each time counts as a prompt of its own"
        )
    return found


def _metrics(given: str | None, recipes: Mapping[str, Recipe], rules: Rules) -> list[str]:
    from ..evaluation.setup import default_metrics

    if given is None:
        return default_metrics(recipes, rules)
    names = [part.strip() for part in given.split(",") if part.strip()]
    return [] if names == ["none"] else names


def _check_licenses(recipes: Mapping[str, Recipe], metrics: Sequence[str]) -> None:
    """Refuse recipes and metrics whose models forbid commercial use.

    Raises:
        LicenseError: names them.
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
        f"there is no protocol '{protocol}'",
        f"did you mean '{near}'?" if near else "use fastface or published",
    )


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard '{text}' is not a part of a whole", "write it as 2/8: the second of eight")
    return int(match[1]), int(match[2])


@contextmanager
def _progress(total: int, *, making: bool = True) -> Iterator[RunObserver]:
    """Progress of making and scoring."""
    from ..evaluation.runner import RunObserver

    with console.step_progress() as progress:
        made = progress.add_task("made", total=total, visible=making)
        scored = progress.add_task("scored", total=total)

        def advance(task: Any, count: int) -> None:
            progress.advance(task, count)

        yield RunObserver(
            console.note, lambda count: advance(made, count), lambda count: advance(scored, count)
        )
