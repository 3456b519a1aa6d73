"""Generate the images of a planned run, choose among candidates, and write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from ..output.images import enlarged, grid, write_image
from ..output.metadata import describe, marker
from ..output.writer import Behind
from ..recipe.schema import scale_text
from .best_of import Candidates, Scorer, make_candidates
from .events import Event, ImageFinished, RunFinished, StepFinished
from .pipeline import GeneratedImage, Pipeline, Request
from .plan import ImageCell, RunPlan
from .provenance import provenance_of
from .request import GenerateRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ..identity.identity import Identity
    from ..sampling.guidance import Step


@dataclass
class Generation:
    """A planned run on loaded models. A thread writes each image while the next one is generated."""

    request: GenerateRequest
    plan: RunPlan
    pipeline: Pipeline
    identity: Identity
    scorer: Scorer | None
    """Scores candidates; None if each image has one."""
    emit: Callable[[Event], None]
    """Called from several threads. May raise between two steps to end the run."""
    reference: Image.Image | None = None
    """The first photo of the person, for the contact sheet."""
    steps_done: int = 0
    with_latents: list[GeneratedImage] = field(default_factory=list)
    sheet: list[tuple[Image.Image, str]] = field(default_factory=list)

    def run(self) -> None:
        """Generate and write all images, then the contact sheet and the latents.

        Raises:
            DeviceError: out of memory; finished images are kept.
            FastFaceError: a file cannot be written; finished images are kept.
        """
        with Behind() as writer:
            if self.scorer is None:
                self._generate_each(writer)
            else:
                self._generate_best(self.scorer)
        self.emit(RunFinished(len(self.plan.cells), self._write_extras()))

    def _generate_each(self, writer: Behind) -> None:
        requests = [self._request(cell, 0) for cell in self.plan.cells]
        images = self.pipeline.generate(requests, batch_size=self.request.batch_size, on_step=self._on_step)
        for image, cell in zip(images, self.plan.cells, strict=True):
            writer.do(partial(self._finish, image, self._path(cell, 0)))
            self._keep(image, self._label(image))

    def _generate_best(self, scorer: Scorer) -> None:
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
            self._finish(candidates.images[kept], self._path(cell, kept), candidates)
            if self._saves_latents:
                self.with_latents.append(candidates.images[kept])
            if self.plan.grid is not None:
                labels = _candidate_labels(candidates)
                self.sheet += zip((each.image for each in candidates.images), labels, strict=True)

    def _path(self, cell: ImageCell, candidate: int) -> Path | None:
        return None if self.plan.names is None else self.plan.names.path(cell.index, candidate)

    def _request(self, cell: ImageCell, candidate: int) -> Request:
        negative, scale = self.plan.negative_prompt, cell.adapter_scale
        return Request(cell.prompt, cell.seed + candidate, self.identity, negative, scale)

    def _on_step(self, step: Step, latents: Tensor) -> None:
        self.steps_done += len(latents)
        total = len(self.plan.cells) * self.request.best_of * self.plan.recipe.sampling.steps
        self.emit(StepFinished(len(latents), step.index + 1, self.steps_done, total, latents))

    def _finish(self, image: GeneratedImage, path: Path | None, candidates: Candidates | None = None) -> None:
        summary = candidates.summary() if candidates else None
        provenance = provenance_of(self.plan.recipe, image, best_of=summary)
        output = self.request.output
        if output is not None and path is not None:
            text = describe(provenance, path.suffix) if output.metadata else None
            path = write_image(image.image, path, text=text, force=output.force)
        self.emit(ImageFinished(path, image.image, provenance, image.seconds, candidates))

    @property
    def _saves_latents(self) -> bool:
        output = self.request.output
        return output is not None and output.save_latents is not None

    def _label(self, image: GeneratedImage) -> str:
        """What distinguishes an image in the contact sheet; its prompt if nothing does."""
        cells = self.plan.cells
        parts = []
        if len({scale_text(cell.adapter_scale) for cell in cells}) > 1:
            parts.append(f"scale {scale_text(image.adapter_scale)}")
        if len({cell.seed for cell in cells}) > 1:
            parts.append(f"seed {image.request.seed}")
        if len({cell.prompt for cell in cells}) > 1 or not parts:
            parts.append(image.request.prompt)
        return "  ".join(parts)

    def _keep(self, image: GeneratedImage, label: str) -> None:
        if self._saves_latents:
            self.with_latents.append(image)
        if self.plan.grid is not None:
            self.sheet.append((image.image, label))

    def _write_extras(self) -> Path | None:
        """Write the latents and the contact sheet; return the path of the contact sheet."""
        output = self.request.output
        if output is None:
            return None
        if output.save_latents is not None:
            _save_latents(output.save_latents, self.with_latents, force=output.force)
        if self.plan.grid is None:
            return None
        text = marker() if output.metadata else None
        return write_image(self._contact_sheet(), self.plan.grid, text=text, force=output.force)

    def _contact_sheet(self) -> Image.Image:
        """The reference and all images, one prompt (or the candidates of one image) per row."""
        cells = [(enlarged(image), label) for image, label in self.sheet]
        best_of = self.request.best_of
        per_row = best_of if best_of > 1 else len(cells) // len({cell.prompt for cell in self.plan.cells})
        columns = per_row if 1 < per_row < len(cells) else None
        if self.reference is not None:
            size = cells[0][0].size
            photo = (ImageOps.fit(self.reference, size, Image.Resampling.LANCZOS), "photo")
            if columns is None:
                cells.insert(0, photo)
            else:
                blank = (Image.new("RGB", size, "white"), "")
                for row in range(len(cells) // columns):
                    cells.insert(row * (columns + 1), blank if row else photo)
                columns += 1
        images, labels = zip(*cells, strict=True)
        return grid(images, columns, labels)


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
