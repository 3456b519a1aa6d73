"""Measure the quality of the shipped weights on held-out portraits: ``make pocket-report``.

Every row uses the files in ``fastface_cli/pocket/weights``, loaded with the public loaders.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from scipy.stats import rankdata, spearmanr

from training import data, recognizer
from training.common import images_to_tensor, tensor_to_images
from training.dlib_recognizer import DlibRecognizer, ranks
from training.export import TARGET
from training.styles import STYLES

Row = tuple[str, str, str]


def faces_of(weights: Path, size: int) -> Any:
    """Return InsightFace with the shipped face pack."""
    from insightface.app import FaceAnalysis

    root = Path(tempfile.mkdtemp())
    shutil.copytree(weights / "face", root / "models" / "pocket")
    app = FaceAnalysis(
        name="pocket",
        root=str(root),
        allowed_modules=["detection", "recognition"],
        providers=["CPUExecutionProvider"],
    )
    app.prepare(ctx_id=-1, det_size=(size, size))
    return app


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes, corners [4]."""
    extent = np.minimum(a[2:4], b[2:4]) - np.maximum(a[:2], b[:2])
    if (extent <= 0).any():
        return 0.0
    inner = float(extent.prod())
    return inner / (float((a[2:4] - a[:2]).prod()) + float((b[2:4] - b[:2]).prod()) - inner)


def detector_rows(
    portraits: data.Portraits, weights: Path, dlib_recognizer: DlibRecognizer | None
) -> list[Row]:
    """Measure the detector on held-out portraits and on the group photo of InsightFace."""
    from insightface.data import get_image

    rows = []
    for size in (640, 320):
        app = faces_of(weights, size)
        hits, extra, errors = 0, 0, []
        for index in portraits.held_out:
            boxes, points = app.det_model.detect(np.ascontiguousarray(portraits.originals[index][:, :, ::-1]))
            truth = portraits.key_points[index]
            eyes = float(np.linalg.norm(truth[1] - truth[0]))
            distance = (
                [float(np.linalg.norm(p - truth, axis=1).mean()) / eyes for p in points] if len(boxes) else []
            )
            near = [d for d in distance if d < 0.2]
            hits += bool(near)
            extra += len(boxes) - len(near)
            errors += [min(near)] if near else []
        share, off = hits / len(portraits.held_out), float(np.mean(errors))
        text = f"{share:.1%}, {extra} extra boxes, points off by {off:.1%} of the eyes' distance"
        rows.append((f"detector, held-out portraits, detector size {size}", text, "at least 99%"))
        image = get_image("t1")
        boxes, _ = app.det_model.detect(image)
        text = f"{len(boxes)} boxes"
        if dlib_recognizer is not None:
            truth_boxes = dlib_recognizer.boxes(np.ascontiguousarray(image[:, :, ::-1]), 1)
            matched = sum(any(overlap(box, other) > 0.3 for box in boxes) for other in truth_boxes)
            false = sum(all(overlap(box, other) <= 0.3 for other in truth_boxes) for box in boxes)
            text = f"{matched} of the {len(truth_boxes)} faces of dlib, {false} false positives"
        rows.append((f"detector, t1, detector size {size}", text, "5 of 6, at most 1 false positive"))
    return rows


def views_of(portraits: data.Portraits, index: int) -> list[np.ndarray]:
    """Return variants of a portrait: shifted, darker, brighter, blurred, small, and in every style."""
    generator = np.random.default_rng(index)
    original = np.asarray(portraits.originals[index])
    points = portraits.key_points[index]
    photo = data.crop(original, points)
    shifted = data.crop(original, points + generator.normal(0, 2.5, points.shape).astype(np.float32))
    dark = (photo * 0.5).astype(np.uint8)
    bright = np.clip(photo * 1.35 + 10, 0, 255).astype(np.uint8)
    blurred = cv2.GaussianBlur(photo, (0, 0), 1.6)
    small = cv2.resize(cv2.resize(photo, (44, 44), interpolation=cv2.INTER_AREA), (112, 112))
    reduced = cv2.resize(original, (portraits.size, portraits.size), interpolation=cv2.INTER_AREA)
    scaled = points * (portraits.size / 256)
    styled = [data.crop(operation(reduced), scaled) for operation, _ in STYLES.values()]
    return [shifted, dark, bright, blurred, small, *styled]


def recognizer_rows(
    portraits: data.Portraits, weights: Path, dlib_recognizer: DlibRecognizer | None
) -> list[Row]:
    """Measure how well people are distinguished, and agreement with the teacher and dlib."""
    network = faces_of(weights, 320).models["recognition"]

    def embed(crops: list[np.ndarray]) -> np.ndarray:
        vectors = np.concatenate([network.get_feat(np.ascontiguousarray(crop[:, :, ::-1])) for crop in crops])
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    held = portraits.held_out
    clean = embed([np.asarray(portraits.crops[i]) for i in held])
    frame = recognizer.Recognizer().frame.numpy()
    teacher = portraits.embeddings[held]
    cosine = (clean * (teacher @ frame)).sum(1)
    same, other = [], []
    for column, index in enumerate(held):
        similarity = embed(views_of(portraits, int(index))) @ clean.T
        same.append(similarity[:, column])
        other.append(np.delete(similarity, column, axis=1).ravel())
    positives, negatives = np.stack(same), np.concatenate(other)
    rows = [
        (
            "recognizer, cosine to the teacher",
            f"{cosine.mean():.3f} (lowest {cosine.min():.3f})",
            "at least 0.9",
        ),
        ("recognizer, AUC, all changes", f"{area(positives.ravel(), negatives):.4f}", "at least 0.99"),
        ("recognizer, AUC, crop, light, blur", f"{area(positives[:, :5].ravel(), negatives):.4f}", ""),
        ("recognizer, AUC, styles", f"{area(positives[:, 5:].ravel(), negatives):.4f}", ""),
    ]
    if dlib_recognizer is not None:
        references = describe_all(dlib_recognizer, portraits)
        upper = np.triu_indices(len(held), 1)
        ours = (clean @ clean.T)[upper]
        theirs = np.linalg.norm(references[:, None] - references[None], axis=2)[upper]
        rows.append(
            ("recognizer, Spearman with dlib", f"{spearmanr(-ours, theirs).statistic:.3f}", "reported")
        )
    return rows


def area(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the area under the ROC curve."""
    rank_sum = rankdata(np.concatenate([positives, negatives]))[: len(positives)].sum()
    return float((rank_sum - len(positives) * (len(positives) + 1) / 2) / (len(positives) * len(negatives)))


def describe_all(dlib_recognizer: DlibRecognizer, portraits: data.Portraits) -> np.ndarray:
    """Return dlib's descriptors of the held-out originals, [200, 128]."""
    descriptors = []
    for index in portraits.held_out:
        left, top, width, height = portraits.labels[index]["box"]
        box = np.array([left, top, left + width, top + height], np.float32)
        descriptor = dlib_recognizer.describe(np.asarray(portraits.originals[index]), box)
        assert descriptor is not None
        descriptors.append(descriptor)
    return np.stack(descriptors)


@torch.no_grad()
def vae_rows(portraits: data.Portraits, weights: Path, dlib_recognizer: DlibRecognizer | None) -> list[Row]:
    """Measure reconstructions of held-out portraits."""
    model: Any = AutoencoderKL.from_pretrained(
        weights / "pipe" / "vae", variant="fp16", torch_dtype=torch.float32
    )
    held = portraits.held_out
    targets = np.stack([portraits.images[i, 0] for i in held])
    outputs = []
    for start in range(0, len(held), 20):
        latents = model.encode(images_to_tensor(targets[start : start + 20])).latent_dist.mean
        outputs.append(tensor_to_images(model.decode(latents).sample))
    results = np.concatenate(outputs)
    error = ((results.astype(np.float32) - targets) ** 2).mean((1, 2, 3))
    rows = [("VAE, PSNR", f"{(10 * np.log10(255**2 / error)).mean():.2f} dB", "at least 27 dB")]
    if dlib_recognizer is not None:
        references = describe_all(dlib_recognizer, portraits)
        for name, images in (
            ("reconstructions", results),
            (f"the portraits at {portraits.size} pixels", targets),
        ):
            descriptors = []
            for index, image in zip(held, images, strict=True):
                left, top, width, height = portraits.labels[index]["box"]
                box = np.array([left, top, left + width, top + height], np.float32) * (portraits.size / 256)
                descriptors.append(dlib_recognizer.describe(image, box))
            first = (ranks(descriptors, references, range(len(held))) == 0).mean()
            rows.append(
                (f"VAE, dlib rank-1 of {name}", f"{first:.1%}", "at least 80%" if name[0] == "r" else "")
            )
    return rows


def group_rows(portraits: data.Portraits, weights: Path, dlib_recognizer: DlibRecognizer | None) -> list[Row]:
    """Measure images of the people in the group photo; requires dlib."""
    from training import generation

    return [] if dlib_recognizer is None else generation.group_rows(dlib_recognizer, portraits.work)


def speed_rows(portraits: data.Portraits, weights: Path, dlib_recognizer: DlibRecognizer | None) -> list[Row]:
    """Measure the time per image on this machine."""
    from training import generation

    return generation.speed_rows()


def print_claims(portraits: data.Portraits, weights: Path, dlib_recognizer: DlibRecognizer) -> None:
    """Print the table of recipes, generated with the product."""
    from training import generation
    from training.common import Options

    settings = Options(portraits.work, portraits.folder, Path(), portraits.size, 3, 0, 0)
    references = describe_all(dlib_recognizer, portraits)
    for line in generation.claim_table(settings, portraits, weights, dlib_recognizer, references):
        print(line, flush=True)
    print(f"\nTen people, and their images with each recipe: {portraits.work / 'grid.png'}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m training.report")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/fastface-training").expanduser())
    parser.add_argument("--portraits", type=Path, default=Path("../shared/portraits"))
    parser.add_argument("--weights", type=Path, default=TARGET)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--parts", default="detector,recognizer,vae,speed,group,claims")
    parser.add_argument("--no-dlib", action="store_true", help="omit measurements that require dlib")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    portraits = data.Portraits(arguments.work, arguments.portraits, arguments.size)
    dlib_recognizer = None if arguments.no_dlib else DlibRecognizer()
    parts: dict[str, Callable[[data.Portraits, Path, DlibRecognizer | None], list[Row]]] = {
        "detector": detector_rows,
        "recognizer": recognizer_rows,
        "vae": vae_rows,
        "speed": speed_rows,
        "group": group_rows,
    }
    chosen = arguments.parts.split(",")
    print("| measured on 200 held-out portraits | result | target |\n|---|---|---|")
    for name in chosen:
        for row in parts[name](portraits, arguments.weights, dlib_recognizer) if name != "claims" else ():
            print(f"| {' | '.join(row)} |", flush=True)
    if "claims" in chosen and dlib_recognizer is not None:
        print()
        print_claims(portraits, arguments.weights, dlib_recognizer)


if __name__ == "__main__":
    main()
