"""Refit the key points of the exported detector: only its last layer, by least squares.

After gradient descent the points of large faces have a bias of several percent of the distance between the
eyes, and the alignment for the recognizer depends on them. Scores and boxes are bit-identical afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from training import data, detector
from training.common import options
from training.export import TARGET

SCENES = 1200
"""Half of them are composed as for the detector; half are single portraits, as usual in the product."""
SIDES = (640, 640, 448, 320)
ROUNDS = 8
"""Number of reweighting passes: they reduce the weight of large errors, mostly of covered faces."""
RIDGE = 1e-3
"""Regularization towards the old weights, relative to the mean square of the features."""


@dataclass
class Samples:
    """Samples of the faces that are assigned to one anchor of one stride."""

    features: list[np.ndarray]
    """[49] each: input of the last layer at the anchor, and 1."""
    points: list[np.ndarray]
    """[10] each: key points relative to the position of the anchor, in half anchor sizes."""
    weight: list[float]
    """The score, because only anchors with a high score are used, times the anchor size in face sizes."""


class Heads:
    """The last layers of the exported detector, and their inputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(str(path))
        nodes = self.model.graph.node
        self.layers = [next(n for n in nodes if f"heads.{level}.bias" in n.input) for level in range(3)]
        shown = onnx.ModelProto()
        shown.CopyFrom(self.model)
        shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n.input[0]) for n in self.layers)
        self.session = onnxruntime.InferenceSession(
            shown.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def name(self, level: int) -> str:
        """Return the name of the weight of a last layer; half-precision weights are followed by a cast."""
        plain = f"heads.{level}.weight"
        return f"{plain}_half" if f"{plain}_half" in self.tensors else plain

    def weights(self, level: int) -> np.ndarray:
        """Return the last layer of a stride, [30, 49] float64, with the bias in the last column."""
        weight, bias = (
            numpy_helper.to_array(self.tensors[name]).astype(np.float64)
            for name in (self.name(level), f"heads.{level}.bias")
        )
        return np.concatenate([weight.reshape(30, -1), bias[:, None]], axis=1)

    def write(self, table: list[np.ndarray]) -> None:
        """Overwrite the last layers, [30, 49] each, in the precision of the file."""
        for level, values in enumerate(table):
            for name, part in ((self.name(level), values[:, :-1]), (f"heads.{level}.bias", values[:, -1])):
                old = numpy_helper.to_array(self.tensors[name])
                new = numpy_helper.from_array(part.reshape(old.shape).astype(old.dtype), name)
                self.tensors[name].CopyFrom(new)
        onnx.save(self.model, str(self.path))

    def features(self, scene: np.ndarray) -> list[np.ndarray]:
        """Return last-layer inputs, [h / stride, w / stride, 49] each, of an RGB scene [h, w, 3] uint8."""
        pixels = (scene.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 128
        names = [n.input[0] for n in self.layers]
        outputs = self.session.run(names, {self.session.get_inputs()[0].name: pixels})
        return [
            np.concatenate([f[0].transpose(1, 2, 0), np.ones((*f.shape[2:], 1))], axis=2) for f in outputs
        ]


def portrait(scenes: detector.Scenes, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a portrait enlarged to the detector size, [side, side, 3], and its face, [1, 14]."""
    g, portraits = scenes.generator, scenes.portraits
    index = int(g.choice(portraits.train))
    source = np.asarray(portraits.originals[index])
    if g.random() < 0.5:  # images of the pocket stack have half the size
        source = np.asarray(portraits.images[index, int(g.integers(len(data.STYLE_NAMES)))])
    outline, points = scenes.outline[index], portraits.key_points[index]
    if g.random() < 0.5:
        source = source[:, ::-1]
        outline, points = data.mirrored(outline, 256), data.mirrored_points(points, 256)
    face = np.concatenate([outline.min(0), outline.max(0), points.ravel()]) * (side / 256)
    return cv2.resize(np.ascontiguousarray(source), (side, side)), face[None].astype(np.float32)


def gather(heads: Heads, scenes: detector.Scenes, count: int) -> dict[tuple[int, int], Samples]:
    """Return the samples of every anchor, by stride and anchor."""
    samples_by_anchor = {(level, anchor): Samples([], [], []) for level in range(3) for anchor in range(2)}
    weights = [heads.weights(level) for level in range(3)]
    for number in range(count):
        side = int(scenes.generator.choice(SIDES))
        scene, faces = portrait(scenes, side) if number % 2 else scenes.compose(side)
        if not len(faces):
            continue
        for level, features in enumerate(heads.features(scene)):
            stride = detector.STRIDES[level]
            owner, sizes = detector.assign(faces, level, side)
            for row, column, anchor in np.argwhere(owner >= 0):
                samples, size = samples_by_anchor[level, anchor], detector.ANCHORS[level][anchor]
                own = owner[row, column, anchor]
                spot = np.array([column, row]) * stride
                feature = features[row, column]
                samples.features.append(feature)
                samples.points.append((faces[own, 4:].reshape(5, 2) - spot).ravel() / (size / 2))
                score = 1 / (1 + np.exp(-weights[level][anchor] @ feature))
                samples.weight.append(score * size / sizes[own])
    return samples_by_anchor


def fitted(samples: Samples, old: np.ndarray) -> np.ndarray:
    """Return weights [10, 49] with the least absolute errors, regularized towards the old weights."""
    features, points = np.array(samples.features), np.array(samples.points)
    weight, new = np.array(samples.weight), old
    for _ in range(ROUNDS):
        error = np.abs(features @ new.T - points).mean(1)
        rows = (weight / np.maximum(error, 0.01))[:, None] * features
        square = rows.T @ features
        hold = RIDGE * np.trace(square) / len(square) * np.eye(len(square))
        new = np.linalg.solve(square + hold, rows.T @ points + hold @ old.T).T
    return new


def mean_error(samples: Samples, weights: np.ndarray) -> float:
    """Return the weighted mean error of the points in face sizes."""
    if not samples.features:
        return float("nan")
    error = np.abs(np.array(samples.features) @ weights.T - np.array(samples.points)).mean(1)
    return float(np.sum(error * np.array(samples.weight)) / 2 / np.sum(samples.weight))


def main() -> None:
    """Refit the last layers of the exported file; print the errors on scenes that the fit did not use."""
    settings = options("points", 0)
    portraits: Any = data.load(settings)
    heads = Heads(TARGET / "face" / "det_pocket.onnx")
    training_samples = gather(heads, detector.Scenes(portraits, settings.seed + 51), SCENES)
    validation_samples = gather(heads, detector.Scenes(portraits, settings.seed + 52), SCENES // 6)
    table = [heads.weights(level) for level in range(3)]
    for (level, anchor), samples in training_samples.items():
        rows = slice(10 + 10 * anchor, 20 + 10 * anchor)
        old = table[level][rows]
        new = fitted(samples, old)
        before, after = (
            mean_error(validation_samples[level, anchor], old),
            mean_error(validation_samples[level, anchor], new),
        )
        size = detector.ANCHORS[level][anchor]
        print(f"faces of {size}: {len(samples.weight)} samples, error {before:.4f} -> {after:.4f} face sizes")
        if after < before:  # there are few small faces, so their fit can be worse
            table[level][rows] = new
    heads.write(table)


if __name__ == "__main__":
    main()
