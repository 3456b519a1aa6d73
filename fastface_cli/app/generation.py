"""The images of one planned run: drawn, chosen among candidates, written, reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output.images import grid, write_png
from ..output.metadata import marker
from ..output.writer import Behind
from .best_of import Candidates, Scorer, make_candidates
from .events import Event, ImageFinished, RunFinished, StepFinished
from .pipeline import GeneratedImage, Pipeline, Request
from .plan import ImageCell, RunPlan
from .provenance import describe_made
from .request import GenerateRequest

if TYPE_CHECKING:
    from PIL import Image

    from ..identity.identity import Identity


@dataclass
class Drawing:
    """One run on loaded models. Images are written on a thread of their own while the next ones are drawn."""

    request: GenerateRequest
    plan: RunPlan
    pipeline: Pipeline
    identity: Identity
    scorer: Scorer | None
    """Scores candidates where the best of several is kept."""
    emit: Callable[[Event], None]
    check_cancelled: Callable[[], None]
    """Raises where the run was cancelled; called after every sampling step."""
    steps_done: int = 0
    with_latents: list[GeneratedImage] = field(default_factory=list)
    sheet: list[tuple[Image.Image, str]] = field(default_factory=list)

    def run(self) -> None:
        """Draw and write every image, then the contact sheet and the latents.

        Raises:
            FastFaceError: out of memory, or the disk refuses a file; finished images stay.
        """
        with Behind() as writer:
            if self.scorer is None:
                self._draw_each(writer)
            else:
                self._draw_best(self.scorer)
        self.emit(RunFinished(len(self.plan.cells), self._write_extras()))

    def _draw_each(self, writer: Behind) -> None:
        requests = [self._request(cell, 0) for cell in self.plan.cells]
        drawn = self.pipeline.generate(requests, batch_size=self.request.batch_size, on_step=self._on_step)
        for image, cell in zip(drawn, self.plan.cells, strict=True):
            writer.do(partial(self._write, image, cell.paths[0]))
            self._keep(image, f"{image.request.seed}  {image.request.prompt}")

    def _draw_best(self, scorer: Scorer) -> None:
        """Only the best candidate of each image is written; the contact sheet shows them all."""
        for cell in self.plan.cells:
            requests = [self._request(cell, candidate) for candidate in range(self.request.best_of)]
            candidates = make_candidates(
                self.pipeline,
                scorer,
                requests,
                batch_size=self.request.batch_size,
                on_step=self._on_step,
            )
            kept = candidates.kept
            self._write(candidates.images[kept], cell.paths[kept], candidates)
            if self.request.output.save_latents:
                self.with_latents.append(candidates.images[kept])
            if self.request.output.grid:
                labels = _candidate_labels(candidates)
                self.sheet += zip((each.image for each in candidates.images), labels, strict=True)

    def _request(self, cell: ImageCell, candidate: int) -> Request:
        negative, scale = self.plan.negative_prompt, cell.adapter_scale
        return Request(cell.prompt, cell.seed + candidate, self.identity, negative, scale)

    def _on_step(self, images: int) -> None:
        self.check_cancelled()
        self.steps_done += images
        total = len(self.plan.cells) * self.request.best_of * self.plan.recipe.sampling.steps
        self.emit(StepFinished(images, self.steps_done, total))

    def _write(self, image: GeneratedImage, path: Path, candidates: Candidates | None = None) -> None:
        summary = candidates.summary() if candidates else None
        output = self.request.output
        text = describe_made(self.plan.recipe, image, best_of=summary) if output.metadata else None
        written = write_png(image.image, path, text=text, force=output.force)
        record = image_record(image, written)
        if candidates:
            seconds = round(sum(each.seconds for each in candidates.images), 3)
            scores = [score.record() for score in candidates.scores]
            record["best_of"] = {**candidates.summary(), "candidates": scores, "seconds": seconds}
        self.emit(ImageFinished(written, image.image, record, candidates))

    def _keep(self, image: GeneratedImage, label: str) -> None:
        if self.request.output.save_latents:
            self.with_latents.append(image)
        if self.request.output.grid:
            self.sheet.append((image.image, label))

    def _write_extras(self) -> Path | None:
        """The latents, and the contact sheet; the path of the latter."""
        output = self.request.output
        if output.save_latents is not None:
            _save_latents(output.save_latents, self.with_latents, force=output.force)
        if self.plan.grid is None:
            return None
        images, labels = zip(*self.sheet, strict=True)
        one_row_each = self.request.best_of > 1 and len(self.plan.cells) > 1
        sheet = grid(images, self.request.best_of if one_row_each else None, labels)
        text = marker() if output.metadata else None
        return write_png(sheet, self.plan.grid, text=text, force=output.force)


def image_record(image: GeneratedImage, path: Path) -> dict[str, Any]:
    """An image as `--json` and job records describe it."""
    return {
        "path": str(path),
        "prompt": image.request.prompt,
        "seed": image.request.seed,
        "adapter_scale": image.adapter_scale,
        "unet_samples": image.unet_samples,
        "seconds": round(image.seconds, 3),
    }


def _candidate_labels(candidates: Candidates) -> Iterator[str]:
    """Captions of the contact sheet; a star marks the candidate that was kept."""
    for index, score in enumerate(candidates.scores):
        likeness = "no face" if score.likeness is None else f"{score.likeness:.2f}"
        yield f"{'* ' if index == candidates.kept else ''}{score.seed}  {likeness}"


def _save_latents(path: Path, images: Sequence[GeneratedImage], *, force: bool) -> None:
    import torch

    from ..output.latents import save_latents

    save_latents(
        path,
        initial_latents=torch.stack([image.initial_latents for image in images]),
        latents=torch.stack([image.latents for image in images], dim=1),
        timesteps=images[0].timesteps,
        force=force,
    )
