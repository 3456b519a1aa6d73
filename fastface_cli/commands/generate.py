"""`fastface generate`: a photo and a sentence in, that person in that scene out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import UsageError
from .completion import complete_field, complete_saving
from .options import DeviceOption, DtypeOption, RecipeOption

if TYPE_CHECKING:
    from PIL import Image

    from ..app.api import FastFace
    from ..app.best_of import Candidates, Scorer
    from ..app.pipeline import Picture, Pipeline, Request
    from ..identity.identity import Identity
    from ..output.metadata import Provenance
    from ..recipe.schema import Recipe
    from ..settings import Saving, Settings


@dataclass
class Options:
    """The flags of one call, as they were given."""

    recipe: str | None
    faces: list[Path]
    identity: Path | None
    prompts: list[str]
    prompts_file: Path | None
    negative_prompt: str | None
    output: str | None
    force: bool
    seed: int | None
    count: int
    best_of: int
    scales: list[float]
    flags: dict[str, tuple[Any, str]]
    overrides: list[str]
    stack: Path | None
    replay: Path | None
    jobs: str | None
    face_index: int | None
    face_box: tuple[float, float, float, float] | None
    save_identity: Path | None
    save_latents: Path | None
    grid: bool
    metadata: bool
    device: str | None
    dtype: str | None
    batch_size: int
    offline: bool
    low_memory: Saving | None
    accelerate: list[str]
    remember: bool
    commercial: bool
    as_json: bool
    verbose: int


@dataclass
class Work:
    """What is to be made, known before any model is touched."""

    recipe: Recipe
    prompts: list[str]
    negative_prompt: str | None
    seeds: list[int]
    """Of each picture of a prompt; of its first candidate where the best of several is kept."""
    scales: list[float]
    slots: list[list[Path]]
    """Where each picture goes, for each candidate that may become it: names may hold its seed."""
    best_of: int = 1
    expected_identity: str | None = None
    """Digest of the identity that a replayed picture was made with."""

    @property
    def paths(self) -> list[Path]:
        """Where the pictures go, if the first candidate of each is kept."""
        return self.slots[0]

    def cells(self) -> Iterator[tuple[str, int, float]]:
        """Prompt, seed and adapter scale of every picture, in order."""
        for prompt in self.prompts:
            for seed in self.seeds:
                for scale in self.scales:
                    yield prompt, seed, scale


@dataclass
class Report:
    """What has been done so far; printed as JSON also when the run fails half way."""

    images: list[dict[str, Any]] = field(default_factory=list)
    grid: Path | None = None

    def record(self) -> dict[str, Any]:
        """Its part of the JSON object."""
        return {"images": self.images} | ({"grid": str(self.grid)} if self.grid else {})


def generate(
    face: Annotated[
        list[Path] | None,
        typer.Option("--face", metavar="PHOTO", help="Photo of the person; repeat for several photos."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="What to make; repeat for several pictures."),
    ] = None,
    recipe: RecipeOption = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File, folder or template as '{recipe}-{seed}.png'.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; random when left out.")] = None,
    count: Annotated[int, typer.Option(min=1, max=10000, help="Pictures a prompt: seed, seed+1, ...")] = 1,
    best_of: Annotated[
        int,
        typer.Option(min=1, max=1000, help="Make N pictures for each and keep the one most like the person."),
    ] = 1,
    prompts_file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to stay away from.")] = None,
    identity: Annotated[Path | None, typer.Option(help="A saved identity in place of photos.")] = None,
    save_identity: Annotated[Path | None, typer.Option(help="Keep the person as FILE.safetensors.")] = None,
    face_index: Annotated[
        int | None, typer.Option(min=0, help="Which face of the photo, 0 being the largest.")
    ] = None,
    face_box: Annotated[str | None, typer.Option(help="Which face: a box 'x1,y1,x2,y2' in pixels.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Diffusion steps; picks the checkpoint.")] = None,
    size: Annotated[str | None, typer.Option(help="Picture size in pixels, as 1024x1024.")] = None,
    adapter_scale: Annotated[
        str | None, typer.Option(help="How strongly the identity speaks; a list '0.4,0.8' sweeps.")
    ] = None,
    lora_scale: Annotated[float | None, typer.Option(help="Weight of the LoRA inside the adapter.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change the recipe: guidance.text=[1,2,2,1].",
            autocompletion=complete_field,
        ),
    ] = None,
    stack: Annotated[
        Path | None, typer.Option(help="Folder of local weights for the recipe's models.")
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Make a picture again as this PNG says it was made.")
    ] = None,
    jobs: Annotated[str | None, typer.Option(help="JSON lines, one picture each; - reads stdin.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also a contact sheet of all pictures.")] = False,
    save_latents: Annotated[Path | None, typer.Option(help="Keep the latents as FILE.safetensors.")] = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", help="Write nothing into the PNG.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that share a UNet call.")] = 1,
    low_memory: Annotated[
        str | None,
        typer.Option(
            help="auto, off, 12, 8 or 6: GB of the card that the models must fit into.",
            show_default="auto",
            autocompletion=complete_saving,
        ),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the models first: worth it for many pictures.")
    ] = False,
    accelerate: Annotated[
        list[str] | None,
        typer.Option(metavar="ITEM=VALUE", help="Change an item of speed: channels_last=on, vae=half."),
    ] = None,
    remember: Annotated[
        bool, typer.Option("--remember", help="Keep the measured face, so that it is measured once.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing.")] = False,
    commercial: Annotated[
        bool, typer.Option("--commercial", help="Refuse models whose license forbids commercial use.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say what is done.")
    ] = 0,
) -> None:
    """Put a person into a picture: a photo and a sentence in, that person in that scene out.

    Examples:

      fastface generate --recipe pocket --face me.jpg --prompt "a woman smiling"

      fastface generate --face me.jpg --prompt "an astronaut in a cafe" --count 4 --seed 7 -o out/

      fastface generate --face me.jpg --prompt "a sailor" --best-of 4 -o picture.png

      fastface generate --from picture.png --face me.jpg
    """
    flags: dict[str, tuple[Any, str]] = {}
    if steps is not None:
        flags["sampling.steps"] = (steps, "--steps")
    if size is not None:
        width, height = _size(size)
        flags["sampling.width"] = (width, "--size")
        flags["sampling.height"] = (height, "--size")
    if lora_scale is not None:
        flags["adapter.lora_scale"] = (lora_scale, "--lora-scale")
    scales = _numbers(adapter_scale, "--adapter-scale") if adapter_scale is not None else []
    if len(scales) == 1:
        flags["adapter.scale"] = (scales[0], "--adapter-scale")
    options = Options(
        recipe=recipe,
        faces=face or [],
        identity=identity,
        prompts=prompt or [],
        prompts_file=prompts_file,
        negative_prompt=negative_prompt,
        output=output,
        force=force,
        seed=seed,
        count=count,
        best_of=best_of,
        scales=scales,
        flags=flags,
        overrides=set_ or [],
        stack=stack,
        replay=from_,
        jobs=jobs,
        face_index=face_index,
        face_box=_box(face_box) if face_box is not None else None,
        save_identity=save_identity,
        save_latents=save_latents,
        grid=grid,
        metadata=not no_metadata,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        offline=offline,
        low_memory=_saving(low_memory),
        accelerate=[*(["compile=on"] if compile_ else []), *(accelerate or [])],
        remember=remember,
        commercial=commercial,
        as_json=as_json,
        verbose=verbose,
    )
    if jobs is not None:
        from .jobs import run_jobs

        run_jobs(options)
        return
    report = Report()
    try:
        run(options, report)
    except BaseException as error:
        # Whatever ended the run: the JSON tells of the pictures that are there.
        vars(error)["partial"] = report.record()
        raise
    if as_json:
        console.print_json({"ok": True, **report.record(), "error": None})


def run(options: Options, report: Report) -> None:
    """One call of the command: cheap checks first, then device, models, face, pictures."""
    from ..settings import load_settings

    settings = load_settings()
    verbose = max(options.verbose, settings.verbosity)
    work = prepare(options, settings.recipe)
    identity, photos = people(options)
    face = ready(options, work.recipe, settings)
    if identity is None:
        identity = face.identity(*photos, face_index=options.face_index, face_box=options.face_box)
    if options.save_identity is not None:
        identity.save(options.save_identity, force=options.force)
    if work.expected_identity is not None and work.expected_identity != identity.digest():
        console.note("warning: this is not the identity that the picture was made with")
    if options.seed is None and not options.as_json:
        console.note(f"seed {work.seeds[0]}")
    if verbose:
        console.note(f"recipe {work.recipe.name}, digest {work.recipe.digest()[:12]}")
    began = time.perf_counter()
    pipeline = face.pipeline
    if verbose:
        took = time.perf_counter() - began
        console.note(f"models loaded in {took:.1f} s on {face.device}, {pipeline.dtype}")
        print_plan(pipeline.plan())
    scorer = face.scorer if work.best_of > 1 else None
    made = make(options, work, pipeline, identity, report, scorer)
    finish(options, work, made, report)


def ready(options: Options, recipe: Recipe, settings: Settings) -> FastFace:
    """The recipe made ready to run, its device and dtype checked before any model is fetched.

    Raises:
        DeviceError: no such device, or a full-size stack and no GPU.
        UsageError: no such dtype or item of speed, or two things that exclude each other.
    """
    from ..app.api import FastFace, check_device
    from ..app.pipeline import check_level
    from ..models.acceleration import check, parse
    from ..models.device import pick_device, pick_dtype
    from ..models.offload import LEVELS

    faster = parse(options.accelerate)
    device = check_device(recipe, options.device or settings.device)
    where = pick_device(device)
    check(faster, where, pick_dtype(options.dtype, where))
    saving = options.low_memory or settings.low_memory
    if saving != "auto":
        check_level(LEVELS[saving], faster)
    return FastFace(
        recipe,
        device=device,
        dtype=options.dtype,
        low_memory=options.low_memory,
        acceleration=faster,
        remember=options.remember,
        offline=True if options.offline else None,
        progress=True,
        log=console.note,
    )


def prepare(options: Options, default_recipe: str) -> Work:
    """Everything that can be wrong without a model, found before one is touched.

    Raises:
        UsageError: something is missing, contradictory or in the way.
        LicenseError: --commercial, and a license that forbids it.
    """
    from ..app.api import artifacts_of, check_commercial, random_seed
    from ..app.jobs import prompts_file
    from ..files import check_target
    from ..output.images import plan_paths

    provenance = _replayed(options)
    recipe = _recipe(options, provenance, default_recipe)
    if options.commercial:
        check_commercial(artifacts_of(recipe).values(), f"recipe '{recipe.name}'", console.note)
    prompts = [_text(prompt) for prompt in options.prompts]
    if options.prompts_file is not None:
        prompts += prompts_file(options.prompts_file)
    said = recipe if provenance is None else _as_run(options, provenance)
    if not prompts and said.prompt is not None:
        prompts = [said.prompt]
    if not prompts:
        raise UsageError("there is no prompt", 'say what to make: --prompt "a portrait in a garden"')
    seed = said.seed if options.seed is None else options.seed
    if seed is None:
        seed = random_seed()
    if not 0 <= seed <= 2**63 - options.count * options.best_of:
        raise UsageError(f"seed {seed} is out of range", "seeds lie between 0 and 2^63 - 1")
    negative = said.negative_prompt if options.negative_prompt is None else _text(options.negative_prompt)
    work = Work(
        recipe=recipe,
        prompts=prompts,
        negative_prompt=negative,
        seeds=[seed + index * options.best_of for index in range(options.count)],
        scales=options.scales or [said.adapter.scale],
        slots=[],
        best_of=options.best_of,
        expected_identity=provenance.identity_digest if provenance else None,
    )
    for candidate in range(options.best_of):
        fields: list[Mapping[str, str | int | float]] = [
            {
                "recipe": recipe.name,
                "seed": seed + candidate,
                "prompt": prompt,
                "scale": scale,
                "index": index,
            }
            for index, (prompt, seed, scale) in enumerate(work.cells(), start=1)
        ]
        work.slots.append(plan_paths(options.output, count=len(fields), fields=fields, force=options.force))
    taken = {os.path.abspath(path) for paths in work.slots for path in paths}
    for flag, extra in (
        ("--save-identity", options.save_identity),
        ("--save-latents", options.save_latents),
        ("--grid", _grid_path(work) if options.grid else None),
    ):
        if extra is None:
            continue
        check_target(extra, force=options.force)
        if os.path.abspath(extra) in taken:
            raise UsageError(f"{flag} and another output both go to {extra}", "choose another name")
        taken.add(os.path.abspath(extra))
    return work


def _recipe(options: Options, provenance: Provenance | None, default: str) -> Recipe:
    from ..recipe.files import load_recipe

    if provenance is None:
        return load_recipe(
            options.recipe or default, overrides=options.overrides, flags=options.flags, stack=options.stack
        ).recipe
    given = [override.partition("=")[0].strip() for override in options.overrides]
    provenance.require_local_parts(given + (["model"] if options.stack else []))
    recipe = _changed(options, provenance.recipe)
    for part in provenance.changed_local_parts(recipe):
        console.note(f"warning: {part.field} is not the file '{part.name}' that the picture was made with")
    items = [f"{name}={'on' if value is True else value}" for name, value in (provenance.lossy or {}).items()]
    left_out = [item for item in items if item not in options.accelerate]
    if left_out:
        flags = " ".join(f"--accelerate {item}" for item in left_out)
        console.note(f"warning: the picture was made with {flags}; without it this one differs a little")
    return recipe


def _as_run(options: Options, provenance: Provenance) -> Recipe:
    """What a replay takes where no flag says otherwise: prompts, seed and adapter scale of the picture."""
    return _changed(options, provenance.as_run())


def _changed(options: Options, recipe: Recipe) -> Recipe:
    """A recipe read from a picture, with the changes of this call."""
    from ..recipe.files import load_recipe_data

    return load_recipe_data(
        recipe.canonical(),
        str(options.replay),
        overrides=options.overrides,
        flags=options.flags,
        stack=options.stack,
    ).recipe


def _replayed(options: Options) -> Provenance | None:
    if options.replay is None:
        return None
    from ..output.metadata import read

    if options.recipe is not None:
        raise UsageError("--from and --recipe both name a recipe", "leave one of them out")
    return read(options.replay)


def people(options: Options) -> tuple[Identity | None, list[Path]]:
    """The saved identity, or the photos, checked to be readable.

    Raises:
        UsageError: neither or both are given, or a file cannot be read.
    """
    from ..identity.identity import Identity
    from ..identity.photos import read_photo
    from ..identity.search import check_choice

    if options.identity is not None and options.faces:
        raise UsageError("--face and --identity both name a person", "leave one of them out")
    if options.identity is not None:
        return Identity.load(options.identity), []
    if not options.faces:
        raise UsageError(
            "there is no person", "give a photo with --face me.jpg, or --identity me.safetensors"
        )
    check_choice(options.face_index, options.face_box)
    for photo in options.faces:
        read_photo(photo)
    return None, options.faces


@dataclass
class Made:
    """What was made and is still needed: pictures for their latents, and the cells of the contact sheet."""

    pictures: list[Picture] = field(default_factory=list)
    cells: list[tuple[Image.Image, str]] = field(default_factory=list)


def make(
    options: Options,
    work: Work,
    pipeline: Pipeline,
    identity: Identity,
    report: Report,
    scorer: Scorer | None = None,
) -> Made:
    """Make the pictures, writing each as soon as it is there.

    Args:
        scorer: measures the candidates where the best of several is kept.
    """
    from ..app.pipeline import Request
    from ..output.writer import Behind

    requests = [
        Request(prompt, first + candidate, identity, work.negative_prompt, scale)
        for prompt, first, scale in work.cells()
        for candidate in range(work.best_of)
    ]
    made = Made()
    with console.step_progress() as progress, Behind() as behind:
        steps = progress.add_task("steps", total=len(requests) * work.recipe.sampling.steps)

        def on_step(done: int) -> None:
            progress.advance(steps, done)

        if scorer is None:
            pictures = pipeline.generate(requests, batch_size=options.batch_size, on_step=on_step)
            for picture, path in zip(pictures, work.paths, strict=True):
                behind.do(partial(_write_and_tell, options, work, report, picture, path))
                _remember(options, made, picture, f"{picture.request.seed}  {picture.request.prompt}")
        else:
            _make_best(options, work, pipeline, requests, report, scorer, on_step, made)
    return made


def _write_and_tell(options: Options, work: Work, report: Report, picture: Picture, path: Path) -> None:
    written = write(picture, path, work.recipe, metadata=options.metadata, force=options.force)
    _tell(options, report, describe_picture(picture, written))


def _make_best(
    options: Options,
    work: Work,
    pipeline: Pipeline,
    requests: Sequence[Request],
    report: Report,
    scorer: Scorer,
    on_step: Callable[[int], None],
    made: Made,
) -> None:
    """Of each picture's candidates only the best is written; the sheet shows them all."""
    from ..app.best_of import make_candidates

    for cell in range(len(work.paths)):
        chosen = requests[cell * work.best_of : (cell + 1) * work.best_of]
        found = make_candidates(pipeline, scorer, chosen, batch_size=options.batch_size, on_step=on_step)
        picture, path = found.pictures[found.kept], work.slots[found.kept][cell]
        written = write(
            picture,
            path,
            work.recipe,
            metadata=options.metadata,
            force=options.force,
            best_of=found.summary(),
        )
        if not options.as_json:
            _print_scores(found)
        record = describe_picture(picture, written)
        candidates = [score.record() for score in found.scores]
        seconds = round(sum(one.seconds for one in found.pictures), 3)
        record["best_of"] = found.summary() | {"candidates": candidates, "seconds": seconds}
        _tell(options, report, record)
        if options.save_latents:
            made.pictures.append(picture)
        if options.grid:
            made.cells += [(one.image, _label(found, index)) for index, one in enumerate(found.pictures)]


def _tell(options: Options, report: Report, record: dict[str, Any]) -> None:
    """A picture is there: for the JSON at the end, or as a path now."""
    report.images.append(record)
    if not options.as_json:
        console.line(record["path"])


def _remember(options: Options, made: Made, picture: Picture, label: str) -> None:
    if options.save_latents:
        made.pictures.append(picture)
    if options.grid:
        made.cells.append((picture.image, label))


def _label(found: Candidates, index: int) -> str:
    """Below a candidate on the sheet; a star marks the one that was kept."""
    score = found.scores[index]
    likeness = "no face" if score.likeness is None else f"{score.likeness:.2f}"
    return f"{'* ' if index == found.kept else ''}{score.seed}  {likeness}"


def _print_scores(found: Candidates) -> None:
    """The table of candidates, on stderr."""
    from ..app.best_of import standing

    stands = standing(found.scores)
    rows = []
    for index, score in enumerate(found.scores):
        if index == found.kept:
            verdict = "kept"
        elif score.likeness is None:
            verdict = "no face"
        else:
            verdict = "" if index in stands else "follows the prompt less"
        rows.append(
            [
                str(score.seed),
                "" if score.likeness is None else f"{score.likeness:.3f}",
                "" if score.prompt is None else f"{score.prompt:.3f}",
                verdict,
            ]
        )
    columns = ("seed", f"likeness by {found.judge}", "prompt", "")
    prompt = found.pictures[0].request.prompt
    console.print_table(f"best of {len(rows)}: {prompt}", columns, rows, aside=True)


def write(
    picture: Picture,
    path: Path,
    recipe: Recipe,
    *,
    metadata: bool,
    force: bool,
    best_of: Mapping[str, Any] | None = None,
) -> Path:
    """Write one picture with what it says about how it was made; where it went."""
    from ..output.images import write_png
    from ..output.metadata import describe_made

    text = describe_made(recipe, picture, best_of=best_of) if metadata else None
    return write_png(picture.image, path, text=text, force=force)


def describe_picture(picture: Picture, path: Path) -> dict[str, Any]:
    """The JSON record of one picture."""
    return {
        "path": str(path),
        "prompt": picture.request.prompt,
        "seed": picture.request.seed,
        "adapter_scale": picture.adapter_scale,
        "unet_samples": picture.unet_samples,
        "seconds": round(picture.seconds, 3),
    }


def finish(options: Options, work: Work, made: Made, report: Report) -> None:
    """What is made of all pictures together: contact sheet and latents."""
    if options.save_latents is not None:
        import torch

        from ..output.latents import save_latents

        save_latents(
            options.save_latents,
            initial_latents=torch.stack([picture.initial_latents for picture in made.pictures]),
            latents=torch.stack([picture.latents for picture in made.pictures], dim=1),
            timesteps=made.pictures[0].timesteps,
            force=options.force,
        )
    if options.grid:
        from ..output.images import grid, write_png
        from ..output.metadata import marker

        images, labels = zip(*made.cells, strict=True)
        rows_of_candidates = work.best_of if work.best_of > 1 and len(work.paths) > 1 else None
        sheet = grid(images, rows_of_candidates, labels)
        text = marker() if options.metadata else None
        report.grid = write_png(sheet, _grid_path(work), text=text, force=options.force)
        if not options.as_json:
            console.line(str(report.grid))


def _grid_path(work: Work) -> Path:
    return work.paths[0].with_name(f"{work.paths[0].stem}-grid.png")


def print_plan(steps: Sequence[Any]) -> None:
    """What every step does, on stderr."""
    for step in steps:
        named = ", ".join(f"e{index}" for index in step.branches)
        console.note(
            f"step {step.index + 1}: t = {step.timestep:g}, identity {step.identity:g}, text {step.text:g}, "
            f"computes {named}"
        )
    console.note(f"{sum(len(step.branches) for step in steps)} UNet samples a picture")


def _text(argument: str) -> str:
    """Bytes of an argument that are no UTF-8 come as lone surrogates, which no tokenizer takes."""
    return argument.encode("utf-8", "replace").decode()


def _saving(text: str | None) -> Saving | None:
    from ..models.offload import level_of

    if text is None:
        return None
    return "auto" if text == "auto" else level_of(text).name


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", text.strip())
    if match is None:
        raise UsageError(f"--size '{text}' is not a size", "write it as 1024x1024")
    width = int(match[1])
    return width, int(match[2] or width)


def _numbers(text: str, flag: str) -> list[float]:
    try:
        found = [float(part) for part in re.split(r"[,\s]+", text.strip()) if part]
    except ValueError:
        found = []
    if not found or not all(-5 <= number <= 5 for number in found):
        raise UsageError(
            f"{flag} '{text}' is not a list of numbers between -5 and 5", f"as in {flag} 0.4,0.8"
        )
    return found


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = (float(part) for part in re.split(r"[,\s]+", text.strip()))
    except ValueError as error:
        raise UsageError(f"--face-box '{text}' is not four numbers", "write it as 120,80,360,400") from error
    return x1, y1, x2, y2
