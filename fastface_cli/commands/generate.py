"""`fastface generate`: flags in, events of a session out."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from ..errors import UsageError
from . import options
from .options import IMAGE, MACHINE, OUTPUT, PERSON, RECIPE
from .run_display import RunDisplay

if TYPE_CHECKING:
    from ..app.best_of import Candidates
    from ..app.events import ModelsReady
    from ..app.request import GenerateRequest
    from ..app.session import Session


def generate(
    # ---------------------------------------------------------------------------------------- person
    face: Annotated[
        list[Path] | None,
        typer.Option(
            "--face", metavar="PHOTO", help="Photo of the person; repeatable.", rich_help_panel=PERSON
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(
            help="Identity file made with --save-identity, instead of photos.", rich_help_panel=PERSON
        ),
    ] = None,
    save_identity: Annotated[
        Path | None,
        typer.Option(
            help="Write the identity to this .safetensors file; without a prompt, only that.",
            rich_help_panel=PERSON,
        ),
    ] = None,
    face_index: Annotated[
        int | None,
        typer.Option(
            min=0, help="Index of the face in the photo, largest first, from 0.", rich_help_panel=PERSON
        ),
    ] = None,
    face_box: Annotated[
        str | None,
        typer.Option(
            help="Box around the face, x1,y1,x2,y2, in pixels of the photo.", rich_help_panel=PERSON
        ),
    ] = None,
    pose: Annotated[
        Path | None,
        typer.Option(
            metavar="PHOTO",
            help="Photo whose face gives the pose, for InstantID recipes.",
            rich_help_panel=PERSON,
        ),
    ] = None,
    remember: Annotated[
        bool,
        typer.Option(
            "--remember", help="Cache the face embedding on disk for later runs.", rich_help_panel=PERSON
        ),
    ] = False,
    # ----------------------------------------------------------------------------------------- image
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="What the image shows; repeatable, one image each.",
            rich_help_panel=IMAGE,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the image must not show.", rich_help_panel=IMAGE)
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="File with one prompt per line; # starts a comment.", rich_help_panel=IMAGE),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first image.", show_default="random", rich_help_panel=IMAGE),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            min=1, max=10000, help="Number of images per prompt: seed, seed+1, ...", rich_help_panel=IMAGE
        ),
    ] = 1,
    best_of: Annotated[
        int,
        typer.Option(
            min=1,
            max=1000,
            help="Generate N candidates per image and keep the best likeness.",
            rich_help_panel=IMAGE,
        ),
    ] = 1,
    size: Annotated[
        str | None,
        typer.Option(
            help="Width and height in pixels, 1024x1024, or an aspect ratio, 3:4.",
            show_default="the recipe's",
            rich_help_panel=IMAGE,
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Repeat the recipe, prompt and seed of an image made by fastface.",
            rich_help_panel=IMAGE,
        ),
    ] = None,
    jobs: Annotated[
        str | None,
        typer.Option(help="JSONL file with one image per line; - reads stdin.", rich_help_panel=IMAGE),
    ] = None,
    # ---------------------------------------------------------------------------------------- output
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="File (.png, .jpg, .webp), folder or template, for example '{recipe}-{seed}.png'.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Also write a contact sheet of all images.", rich_help_panel=OUTPUT),
    ] = False,
    save_latents: Annotated[
        Path | None,
        typer.Option(help="Also write the latents to this .safetensors file.", rich_help_panel=OUTPUT),
    ] = None,
    no_metadata: Annotated[
        bool,
        typer.Option("--no-metadata", help="Write no metadata into the image.", rich_help_panel=OUTPUT),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace existing files.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: options.JsonOption = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only paths and errors.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            show_default=False,
            help="Print progress details.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0,
    # ---------------------------------------------------------------------------------------- recipe
    recipe: options.RecipeOption = None,
    steps: options.StepsOption = None,
    adapter_scale: Annotated[
        str | None,
        typer.Option(
            help="Strength of the identity adapter; 0.4,0.8 makes one image each.", rich_help_panel=RECIPE
        ),
    ] = None,
    lora_scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of the LoRA inside the adapter file.",
            show_default="the recipe's",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="Add a style LoRA; repeatable.", rich_help_panel=RECIPE),
    ] = None,
    set_: options.SetOption = None,
    stack: options.StackOption = None,
    allow_hub: Annotated[
        bool,
        typer.Option(
            "--allow-hub",
            help="With --from: download Hub repositories that only the image names.",
            rich_help_panel=RECIPE,
        ),
    ] = False,
    commercial: options.CommercialOption = False,
    # --------------------------------------------------------------------------------------- machine
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of images per UNet call.", rich_help_panel=MACHINE)
    ] = 1,
    low_memory: options.LowMemoryOption = None,
    compile_: options.CompileOption = False,
    accelerate: options.AccelerateOption = None,
    offline: options.OfflineOption = False,
) -> None:
    """Put a person into an image: from a photo and a prompt, generate that person in that scene.

    Examples:

      fastface generate --recipe pocket --face me.jpg --prompt "a woman smiling"

      fastface generate --face me.jpg --prompt "an astronaut in a cafe" --count 4 --seed 7 -o out/

      fastface generate --face me.jpg --prompt "a sailor" --best-of 4 -o image.png

      fastface generate --from image.png --face me.jpg

      fastface generate --face me.jpg --save-identity me.safetensors
    """
    from ..app.request import GenerateRequest, OutputPlan, RecipeChange
    from ..app.runtime import Runtime
    from ..models.acceleration import parse

    scales = _numbers(adapter_scale, "--adapter-scale") if adapter_scale is not None else []
    changes: dict[str, RecipeChange] = {}
    if steps is not None:
        changes["sampling.steps"] = RecipeChange(value=steps, origin="--steps")
    aspect = _aspect(size) if size is not None else None
    if size is not None and aspect is None:
        for side, pixels in zip(("width", "height"), _size(size), strict=True):
            changes[f"sampling.{side}"] = RecipeChange(value=pixels, origin="--size")
    if lora_scale is not None:
        changes["adapter.lora_scale"] = RecipeChange(value=lora_scale, origin="--lora-scale")
    if len(scales) == 1:
        changes["adapter.scale"] = RecipeChange(value=scales[0], origin="--adapter-scale")
    if lora:
        changes["model.loras"] = RecipeChange(value=[_lora(text) for text in lora], origin="--lora")
    request = GenerateRequest(
        recipe=recipe,
        changes=changes,
        overrides=tuple(set_ or ()),
        stack=stack,
        replay=from_,
        allow_hub=allow_hub,
        photos=tuple(face or ()),
        identity=identity,
        pose=pose,
        face_index=face_index,
        face_box=_box(face_box) if face_box is not None else None,
        prompts=(*(prompt or ()), *_prompts(prompts_file, is_read=jobs is None)),
        negative_prompt=negative_prompt,
        seed=seed,
        count=count,
        best_of=best_of,
        adapter_scales=tuple(scales),
        aspect=aspect,
        batch_size=batch_size,
        commercial=commercial,
        output=OutputPlan(
            path=output,
            force=force,
            metadata=not no_metadata,
            grid=grid,
            save_latents=save_latents,
            save_identity=save_identity,
        ),
    )
    accelerations = [*(["compile=on"] if compile_ else []), *(accelerate or [])]

    def open_session() -> Session:
        from ..app.session import Session

        runtime = Runtime(device, dtype, options.saving(low_memory), parse(accelerations))
        return Session(runtime=runtime, offline=offline or None, remember=remember)

    console.be_quiet(quiet)
    if jobs is not None:
        from .jobs import run_jobs

        _refuse_with_jobs(request, prompts_file)
        run_jobs(open_session(), request, jobs)
        return
    session = open_session()
    try:
        sheet = show_run(session, request, as_json=as_json, verbosity=verbose)
    except BaseException as error:
        # However the run ended, the JSON lists the images that were written.
        vars(error)["partial"] = {"images": session.finished}
        raise
    if as_json:
        grid_record = {} if sheet is None else {"grid": str(sheet)}
        console.print_json({"ok": True, "images": session.finished, **grid_record, "error": None})


def show_run(session: Session, request: GenerateRequest, *, as_json: bool, verbosity: int) -> Path | None:
    """Run a request and show its events: paths on stdout, progress and notes on stderr.

    Returns:
        the path of the contact sheet, if there is one.
    """
    from ..app.events import IdentityReady, ImageFinished, ModelsReady, RunFinished, RunStarted, StepFinished

    verbosity = max(verbosity, session.settings.verbosity)
    grid = None
    # An error between two events must end the run before it is reported.
    with RunDisplay() as display, closing(session.run(request)) as events:
        for event in events:
            match event:
                case RunStarted():
                    started = event
                    if not request.identity:
                        display.working("finding the face")
                case IdentityReady():
                    if not event.matches_replay:
                        console.note("warning: this is not the identity that the image was made with")
                    if request.seed is None and started.images and not as_json:
                        console.note(f"seed {started.seeds[0]}")
                    if verbosity:
                        console.note(f"recipe {started.recipe.name}, digest {started.recipe.digest()[:12]}")
                    if event.saved is not None and not started.images and not as_json:
                        console.line(str(event.saved))
                    display.working("loading models")
                case ModelsReady():
                    if verbosity:
                        _print_models(event)
                    compiles = session.runtime.acceleration.compile
                    display.working("compiling and generating" if compiles else "generating")
                case StepFinished():
                    display.steps(event.done, event.total)
                case ImageFinished():
                    if event.candidates and not as_json:
                        _print_scores(event.candidates)
                    if not as_json:
                        console.line(str(event.path))
                case RunFinished():
                    grid = event.grid
                    if grid and not as_json:
                        console.line(str(grid))
                case _:
                    display.transfer(event)
    return grid


def _print_models(event: ModelsReady) -> None:
    """Print what was loaded and what each step computes, to stderr."""
    console.note(f"models loaded in {event.seconds:.1f} s on {event.device}, {event.dtype}")
    for step in event.steps:
        branches = ", ".join(f"e{index}" for index in step.branches)
        console.note(
            f"step {step.index + 1}: t = {step.timestep:g}, identity {step.identity:g}, text {step.text:g}, "
            f"computes {branches}"
        )
    console.note(f"{sum(len(step.branches) for step in event.steps)} UNet samples per image")


def _print_scores(candidates: Candidates) -> None:
    """Print the table of candidates to stderr."""
    from ..app.best_of import standing

    eligible = standing(candidates.scores)
    rows = []
    for index, score in enumerate(candidates.scores):
        if index == candidates.kept:
            verdict = "kept"
        elif score.likeness is None:
            verdict = "no face"
        else:
            verdict = "" if index in eligible else "follows the prompt less"
        numbers = ["" if value is None else f"{value:.3f}" for value in (score.likeness, score.prompt)]
        rows.append([str(score.seed), *numbers, verdict])
    columns = ("seed", f"likeness by {candidates.judge}", "prompt", "")
    prompt = candidates.images[0].request.prompt
    console.print_table(f"best of {len(rows)}: {prompt}", columns, rows, aside=True)


def _prompts(path: Path | None, *, is_read: bool) -> list[str]:
    from ..app.jobs import prompts_file

    return prompts_file(path, comments=True) if path is not None and is_read else []


def _refuse_with_jobs(request: GenerateRequest, prompts_file: Path | None) -> None:
    """Refuse flags that do not apply to the lines of a jobs file."""
    from ..app.request import OutputPlan

    output = request.output or OutputPlan()
    refused = {
        "--grid": output.grid,
        "--save-latents": output.save_latents is not None,
        "--save-identity": output.save_identity is not None,
        "--from": request.replay is not None,
        "--count": request.count != 1,
        "--prompts-file": prompts_file is not None,
        "a list in --adapter-scale": len(request.adapter_scales) > 1,
        "a repeated --prompt": len(request.prompts) > 1,
    }
    for name, is_given in refused.items():
        if is_given:
            raise UsageError(f"{name} does not go with --jobs", "each line of the jobs file makes one image")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})(?:[xX×](\d{1,5}))?", text.strip())
    if match is None:
        raise UsageError(f"--size '{text}' is not a size", "use a form such as 1024x1024 or 3:4")
    width = int(match[1])
    return width, int(match[2] or width)


def _aspect(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text.strip())
    return None if match is None else (int(match[1]), int(match[2]))


def _lora(text: str) -> dict[str, str | float]:
    """Split `FILE:WEIGHT`; a colon that no number follows belongs to the name."""
    match = re.fullmatch(r"(.+):(-?\d*\.?\d+)", text)
    return {"file": text} if match is None else {"file": match[1], "scale": float(match[2])}


def _numbers(text: str, flag: str) -> list[float]:
    try:
        numbers = [float(part) for part in re.split(r"[,\s]+", text.strip()) if part]
    except ValueError:
        numbers = []
    if not numbers or not all(-5 <= number <= 5 for number in numbers):
        raise UsageError(
            f"{flag} '{text}' is not a list of numbers between -5 and 5", f"for example {flag} 0.4,0.8"
        )
    return numbers


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x1, y1, x2, y2 = (float(part) for part in re.split(r"[,\s]+", text.strip()))
    except ValueError as error:
        raise UsageError(f"--face-box '{text}' is not four numbers", "write it as 120,80,360,400") from error
    return x1, y1, x2, y2
